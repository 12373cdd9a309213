"""HPSv3 against the published package, on the same weights."""

import json
import math
import shutil

import pytest
from safetensors.torch import load_file, save_file

from recipes.bench.parity import save_qwen2_vl
from tests.evaluation.scorers.published import Published
from trl_spatial.evaluation.scorers import make_scorer
from trl_spatial.evaluation.scorers.hpsv3 import HPSv3, rename_weights


@pytest.fixture(scope="module")
def published():
    return Published("hpsv3")


@pytest.fixture(scope="module")
def folder(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hpsv3")
    save_qwen2_vl(folder)
    save_file(published.weights(), folder / "HPSv3.safetensors")
    return folder


@pytest.fixture(scope="module")
def scorer(folder):
    return make_scorer(f"hpsv3:{folder}", device="cpu")


def test_mean_and_std_are_those_of_the_published_package(published, scorer):
    scores = scorer.score(published.prompts, published.images)
    for score, alone, together in zip(scores, published.scores, published.data["scores_together"], strict=True):
        for mean, log_std in (alone, together):
            assert score.mean == pytest.approx(mean, abs=1e-5)
            assert math.log(score.std) == pytest.approx(log_std, abs=1e-5)


def test_tokens_and_patches_are_those_of_the_published_package(published, scorer):
    inputs = scorer._prepare(published.prompts[:1], published.images[:1])
    assert inputs["input_ids"].shape[1] == published.data["num_tokens"]
    assert inputs["image_grid_thw"][0].tolist() == published.data["grid"]


def test_a_row_does_not_depend_on_its_batch(published, scorer):
    prompts = [published.prompts[0], published.prompts[0] + " on a very long table" * 8]
    together = scorer.score(prompts, published.images[:2])
    alone = [scorer.score([prompt], [image])[0] for prompt, image in zip(prompts, published.images, strict=False)]
    assert [score.mean for score in together] == pytest.approx([score.mean for score in alone], abs=1e-5)


def test_a_prompt_that_names_the_reward_token_is_scored_at_the_end(published, scorer):
    plain, named = (
        scorer.score([text], published.images[:1])[0].mean for text in ("a dog", "a dog <|Reward|>, please")
    )
    assert math.isfinite(named) and named != plain


def test_unknown_weights_are_named(published):
    weights = published.weights() | {"cond_encoder.weight": published.weights()["rm_head.0.bias"]}
    with pytest.raises(ValueError, match=r"cond_encoder\.weight is no weight of such a model"):
        rename_weights(weights, HPSv3.start_names)


@pytest.mark.parametrize("name", ["rm_head.5.weight", "visual.merger.mlp.0.bias", "model.norm.weight"])
def test_missing_weights_are_named(folder, tmp_path, name):
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    weights = load_file(copied / "HPSv3.safetensors")
    del weights[name]
    save_file(weights, copied / "HPSv3.safetensors")
    with pytest.raises(ValueError, match=rf"not those of such a model: \S+{name.partition('.')[2]} are missing"):
        make_scorer(f"hpsv3:{copied}", device="cpu")


def test_other_models_are_refused(folder, tmp_path):
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    (copied / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(ValueError, match=r"is a clip model, not a Qwen2-VL-7B-Instruct"):
        make_scorer(f"hpsv3:{copied}", device="cpu")
