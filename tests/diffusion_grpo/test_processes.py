"""
Training of two processes is that of one with the same global batch; it resumes, and ends when one of them is gone.

What two processes add up is added in another order: a gradient differs by rounding, and so does all that follows from it.
The first rollout, and all noise, prompts and windows, are the same to the last bit.
"""

import json
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.diffusion_grpo.test_resume import assert_same_checkpoint
from tests.diffusion_grpo.worker import PROMPTS, run
from tests.hub_stub import HubStub
from tests.launching import REPOSITORY, Launched
from trl_spatial.diffusion_grpo.checkpointing import is_complete, last_complete_checkpoint


WORKER = REPOSITORY / "tests" / "diffusion_grpo" / "worker.py"
# Relative to what training changed, and in levels of a pixel for rewards: about 30 times what was measured.
WEIGHT_TOLERANCE = 1e-3
REWARD_TOLERANCE = 0.05

ONE = dict(gradient_accumulation_steps=4)  # of one process, whose global batch is that of two
WHOLE = dict(max_steps=4, save_steps=1, eval_strategy="steps", eval_steps=2, num_logged_images=3)
QWEN = dict(family="qwen_image", guidance_scale=4.0, max_steps=2, save_steps=2, gradient_checkpointing=False)
MIDDLE = dict(gradient_accumulation_steps=1, steps_per_generation=2, max_steps=4)
RUNS = {
    "whole": dict(**WHOLE, push_to_hub=True, hub_model_id="tester/two"),
    "parts": dict(**WHOLE, stop_at=2),
    "qwen": QWEN,
    "middle": dict(**MIDDLE, save_steps=4),
    "middle_parts": dict(**MIDDLE, save_steps=3, stop_at=3),
    "fails": dict(max_steps=4, save_steps=1, fail=dict(call=3, rank=1, seconds=0)),
    "evaluation_fails": dict(eval_strategy="steps", eval_steps=1, max_steps=2, fail=dict(call=2, rank=0, seconds=0)),
    "few_rows": dict(num_eval_rows=1, eval_strategy="steps", eval_steps=1, max_steps=1, save_strategy="no"),
}


def launch_runs(runs, folder, log, **options):
    words = [WORKER, folder, json.dumps([{"folder": name, **arguments} for name, arguments in runs.items()])]
    return Launched(words, log, **options)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder of the runs of two processes, and the Hub that they pushed to. Treat it as read-only."""
    folder = tmp_path_factory.mktemp("two")
    resumed = {name: {**RUNS[name], "stop_at": None, "resume": True} for name in ("parts", "middle_parts")}
    runs = [*RUNS.items(), *resumed.items()]
    words = [WORKER, folder, json.dumps([{"folder": name, **arguments} for name, arguments in runs])]
    with HubStub() as hub, Launched(words, folder / "log", **hub.environment) as launched:
        code, shown = launched.wait()
        assert code == 0, shown
    return folder, hub, shown


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Folder of the same runs of one process. Treat it as read-only."""
    folder = tmp_path_factory.mktemp("one")
    for name, settings in {"whole": WHOLE, "qwen": QWEN, "few_rows": RUNS["few_rows"]}.items():
        run(folder / name, **settings, **ONE)
    return folder


def record(folder, rank=0):
    return json.loads((folder / f"record_{rank}.json").read_text())


def without_clocks(entry):
    clocks = ("time/", "images_per_second", "train_", "eval_runtime", "eval_s")
    return {name: value for name, value in entry.items() if not name.startswith(clocks)}


def weights(folder, step):
    return load_file(folder / f"checkpoint-{step}" / "trained_weights.safetensors")


def deviation(ours, theirs, start):
    """Largest difference of two trainings, relative to the largest change by training."""
    assert ours.keys() == theirs.keys() and ours
    difference = max((ours[name] - theirs[name]).abs().max() for name in ours)
    return (difference / max((theirs[name] - start[name]).abs().max() for name in ours)).item()


@pytest.mark.parametrize(("name", "first", "last"), [("whole", 1, 4), ("qwen", 2, 2)])
def test_trained_weights_and_logs_are_those_of_one_process(one, two, name, first, last):
    ours, theirs = two[0] / name, one / name
    start = {key: torch.zeros_like(value) for key, value in weights(theirs, last).items()}
    assert deviation(weights(ours, last), weights(theirs, last), start) < WEIGHT_TOLERANCE
    logs, expected = ([without_clocks(entry) for entry in record(folder)["log"]] for folder in (ours, theirs))
    assert len(logs) == len(expected) and "reward" in logs[0]
    for entry, wanted in zip(logs, expected, strict=True):
        assert entry.keys() == wanted.keys()
        for key, value in wanted.items():
            tolerance = REWARD_TOLERANCE if "reward" in key else 1e-5
            assert entry[key] == pytest.approx(value, rel=1e-2, abs=tolerance), key


def test_prompts_and_noise_are_those_of_one_process(one, two):
    """A rollout is 16 images: those of the first prompts on one process, the others on the other."""
    for name in ("whole", "qwen"):
        halves = [record(two[0] / name, rank)["seen"][:8] for rank in (0, 1)]
        seen = record(one / name)["seen"][:16]
        assert halves[0] + halves[1] == seen
        assert len({digest for _, digest in seen}) == 16 and len({prompt for prompt, _ in seen}) == 4


def test_evaluation_is_that_of_one_process(one, two):
    """Also where the rows, here three and one, are not the same number on every process."""
    for name, num_rows in (("whole", 3), ("few_rows", 1)):
        ours, theirs = (
            [without_clocks(entry) for entry in record(folder / name)["log"] if "eval_reward" in entry]
            for folder in (two[0], one)
        )
        assert ours and all(entry == pytest.approx(wanted, abs=REWARD_TOLERANCE) for entry, wanted in zip(ours, theirs, strict=True))
        logs = record(two[0] / name, 1)["log"]
        assert [without_clocks(entry) for entry in logs if "eval_reward" in entry] == ours  # known to all processes
        prompts = [{prompt for prompt, _ in record(two[0] / name, rank)["seen"][8:10]} for rank in (0, 1)]
        assert num_rows == 3 or prompts == [{PROMPTS[0]}, set()]
