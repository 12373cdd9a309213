"""`trl_spatial demo`, from its first pair to its report."""

import json
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import FluxPipeline
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.warm import run_python
from trl_spatial import SpatialScore
from trl_spatial.demo.generator import TINY_FLUX
from trl_spatial.demo.reward_model import TINY_BACKBONE, measure, score_pairs
from trl_spatial.demo.settings import DemoSettings
from trl_spatial.evaluation.scorers import PairScorer, Score
from trl_spatial.gaussian_reward.losses import preference_probability
from trl_spatial.gaussian_reward.processing import load_processor
from trl_spatial.judges.scenes import check_images
from trl_spatial.scenes import make_preference_dataset, parse_description
from trl_spatial.scripts.demo import main


SIZES = {"num_train_pairs": 8, "num_test_pairs": 40, "reward_steps": 1, "grpo_steps": 2, "num_prompts": 3}


# The command, which is killed as soon as it does anything once a file is there.
KILLED = """
import os, signal, sys
from trl_spatial.cli import main

def kill(event, arguments):
    if event != "os.kill" and os.path.exists(trace):
        os.kill(os.getpid(), signal.SIGKILL)

trace = sys.argv.pop(1)
sys.addaudithook(kill)
main(sys.argv[1:])
"""


def command(folder):
    """Words of the command."""
    options = [f"--{name}={value}" for name, value in (SIZES | {"output_dir": folder}).items()]
    return ["-m", "trl_spatial", "demo", *options]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the command: its folder, what it said on stdout, and on stderr."""
    folder = tmp_path_factory.mktemp("demo")
    ended = subprocess.run([sys.executable, *command(folder)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return folder, ended.stdout, ended.stderr


@pytest.fixture
def folder(finished):
    return finished[0]


@pytest.fixture
def results(folder):
    return json.loads((folder / "results.json").read_text())


def without_times(results):
    """Everything but how long it took."""
    kept = {name: value for name, value in results.items() if name not in ("seconds", "stages", "environment")}
    cost = {name: value for name, value in kept["training"]["cost"].items() if name != "seconds"}
    return kept | {"training": kept["training"] | {"cost": cost}}


class RuleScorer(PairScorer):
    """The exact judge in the place of the model, or its opposite."""

    name = "rules"
    trained_on = "nothing"

    def __init__(self, sign=1):
        self.sign = sign

    def score(self, prompts, images):
        checks = check_images(images, [parse_description(prompt) for prompt in prompts])
        return [Score(20.0 * self.sign * check.is_correct, std=0.01) for check in checks]


class PixelScorer(PairScorer):
    """Mean and standard deviation are functions of the image."""

    name = "pixels"
    trained_on = "nothing"

    def score(self, prompts, images):
        return [Score(float(np.mean(image)), std=float(np.std(image))) for image in images]


def test_it_writes_numbers_pictures_models_and_a_report(folder, results):
    reward_model, generator = results["reward_model"], results["generator"]
    assert reward_model["accuracy"]["all"]["all"]["num_pairs"] == 40
    assert set(reward_model["accuracy"]["level"]) <= {"1", "2", "3"}
    assert sum(bin["num_pairs"] for bin in reward_model["reliability"]) == 40
    assert generator["num_images"] == 12
    assert [row["step"] for row in results["training"]["steps"]] == [1, 2]
    assert [(row["step"], row["num_images"]) for row in results["training"]["evaluations"]] == [
        (0, 12),
        (1, 12),
        (2, 12),
    ]
    assert [stage["name"] for stage in results["stages"]] == ["pairs", "reward", "measure", "before", "grpo", "after"]
    for name in ("best", "worst"):
        colors = np.asarray(Image.open(folder / f"{name}_pairs.png")).reshape(-1, 3)
        assert len(np.unique(colors, axis=0)) > 100
    assert (folder / "reward" / "adapter_model.safetensors").exists()
    text = (folder / "results.md").read_text()
    assert "| changes: 1 |" in text and "| objects present |" in text
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_the_rules_judge_the_images_and_the_reward_model_scores_them(folder, results):
    for when, name in (("before", "base_images"), ("after", "tuned_images")):
        drawn = Dataset.load_from_disk(folder / name)
        judged = results["generator"][when]
        graphs = [parse_description(scene) for scene in drawn["scene"]]
        correct = [check.is_correct for check in check_images(list(drawn["image"]), graphs)]
        assert judged["spatial_accuracy"]["estimate"] == np.mean(correct)
        scorer = SpatialScore.from_pretrained(folder / "reward")
        mean, _ = scorer.score(list(drawn["prompt"]), list(drawn["image"]))
        assert judged["reward"] == pytest.approx(mean.mean(), abs=1e-5)
        shown = [image for example in results["examples"] for image in example[when]]
        assert [image["is_correct"] for image in shown] == correct
        assert all(bool(image["reasons"]) != image["is_correct"] for image in shown)


def test_the_cost_is_what_the_formula_says(results):
    # 8 prompts × 24 images, 2 updates; 6 steps, 2 of them trained on, forward and backward, on half of the images
    cost = results["training"]["cost"]
    assert cost["num_images"] == 2 * 8 * 24
    assert cost["evaluations_per_image"] == 6 + 2 * 2 * 12 / 24
    assert cost["evaluations_per_image_unfiltered"] == 6 + 2 * 2


def test_plain_diffusers_loads_what_it_learned(folder):
    pipeline = FluxPipeline.from_pretrained(TINY_FLUX)
    pipeline.load_lora_weights(folder / "grpo")
    assert pipeline.get_active_adapters()


def test_it_shows_results_and_progress_but_no_warnings(finished):
    _, stdout, stderr = finished
    assert "| changes: 1 |" in stdout and "report.html" in stdout
    assert [line[:3] for line in stdout.splitlines() if re.match(r"\d/6", line)] == [f"{i}/6" for i in range(1, 7)]
    assert "100%" in stderr
    assert not re.findall(r"^.*(?:warn|fail|deprecated|differ).*$", stderr, flags=re.MULTILINE | re.IGNORECASE)


def test_started_again_it_gives_the_same_numbers_at_once(folder, results):
    model = (folder / "reward" / "adapter_model.safetensors").stat().st_mtime_ns
    main(DemoSettings(output_dir=str(folder), **SIZES))
    assert json.loads((folder / "results.json").read_text()) == results | {"seconds": results["seconds"]}
    assert (folder / "reward" / "adapter_model.safetensors").stat().st_mtime_ns == model


@pytest.mark.parametrize("trace", ["reward/run.json", "grpo/checkpoint-1/trainer_state.json"])
def test_killed_it_goes_on_and_gives_the_same_numbers(finished, results, tmp_path, trace):
    done = ["pairs"]  # they are made once
    if trace != "reward/run.json":  # what comes before it is finished
        done += ["reward", "base_images", "images"]
        (tmp_path / "stages").mkdir()
        for stage in ("pairs", "reward", "measure", "before"):
            shutil.copy(finished[0] / "stages" / f"{stage}.json", tmp_path / "stages")
    for name in [*done, "arguments.json"]:
        (tmp_path / name).symlink_to(finished[0] / name)
    ended = run_python(["-c", KILLED, tmp_path / trace, *command(tmp_path)[2:]])
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    if trace == "reward/run.json":  # a checkpoint that was being written
        (tmp_path / "reward" / "checkpoint-9").mkdir()
        (tmp_path / "reward" / "checkpoint-9" / "trainer_state.json").write_text('{"global_step": 9')
        (tmp_path / "reward" / "adapter_model.safetensors").touch()
    main(DemoSettings(output_dir=str(tmp_path), **SIZES))
    assert without_times(json.loads((tmp_path / "results.json").read_text())) == without_times(results)


def test_what_was_lost_is_made_again(finished, results, tmp_path):
    for path in finished[0].iterdir():
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    for file in ("reward/adapter_model.safetensors", "grpo/pytorch_lora_weights.safetensors"):
        (tmp_path / file).unlink()
    main(DemoSettings(output_dir=str(tmp_path), **SIZES))
    assert without_times(json.loads((tmp_path / "results.json").read_text())) == without_times(results)


def test_other_arguments_are_refused_in_the_same_folder(folder):
    with pytest.raises(ValueError, match="num_test_pairs was 40 and is 41"):
        main(DemoSettings(output_dir=str(folder), **(SIZES | {"num_test_pairs": 41})))


def test_a_perfect_judge_gets_perfect_numbers_and_a_wrong_one_none(tmp_path):
    pairs = make_preference_dataset(40, split="test", seed=2)
    for sign in (1, -1):
        results, scores = measure(RuleScorer(sign), pairs, tmp_path / "pairs")
        is_right = float(sign == 1)
        assert {row["estimate"] for group in results["accuracy"].values() for row in group.values()} == {is_right}
        assert results["accuracy"]["all"]["all"]["num_pairs"] == 40
        assert sum(row["num_pairs"] for row in results["accuracy"]["level"].values()) == 40
        assert results["expected_calibration_error"] == pytest.approx(1 - is_right, abs=1e-6)
        assert results["flip_test"]["same_order"]["estimate"] == 1
        assert results["flip_test"]["accuracy"]["estimate"] == is_right
        assert (scores.margin == 20 * sign).all()


def test_every_score_is_that_of_its_image(tmp_path):
    pairs = make_preference_dataset(12, split="test", seed=2)
    scores = score_pairs(PixelScorer(), pairs, tmp_path / "pairs")
    for column in ("chosen", "rejected"):
        pixels = [np.asarray(image.convert("RGB")) for image in pairs[column]]
        assert getattr(scores, f"{column}_mean").tolist() == [float(np.mean(image)) for image in pixels]
        assert getattr(scores, f"{column}_std").tolist() == [float(np.std(image)) for image in pixels]
    model_of_training = preference_probability(
        *(torch.tensor(values) for values in (
            scores.chosen_mean, np.log(scores.chosen_std), scores.rejected_mean, np.log(scores.rejected_std)
        ))
    )  # fmt: skip
    np.testing.assert_allclose(scores.probability, model_of_training.numpy())


def test_a_score_that_is_no_number_ends_the_measurement(tmp_path):
    pairs = make_preference_dataset(3, split="test", seed=2)
    with pytest.raises(ValueError, match=r"3 of 3 pairs have no score: the records in .*pairs say why"):
        measure(RuleScorer(float("nan")), pairs, tmp_path / "pairs")


class TestTinyBackbone:
    def test_it_is_small_safe_and_complete(self):
        files = list(TINY_BACKBONE.iterdir())
        assert sum(file.stat().st_size for file in files) < 3_000_000
        assert not [file for file in files if file.suffix in (".bin", ".pt", ".pkl", ".py")]
        assert (TINY_BACKBONE / "README.md").exists()
        model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY_BACKBONE, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
        assert sum(parameter.numel() for parameter in model.parameters()) < 700_000

    def test_every_word_of_the_world_is_one_token(self):
        tokenizer = load_processor(TINY_BACKBONE).tokenizer
        for row in make_preference_dataset(30, seed=7):
            words = row["prompt"].replace(".", " .").replace(",", " ,").replace("'s", " 's").split()
            assert len(tokenizer.tokenize(row["prompt"])) == len(words)
