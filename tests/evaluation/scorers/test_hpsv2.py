"""HPSv2 against the published package, on the same weights."""

import pytest
from transformers import CLIPConfig, CLIPImageProcessor

from tests.evaluation.scorers.published import Published, build_clip_tokenizer
from trl_spatial.evaluation.scorers import make_scorer
from trl_spatial.evaluation.scorers.hpsv2 import convert_open_clip, save_hpsv2


@pytest.fixture(scope="module")
def published():
    return Published("hpsv2")


@pytest.fixture(scope="module")
def config(published):
    sizes = published.data["sizes"]
    layers = {"num_hidden_layers": sizes["layers"], "hidden_act": "gelu", "projection_dim": sizes["joint"]}

    def tower(width, **kwargs):
        heads = width // sizes["head"]
        return layers | {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads} | kwargs

    return CLIPConfig(
        projection_dim=sizes["joint"],
        text_config=tower(sizes["text"], bos_token_id=49406, eos_token_id=49407),
        vision_config=tower(sizes["vision"], image_size=sizes["side"], patch_size=sizes["patch"]),
    )


def test_the_scores_are_those_of_the_published_package(published, config, tmp_path):
    save_hpsv2(published.weights(), tmp_path, config)
    build_clip_tokenizer().save_pretrained(tmp_path)
    CLIPImageProcessor().save_pretrained(tmp_path)
    scores = make_scorer(f"hpsv2:{tmp_path}", device="cpu").score(published.prompts, published.images)
    assert [score.mean for score in scores] == pytest.approx(published.scores, abs=1e-6)


def test_the_tokens_are_those_of_the_published_package(published):
    assert build_clip_tokenizer()(published.prompts)["input_ids"] == published.data["tokens"]


@pytest.mark.parametrize("name", ["visual.transformer.resblocks.0.attn.k_proj.weight", "head.weight"])
def test_unknown_weights_are_named(published, name):
    with pytest.raises(ValueError, match=f"{name} is no weight"):
        convert_open_clip(published.weights() | {name: published.weights()["logit_scale"]})


def test_missing_weights_are_named(published, config, tmp_path):
    weights = published.weights()
    del weights["ln_final.bias"]
    with pytest.raises(ValueError, match=r"1 names are missing or unknown, \['text_model.final_layer_norm.bias'\]"):
        save_hpsv2(weights, tmp_path, config)
