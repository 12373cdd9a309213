"""ImageReward against the published package, on the same weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertTokenizer, BlipConfig

from recipes.bench.parity import save_words
from tests.evaluation.scorers.published import Published
from trl_spatial.evaluation.scorers import make_scorer
from trl_spatial.evaluation.scorers.image_reward import save_image_reward


@pytest.fixture(scope="module")
def published():
    return Published("image_reward")


@pytest.fixture(scope="module")
def config(published):
    text, vision = published.data["text"], published.data["vision"]
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return BlipConfig(
        text_config={name: text[name] for name in names} | {"encoder_hidden_size": vision["width"]},
        vision_config={
            "hidden_size": vision["width"], "intermediate_size": 4 * vision["width"], "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 224, "patch_size": vision["patch"], "layer_norm_eps": 1e-6,
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(published, config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("image-reward")
    config.text_config.max_position_embeddings = published.data["text"]["max_position_embeddings"]
    save_image_reward(published.weights(), folder, config)
    save_words(folder / "vocab.txt")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_the_rewards_are_those_of_the_published_package(published, folder):
    scores = make_scorer(f"image-reward:{folder}", device="cpu").score(published.prompts, published.images)
    assert [score.mean for score in scores] == pytest.approx(published.scores, abs=5e-5)


def test_a_row_does_not_depend_on_its_batch(published, folder):
    scorer = make_scorer(f"image-reward:{folder}", device="cpu")
    together = scorer.score(published.prompts, published.images)
    alone = [
        scorer.score([prompt], [image])[0] for prompt, image in zip(published.prompts, published.images, strict=True)
    ]
    assert [score.mean for score in together] == pytest.approx([score.mean for score in alone], abs=1e-5)


def test_a_prompt_ends_after_35_tokens(published, folder):
    scorer = make_scorer(f"image-reward:{folder}", device="cpu")
    long, longer, other = (
        scorer.score([text], published.images[:1])[0].mean for text in ("a dog " * 20, "a dog " * 40, "a dog " * 10)
    )
    assert long == longer != other


@pytest.mark.parametrize(
    "name", ["blip.visual_encoder.blocks.0.attn.bias_table.weight", "mlp.layers.1.weight", "head.bias"]
)
def test_unknown_weights_are_named(published, config, name, tmp_path):
    with pytest.raises(ValueError, match=f"{name.removeprefix('blip.visual_encoder.')} is no weight of ImageReward"):
        save_image_reward(published.weights() | {name: torch.zeros(1)}, tmp_path, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.pop("head.0.bias"), "head.0.bias are missing, unknown or of another shape"),
        (lambda weights: weights.update({"head.0.bias": torch.zeros(3)}), "head.0.bias are missing"),
        (lambda weights: weights["head.4.bias"].fill_(float("nan")), "not finite: head.4.bias"),
    ],
)
def test_damaged_weights_are_named(folder, tmp_path, change, message):
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    weights = load_file(copied / "model.safetensors")
    change(weights)
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        make_scorer(f"image-reward:{copied}", device="cpu")


def test_other_folders_are_explained(folder, tmp_path):
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    (copied / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no file model.safetensors"):
        make_scorer(f"image-reward:{copied}", device="cpu")
    (copied / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="cannot be read"):
        make_scorer(f"image-reward:{copied}", device="cpu")
    (copied / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ValueError, match="is a clip model, not ImageReward's BLIP"):
        make_scorer(f"image-reward:{copied}", device="cpu")
    with pytest.raises(ValueError, match=r"needs a model.*save_image_reward"):
        make_scorer("image-reward")
