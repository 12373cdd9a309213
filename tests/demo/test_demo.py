"""`trl_spatial demo` and the tiny backbone that is shipped for it."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from trl_spatial.gaussian_reward.processing import load_processor
from trl_spatial.scenes import make_preference_dataset
from trl_spatial.scripts.demo import TINY_BACKBONE, DemoArguments, main, measure


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of the command: its arguments, and the process that has ended."""
    folder = tmp_path_factory.mktemp("demo")
    arguments = DemoArguments(output_dir=str(folder), num_train_pairs=8, num_test_pairs=40, max_steps=1)
    options = [f"--{name}={value}" for name, value in asdict(arguments).items()]
    process = subprocess.run(
        [sys.executable, "-m", "trl_spatial", "demo", *options], check=True, capture_output=True, text=True
    )
    return arguments, process


@pytest.fixture
def demo(finished):
    """The folder of that run, and its arguments."""
    arguments, _ = finished
    return Path(arguments.output_dir), arguments


class RuleScorer:
    """The exact judge in the place of the model."""

    def score(self, prompts, images, batch_size):
        from trl_spatial.scenes import check_scene, parse_description

        pairs = zip(prompts, images, strict=True)
        correct = [check_scene(image, parse_description(prompt)).is_correct for prompt, image in pairs]
        return np.array(correct, float) * 20, np.full(len(correct), 0.01)


def test_it_writes_numbers_pictures_and_a_model(demo):
    folder, _ = demo
    results = json.loads((folder / "results.json").read_text())
    assert results["accuracy"]["all"]["all"]["num_pairs"] == 40
    assert set(results["accuracy"]["level"]) <= {"1", "2", "3"}
    for name in ("best", "worst"):
        colors = np.asarray(Image.open(folder / f"{name}_pairs.png")).reshape(-1, 3)
        assert len(np.unique(colors, axis=0)) > 100
    assert (folder / "reward" / "adapter_model.safetensors").exists()
    assert "| changes: 1 |" in (folder / "results.md").read_text()


def test_it_shows_results_and_progress_but_no_warnings(finished):
    _, process = finished
    assert "| changes: 1 |" in process.stdout and "Written to" in process.stdout
    assert "100%" in process.stderr
    assert not re.findall(r"^.*(?:warn|fail|deprecated|differ).*$", process.stderr, flags=re.MULTILINE | re.IGNORECASE)


def test_started_again_it_goes_on_and_gives_the_same_numbers(demo):
    folder, arguments = demo
    before = json.loads((folder / "results.json").read_text())
    model = (folder / "reward" / "adapter_model.safetensors").stat().st_mtime_ns
    main(arguments)
    after = json.loads((folder / "results.json").read_text())
    assert (folder / "reward" / "adapter_model.safetensors").stat().st_mtime_ns == model
    assert {**before, "seconds": 0} == {**after, "seconds": 0}


def test_other_arguments_are_refused_in_the_same_folder(demo):
    folder, _ = demo
    with pytest.raises(ValueError, match=r"num_test_pairs.*40, 41"):
        main(DemoArguments(output_dir=str(folder), num_train_pairs=8, num_test_pairs=41, max_steps=1))
    with pytest.raises(ValueError, match="`max_steps` is 0"):
        DemoArguments(max_steps=0)


def test_a_perfect_judge_gets_perfect_numbers():
    results, _ = measure(RuleScorer(), make_preference_dataset(40, split="test", seed=2))
    assert results["accuracy"]["all"]["all"]["estimate"] == 1
    assert results["expected_calibration_error"] < 1e-6
    assert results["flip_test"]["same_order"]["estimate"] == results["flip_test"]["accuracy"]["estimate"] == 1


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
