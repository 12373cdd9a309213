"""
Training of two processes is that of one with the same global batch, up to the order in which gradients are added; it resumes
bit for bit.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.diffusion_grpo.test_resume import assert_equal
from tests.gaussian_reward.worker import run
from tests.launching import REPOSITORY, run_processes


WORKER = REPOSITORY / "tests" / "gaussian_reward" / "worker.py"
WEIGHTS = "adapter_model.safetensors"
TOLERANCE = 1e-6  # measured: 0
# Noise in the model and in the loss: each process draws it on its own, which resuming has to restore.
NOISY = dict(estimator="monte_carlo", num_samples=10, disable_dropout=False)


@pytest.fixture(scope="module")
def two(backbone_folder, tmp_path_factory):
    """Folder of the runs of two processes. Treat it as read-only."""
    folder = tmp_path_factory.mktemp("two")
    runs = [
        dict(folder="exact"),
        dict(folder="whole", **NOISY),
        dict(folder="parts", stop_at=2, **NOISY),
        dict(folder="parts", resume=True, **NOISY),
    ]
    run_processes([WORKER, folder, backbone_folder, json.dumps(runs)])
    return folder


@pytest.fixture(scope="module")
def one(backbone_folder, tmp_path_factory):
    """Folder of the run of one process. Treat it as read-only."""
    folder = tmp_path_factory.mktemp("one")
    run(folder / "exact", backbone_folder, gradient_accumulation_steps=2)
    return folder


def logs_of(folder):
    history = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    # the clock, and extremes, which are of the batches that are scored at once
    left_out = ("runtime", "second", "min_reward", "max_reward")
    return [{key: value for key, value in entry.items() if not key.endswith(left_out)} for entry in history]


def test_trained_weights_are_those_of_one_process(one, two):
    ours, theirs = (load_file(folder / "exact" / WEIGHTS) for folder in (two, one))
    assert ours.keys() == theirs.keys() and ours
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=TOLERANCE)


def test_logs_and_evaluation_are_those_of_one_process(one, two):
    """Seven pairs are evaluated by batches of four: the pair that fills up the last batch does not count."""
    logs, expected = logs_of(two / "exact"), logs_of(one / "exact")
    assert "accuracy" in logs[0] and "eval_margin" in logs[2]
    for entry, wanted in zip(logs, expected, strict=True):
        assert entry == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_files_are_written_once(one, two):
    ours, theirs = (
        {str(path.relative_to(folder / "exact")) for path in (folder / "exact").rglob("*.*")} for folder in (two, one)
    )
    assert {name.rpartition("/")[2] for name in ours ^ theirs} == {
        "rng_state.pth",
        "rng_state_0.pth",
        "rng_state_1.pth",
    }


def test_two_processes_resume_bit_for_bit(two):
    whole, parts = (two / name / "checkpoint-4" for name in ("whole", "parts"))
    assert (whole / WEIGHTS).read_bytes() == (parts / WEIGHTS).read_bytes()
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"):
        assert_equal(*(torch.load(folder / name, weights_only=False) for folder in (parts, whole)), name)
