"""CLIPScore and PickScore against the forward pass of transformers' own CLIP."""

import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, ViTConfig, ViTModel

from tests.evaluation.scorers.published import Published, build_clip_tokenizer
from trl_spatial.evaluation.scorers import make_scorer
from trl_spatial.evaluation.scorers.clip import CLIPScore, PickScore


LONG = "a red mug to the left of two blue plates " * 12


@pytest.fixture(scope="module")
def rows():
    published = Published("hpsv2")
    return [*published.prompts, LONG], [*published.images, published.images[0]]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(
        projection_dim=12,
        text_config=small
        | {"projection_dim": 12, "bos_token_id": 49406, "eos_token_id": 49407, "initializer_range": 0.5},
        vision_config=small | {"projection_dim": 12, "image_size": 32, "patch_size": 8, "initializer_range": 0.5},
    )
    CLIPModel(config).save_pretrained(folder)
    build_clip_tokenizer().save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def logits(clip_folder, rows):
    """Logits of each image for its prompt, row by row, of shape `(4,)`, and the scale in them."""
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), build_clip_tokenizer()
    processor = CLIPImageProcessor.from_pretrained(clip_folder)
    values = []
    for prompt, image in zip(*rows, strict=True):
        tokens = tokenizer([prompt], truncation=True, max_length=77, return_tensors="pt")
        with torch.no_grad():
            values.append(model(**tokens, **processor([image], return_tensors="pt")).logits_per_image[0, 0])
    return torch.stack(values), model.logit_scale.exp().item()


def test_clipscore_is_the_cosine_of_clip(clip_folder, rows, logits):
    expected = 2.5 * (logits[0] / logits[1]).clamp(min=0)
    scores = CLIPScore(str(clip_folder), device="cpu").score(*rows)
    assert [score.mean for score in scores] == pytest.approx(expected.tolist(), abs=1e-6)
    assert len({score.mean for score in scores}) > 2 and all(score.std is None for score in scores)


def test_pickscore_is_clips_logit(clip_folder, rows, logits):
    scores = make_scorer(f"pickscore:{clip_folder}", device="cpu").score(*rows)
    assert [score.mean for score in scores] == pytest.approx(logits[0].tolist(), rel=1e-5)


def test_rows_have_a_prompt_each(clip_folder, rows):
    with pytest.raises(ValueError, match="4 prompts and 3 images"):
        PickScore(str(clip_folder), device="cpu").score(rows[0], rows[1][:3])


def test_other_models_are_refused(tmp_path):
    ViTModel(
        ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a vit model, not a CLIP model"):
        make_scorer(f"clipscore:{tmp_path}")
