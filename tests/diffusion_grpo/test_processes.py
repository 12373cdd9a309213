"""
Training of two processes is that of one with the same global batch; it resumes, and ends when one of them is gone.

What two processes add up is added in another order: a gradient differs by rounding, and so does all that follows from it.
The first rollout, and all noise, prompts and windows, are the same to the last bit.
"""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file

from tests.diffusion_grpo.test_resume import assert_same_checkpoint
from tests.diffusion_grpo.worker import run
from tests.hub_stub import HubStub
from tests.launching import REPOSITORY, Launched, run_processes
from trl_spatial.diffusion_grpo.nft.trainer import OLD_POLICY_WEIGHTS
from trl_spatial.diffusion_grpo.runtime.checkpointing import (
    TRAINED_WEIGHTS,
    check_sharding,
)
from trl_spatial.diffusion_grpo.runtime.processes import check_launch
from trl_spatial.store import is_complete
from trl_spatial.training.run_folder import last_complete_checkpoint


WORKER = REPOSITORY / "tests" / "diffusion_grpo" / "worker.py"
# Weights move by 1e-2 in an update; the first differs by 6e-8. Later a pixel may be rounded to its neighbour, which moves a reward,
# in levels of a pixel, by 1e-4 and the weights by 7e-5.
FIRST_TOLERANCE = 2e-6
WEIGHT_TOLERANCE = 1e-3
REWARD_TOLERANCE = 4e-3

