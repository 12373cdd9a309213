"""Several machines, here of two processes each on loopback: what they have to share is checked, what they load is loaded once."""

import json
import os
import shlex
from contextlib import ExitStack

import pytest

from tests.launching import ENVIRONMENT, REPOSITORY, run_processes
from tests.ports import free_port
from tests.warm import Program
from trl_spatial.training.machines import check_shared_folder, download_on_each_machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What four processes on two machines left. Treat it as read-only."""
    path = tmp_path_factory.mktemp("machines")
    (path / "file").touch()
    run_processes([REPOSITORY / "tests" / "training" / "machines_worker.py", path], num_processes=4, num_machines=2)
    return path


@pytest.fixture(scope="module")
def records(folder):
    return [json.loads((folder / f"record_{rank}.json").read_text()) for rank in range(4)]


def test_a_shared_folder_is_seen_and_left_as_it_was(folder, records):
    assert [record["shared"] for record in records] == [None] * 4
    assert list((folder / "shared" / "run").iterdir()) == []


def test_all_processes_name_those_that_do_not_see_the_folder(folder, records):
    for record in records:
        assert "process 2 on" in record["own"] and "process 3 on" in record["own"] and "process 1" not in record["own"]
        assert "a disk that all machines share" in record["own"] and "cannot write" not in record["own"]
    assert list((folder / "disk_0").iterdir()) == []


def test_all_processes_are_told_that_the_folder_cannot_be_written_to(records):
    assert all("cannot be written to" in record["not a folder"] for record in records)


def test_all_processes_name_the_one_that_cannot_write_to_the_folder(folder, records):
    """It may open no further file: for root, no folder is read-only."""
    for record in records:
        assert "process 3 on" in record["read-only"] and "cannot write there" in record["read-only"]
        assert "process 2 on" not in record["read-only"]
    assert list((folder / "read-only").iterdir()) == []


def test_a_process_that_the_others_wait_for_does_not_look_like_a_hang(folder, records):
    notices = [text for record in records[:2] for text in record["notices"]]
    assert (folder / "noticed").exists() and records[2]["notices"] == records[3]["notices"] == []
    assert all(text.startswith("Waiting for the other processes (Rewarding images), for ") for text in notices)
    assert notices and "`ddp_timeout`" in notices[0]


def test_one_process_of_each_machine_downloads_and_the_others_wait(folder, records):
    assert sorted((folder / "downloads").read_text().splitlines()) == ["0 0", "1 0"]
    assert all(record["was downloaded"] for record in records)


def test_a_download_that_fails_holds_nobody_up(records):
    assert [record["failed download"] for record in records] == ["no network", None] * 2


def test_a_process_alone_checks_and_downloads_nothing(tmp_path):
    check_shared_folder(tmp_path / "run")
    download_on_each_machine(lambda: pytest.fail("nobody waits for it"))
    assert not list(tmp_path.iterdir())


def test_the_command_trains_on_two_machines(tmp_path, flux_folder):
    """Each machine has a launcher of its own, as in recipes/README.md."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\nthe cat\na dog\n")
    port = free_port()
    line = (
        f"grpo --dataset prompts.txt --rewards rules_of:length --model_name_or_path {flux_folder} --num_generations 4 --top_k 1 "
        "--per_device_train_batch_size 2 --gradient_accumulation_steps 1 --lora_r 2 --num_inference_steps 3 --height 32 "
        "--width 32 --max_sequence_length 192 --max_steps 1 --save_steps 1 --use_cpu --disable_tqdm true --report_to none "
        f"--output_dir run --mixed_precision no --num_machines 2 --num_processes 2 --main_process_ip 127.0.0.1 "
        f"--main_process_port {port} --accelerate_config {REPOSITORY}/recipes/accelerate/multi_gpu.yaml"
    )
    (tmp_path / "rules_of.py").write_text("def length(prompts, images, **columns):\n    return range(len(images))\n")
    words = ["-m", "trl_spatial", *shlex.split(line), "--machine_rank"]
    with ExitStack() as stack:
        machines = [
            stack.enter_context(Program([*words, rank], cwd=tmp_path, env={**os.environ, **ENVIRONMENT}))
            for rank in (0, 1)
        ]
        for machine in machines:
            ended = machine.wait()
            assert ended.returncode == 0, ended.stdout + ended.stderr
    state = json.loads((tmp_path / "run" / "checkpoint-1" / "trainer_state.json").read_text())
    (entry,) = [entry for entry in state["log_history"] if "loss" in entry]
    assert entry["num_images"] == 2 * 4  # a prompt on each machine
    assert len(list((tmp_path / "run" / "checkpoint-1").glob("buffer_*"))) == 2