ONE = dict(gradient_accumulation_steps=4)  # of one process, whose global batch is that of two
WHOLE = dict(max_steps=4, save_steps=1, eval_strategy="steps", eval_steps=2)
# Advantages in units of the whole batch's standard deviation: they need the rewards of both processes.
QWEN = dict(family="qwen_image", guidance_scale=4.0, scale_rewards="batch", max_steps=2, save_steps=1)
MIDDLE = dict(gradient_accumulation_steps=1, steps_per_generation=2, max_steps=4)
# Two updates of a rollout, each with all of its images: it can be interrupted between them.
SCOUTS = dict(num_scouts=6, scout_steps=1, num_iterations=2, max_steps=4, save_steps=1)
# The same with another loss, and an old policy beside the weights
NFT = dict(algorithm="nft", **SCOUTS)
# Without KL: a transformer of which all weights are trained has no reference policy.
FULL = dict(is_full=True, beta=0.0, learning_rate=1e-2, **(WHOLE | dict(max_steps=2, save_steps=2, eval_steps=1)))
SHARDED = dict(is_sharded=True)
RUNS = {
    "whole": dict(**WHOLE, push_to_hub=True, hub_model_id="tester/two"),
    "parts": dict(**WHOLE, stop_at=2),
    "qwen": QWEN,
    "middle": dict(**MIDDLE, save_steps=4),
    "middle_parts": dict(**MIDDLE, save_steps=3, stop_at=3),
    "reused": dict(**MIDDLE, save_steps=4, gradient_checkpointing_kwargs={"reuse_activations": True}),
    "scouts": SCOUTS,
    "scouts_parts": dict(**SCOUTS, stop_at=3),
    "nft": NFT,
    "nft_parts": dict(**NFT, stop_at=3),
    "fails": dict(max_steps=4, save_steps=1, fail=dict(call=3, rank=1, seconds=0)),
    "evaluation_fails": dict(eval_strategy="steps", eval_steps=1, max_steps=2, fail=dict(call=2, rank=0, seconds=0)),
    "refused": dict(push_to_hub=True, hub_model_id="another-user/two"),
    "exits": dict(max_steps=1, save_strategy="no", fail=dict(call=1, rank=1, seconds=0, exits=True)),
    "full_disk_0": dict(max_steps=2, save_steps=1, full_disk=dict(rank=0, after="update")),
    "full_disk_1": dict(max_steps=2, save_steps=1, full_disk=dict(rank=1, after="update")),
    # The best checkpoint is known, for which processes wait in the middle of saving the next one
    "full_disk_at_the_best": dict(
        max_steps=2, save_steps=1, eval_strategy="steps", eval_steps=1, full_disk=dict(rank=0, after="evaluation")
    ),
    "full_disk_at_a_grid": dict(
        max_steps=2, save_steps=1, eval_strategy="steps", eval_steps=1, full_disk=dict(rank=0, after="update")
    ),
    "few_rows": dict(num_eval_rows=1, eval_strategy="steps", eval_steps=1, max_steps=1, save_strategy="no"),
    "full": FULL,
    # The last ones, as a process cannot go back
    "sharded": dict(**WHOLE, **SHARDED),
    "sharded_parts": dict(**WHOLE, **SHARDED, stop_at=2),
    "sharded_nft": dict(**NFT, **SHARDED),
    "sharded_full": dict(**FULL, **SHARDED),
    "sharded_few_rows": dict(
        num_eval_rows=1, eval_strategy="steps", eval_steps=1, max_steps=1, save_strategy="no", **SHARDED
    ),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Folder of the runs of two processes, and the Hub that they pushed to. Treat it as read-only."""
    folder = tmp_path_factory.mktemp("two")
    runs = []
    for name, arguments in RUNS.items():
        runs.append((name, arguments))
        if name.endswith("parts"):
            runs.append((name, {**arguments, "stop_at": None, "resume": True}))
    words = [WORKER, folder, json.dumps([{"folder": name, **arguments} for name, arguments in runs])]
    with HubStub() as hub:
        run_processes(words, **hub.environment)
    return folder, hub


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Folder of the same runs of one process. Treat it as read-only."""
    folder = tmp_path_factory.mktemp("one")
    runs = {"whole": WHOLE, "qwen": QWEN, "scouts": SCOUTS, "nft": NFT, "few_rows": RUNS["few_rows"]}
    for name, settings in runs.items():
        run(folder / name, **settings, **ONE)
    return folder


def record(folder, rank=0):
    return json.loads((folder / f"record_{rank}.json").read_text())


def without_clocks(entry):
    clocks = ("time/", "images_per_second", "train_", "eval_runtime", "eval_s")
    return {name: value for name, value in entry.items() if not name.startswith(clocks)}


def weights(folder, step):
    return load_file(folder / f"checkpoint-{step}" / "trained_weights.safetensors")


def rewards_of_evaluation(folder, rank=0):
    return [without_clocks(entry) for entry in record(folder, rank)["log"] if "eval_reward" in entry]


@pytest.mark.parametrize(
    ("name", "step"),
    [
        *(("whole", 1), ("whole", 4), ("qwen", 1), ("qwen", 2)),
        *(("scouts", 1), ("scouts", 4), ("nft", 1), ("nft", 4)),
    ],
)
def test_trained_weights_are_those_of_one_process(one, two, name, step):
    for file in (TRAINED_WEIGHTS, *([OLD_POLICY_WEIGHTS] if name == "nft" else [])):
        ours, theirs = (load_file(folder / name / f"checkpoint-{step}" / file) for folder in (two[0], one))
        assert ours.keys() == theirs.keys() and ours
        for key, weight in theirs.items():
            tolerance = FIRST_TOLERANCE if step == 1 else WEIGHT_TOLERANCE
            torch.testing.assert_close(ours[key], weight, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["whole", "qwen", "scouts", "nft"])
def test_logs_are_those_of_one_process(one, two, name):
    logs, expected = ([without_clocks(entry) for entry in record(folder / name)["log"]] for folder in (two[0], one))
    own = {"old_policy_distance"} if name == "nft" else {"ratio/mean", "clip_ratio/high"}
    assert {"reward", "kl", "num_images", *own} <= logs[0].keys()
    for entry, wanted in zip(logs, expected, strict=True):
        assert entry.keys() == wanted.keys()
        for key, value in wanted.items():
            tolerance = REWARD_TOLERANCE if "reward" in key else 1e-7
            assert entry[key] == pytest.approx(value, rel=1e-3, abs=tolerance), key


def test_prompts_and_noise_are_those_of_one_process(one, two):
    """A rollout is 16 images: those of the first prompts on one process, the others on the other."""
    for name in ("whole", "qwen"):
        halves = [record(two[0] / name, rank)["seen"][:8] for rank in (0, 1)]
        seen = record(one / name)["seen"][:16]
        assert halves[0] + halves[1] == seen
        assert len({digest for _, digest in seen}) == 16 and len({prompt for prompt, _ in seen}) == 4


@pytest.mark.parametrize("name", ["scouts", "nft"])
def test_scouts_and_the_images_they_choose_are_those_of_one_process(one, two, name):
    """24 scouts of four prompts, then 8 images: each process has those of its prompts."""
    halves = [record(two[0] / name, rank)["seen"][:16] for rank in (0, 1)]
    seen = record(one / name)["seen"][:32]
    assert halves[0][:12] + halves[1][:12] == seen[:24]
    assert halves[0][12:] + halves[1][12:] == seen[24:]
    assert len({digest for _, digest in seen}) == 32


@pytest.mark.parametrize("name", ["whole", "few_rows"])
def test_evaluation_is_that_of_one_process(one, two, name):
    """Of three rows and of one, which two processes do not share evenly."""
    ours, theirs = rewards_of_evaluation(two[0] / name), rewards_of_evaluation(one / name)
    assert ours == rewards_of_evaluation(two[0] / name, rank=1)  # both processes know it
    for entry, wanted in zip(ours, theirs, strict=True):
        assert entry == pytest.approx(wanted, abs=REWARD_TOLERANCE)


def test_files_are_written_once(one, two):
    """Two processes leave the files of one, and what each has to remember; the grids are the same pictures."""
    folder, hub = two
    ours, theirs = (
        {str(path.relative_to(root)) for path in root.rglob("*.*")} for root in (folder / "whole", one / "whole")
    )
    assert {name for name in theirs - ours if "rng_state" not in name} == set()
    assert {Path(name).name for name in ours - theirs} == {
        "buffer_1.safetensors", "rng_state_0.pth", "rng_state_1.pth", "record_1.json",
    }  # fmt: skip
    grid = "images/rollout_000000.png"
    assert (folder / "whole" / grid).read_bytes() == (one / "whole" / grid).read_bytes()
    assert all(is_complete(folder / "whole" / f"checkpoint-{step}") for step in (1, 2, 3, 4))
    assert hub.commits["tester/two"].count("End of training") == 1
    titles = [title for title in hub.commits["tester/two"] if title.startswith("Training in progress")]
    assert titles and len(set(titles)) == len(titles)


@pytest.mark.parametrize(
    ("whole", "parts"),
    [
        ("whole", "parts"),
        ("middle", "middle_parts"),
        ("scouts", "scouts_parts"),
        ("nft", "nft_parts"),
        ("sharded", "sharded_parts"),
    ],
)
def test_two_processes_resume_bit_for_bit(two, whole, parts):
    """Between two rollouts, and in the middle of one."""
    folder = two[0]
    assert_same_checkpoint(folder / parts / "checkpoint-4", folder / whole / "checkpoint-4")


def test_two_processes_that_reuse_activations_train_the_same(two):
    """The gradients of reused blocks are exchanged with all others."""
    ours, theirs = (load_file(two[0] / name / "checkpoint-4" / TRAINED_WEIGHTS) for name in ("reused", "middle"))
    assert ours.keys() == theirs.keys()
    for key, weight in theirs.items():
        assert torch.equal(ours[key], weight), key


def test_another_number_of_processes_resumes_between_rollouts(one, two, tmp_path):
    """With the same global batch the training goes on as the one of two processes."""
    shutil.copytree(two[0] / "whole" / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    run(tmp_path / "run", resume=True, **WHOLE, **ONE)
    assert record(tmp_path / "run")["error"] is None
    ours, theirs = (load_file(path / "checkpoint-4" / TRAINED_WEIGHTS) for path in (tmp_path / "run", one / "whole"))
    for key, weight in theirs.items():
        torch.testing.assert_close(ours[key], weight, rtol=0, atol=WEIGHT_TOLERANCE)
    counts = [
        {key: value for key, value in record(folder)["log"][-3].items() if key.startswith("num_")}
        for folder in (tmp_path / "run", one / "whole")
    ]
    assert counts[0] == counts[1] and counts[0]["num_images"] == 4 * 16


def test_another_number_of_processes_in_the_middle_of_a_rollout_is_an_error(two, tmp_path):
    shutil.copytree(two[0] / "middle_parts" / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    run(tmp_path / "run", resume=True, **MIDDLE)
    assert "middle of a rollout of 2 processes" in record(tmp_path / "run")["error"]


@pytest.mark.parametrize(
    ("name", "doing", "rank"), [("fails", "Rewarding images", 1), ("evaluation_fails", "Evaluating", 0)]
)
def test_a_failure_of_one_process_is_told_by_all(two, name, doing, rank):
    folder = two[0] / name
    reason = "ConnectionError: the judge does not answer"
    assert record(folder, rank)["error"] == reason
    note = "The reward function `redness` raised this error"
    assert f"{doing} failed on process {rank} ({reason}. {note})." in record(folder, 1 - rank)["error"]


def test_a_repository_that_is_refused_is_told_by_all(two):
    own, told = (record(two[0] / "refused", rank)["error"] for rank in (0, 1))
    assert "another-user/two" in own and own.rstrip(".") in told
    assert told.startswith("RuntimeError: Creating the repository on the Hub failed on process 0 (")


def test_a_reward_that_ends_the_program_is_named_by_all(two):
    folder = two[0] / "exits"
    reason = "RuntimeError: Your code raised SystemExit()"
    assert record(folder, 1)["error"].startswith(reason)
    told = record(folder, 0)["error"]
    assert told.startswith(f"RuntimeError: Rewarding images failed on process 1 ({reason}")
    assert "The reward function `redness` raised this error" in told


@pytest.mark.parametrize(
    ("name", "doing", "rank"),
    [
        ("full_disk_0", "Saving the weights", 0),
        ("full_disk_1", "Saving a checkpoint", 1),
        ("full_disk_at_the_best", "Saving the weights", 0),
        ("full_disk_at_a_grid", "Saving a grid of images", 0),
    ],
)
def test_a_full_disk_of_one_process_is_told_by_all(two, name, doing, rank):
    folder = two[0] / name
    own, told = record(folder, rank)["error"], record(folder, 1 - rank)["error"]
    place = folder / ("images" if "grid" in name else "checkpoint-1")
    assert own.startswith(f"OSError: Saving to {place} failed: ") and f"{doing} failed on process {rank} (" in told
    if rank == 0:  # PyTorch's words for it, in which process 1 writes first, are others
        assert "File too large" in own and "File too large" in told
    assert str(place) in told and own.count("The last complete checkpoint is none.") == 1
    assert last_complete_checkpoint(folder) is None


def test_a_killed_process_ends_the_run_which_is_resumed(two, one, tmp_path):
    """The third rollout never comes: one process is killed in it, when the second checkpoint is whole."""
    runs = [dict(folder="run", **WHOLE, fail=dict(call=4, rank=1, seconds=600))]
    with Launched([WORKER, tmp_path, json.dumps(runs)], tmp_path / "log") as launched:
        deadline = time.monotonic() + 600
        while not is_complete(tmp_path / "run" / "checkpoint-2"):
            assert launched.process.poll() is None and time.monotonic() < deadline, launched.log.read_text()
            time.sleep(0.2)
        workers = launched.workers()
        workers[1].kill()
        code, shown = launched.wait()  # long before the others would give up waiting for it by themselves
        assert code != 0 and not any(worker.is_running() for worker in workers.values())
    assert "Signal 9 (SIGKILL) received by PID" in shown
    assert last_complete_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-2")

    run(tmp_path / "run", resume=True, **WHOLE, **ONE)
    assert record(tmp_path / "run")["error"] is None
    ours, theirs = (load_file(path / "checkpoint-4" / TRAINED_WEIGHTS) for path in (tmp_path / "run", one / "whole"))
    for key, weight in theirs.items():
        torch.testing.assert_close(ours[key], weight, rtol=0, atol=WEIGHT_TOLERANCE)


class TestSharded:
    """Sharded weights (FSDP2) learn what whole ones do, up to the rounding of sums."""

    @pytest.mark.parametrize(
        ("name", "step"), [("whole", 1), ("whole", 4), ("nft", 4), ("full", 2)], ids=lambda value: str(value)
    )
    def test_what_is_saved_is_that_of_whole_weights(self, two, name, step):
        """Trained weights, their average and what is exported, of LoRA and of the whole transformer."""
        theirs = two[0] / name / f"checkpoint-{step}"
        ours = two[0] / {"whole": "sharded", "nft": "sharded_nft", "full": "sharded_full"}[name] / f"checkpoint-{step}"
        files = sorted(path.relative_to(theirs) for path in theirs.rglob("*.safetensors") if "buffer" not in path.name)
        is_full = name == "full"
        exported = "transformer/diffusion_pytorch_model" if is_full else "pytorch_lora_weights"
        assert Path(f"{exported}.safetensors") in files and len(files) == (4 if name == "nft" else 3)
        for file in files:
            saved, expected = load_file(ours / file), load_file(theirs / file)
            assert saved.keys() == expected.keys()
            for key, weight in expected.items():
                assert saved[key].dtype == weight.dtype
                torch.testing.assert_close(
                    saved[key], weight, rtol=0, atol=FIRST_TOLERANCE if step == 1 else WEIGHT_TOLERANCE
                )

    def test_diffusers_loads_a_whole_transformer(self, two):
        theirs, ours = (
            FluxTransformer2DModel.from_pretrained(two[0] / name, subfolder="transformer")
            for name in ("full", "sharded_full")
        )
        assert {**ours.config, "_name_or_path": ""} == {**theirs.config, "_name_or_path": ""}
        assert ours.state_dict().keys() == theirs.state_dict().keys()

    @pytest.mark.parametrize(
        ("name", "whole"), [("sharded", "whole"), ("sharded_full", "full"), ("sharded_few_rows", "few_rows")]
    )
    def test_evaluation_is_that_of_whole_weights(self, two, name, whole):
        """Also of a single row, which leaves one process nothing to draw but a part in each pass."""
        ours, theirs = rewards_of_evaluation(two[0] / name), rewards_of_evaluation(two[0] / whole)
        assert ours == rewards_of_evaluation(two[0] / name, rank=1) and ours
        for entry, wanted in zip(ours, theirs, strict=True):
            assert entry == pytest.approx(wanted, abs=REWARD_TOLERANCE)

    @pytest.mark.parametrize(("name", "is_sharded"), [("sharded", False), ("whole", True)])
    def test_a_checkpoint_of_the_other_way_is_an_error(self, two, name, is_sharded):
        """Its optimizer state is in another form, which would be left aside."""
        folder = two[0] / name / "checkpoint-2"
        with pytest.raises(ValueError, match=f"saved with {'whole' if is_sharded else 'sharded'}.* weights, and now"):
            check_sharding(folder, is_sharded=is_sharded)
        check_sharding(folder, is_sharded=not is_sharded)

    def test_checkpoints_leave_the_frozen_weights_out(self, two):
        folder = two[0] / "sharded" / "checkpoint-4"
        names = {path.name for path in folder.iterdir()}
        assert names - {path.name for path in (two[0] / "whole" / "checkpoint-4").iterdir()} == {"optimizer.bin"}
        trained = (folder / TRAINED_WEIGHTS).stat().st_size
        assert (folder / "optimizer.bin").stat().st_size < 5 * trained  # two numbers per trained weight, and names


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("ACCELERATE_USE_FSDP", r"FSDP of version 1.*fsdp_version: 2"),
        ("ACCELERATE_USE_DEEPSPEED", r"asks for DeepSpeed.*fsdp2\.yaml.*multi_gpu\.yaml"),
    ],
)
def test_other_ways_to_share_out_are_refused_in_words(variable, message, monkeypatch):
    """What `accelerate launch` sets for them."""
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=message):
        check_launch()
