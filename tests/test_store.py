"""What is on the disk after an interruption at any moment."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trl_spatial.demo.settings import DemoSettings
from trl_spatial.store import ContentStore, Stages, read_record, write_atomically, write_record


TITLES = {"dig": "Digging a hole", "fill": "Filling it again"}
ARGUMENTS = {"seed": 0, "depth": 2}
# Writes contents of one letter each, as fast as it can.
WRITER = """
import sys
from pathlib import Path
from trl_spatial.store import ContentStore, Stages, write_atomically
folder = Path(sys.argv[1])
print("ready", flush=True)
for number in range(10**6):
    letter = chr(97 + number % 26).encode()
    write_atomically(folder / "file", letter * 8_000_000)
    ContentStore(folder / "store").put(letter * 50_000, ".txt")
    stages = Stages(folder / "job", {str(number): ""}, {"seed": 0})
    stages.run(str(number), lambda: [number] * 1000)
"""


def make_stages(folder):
    return Stages(folder, TITLES, ARGUMENTS)


class TestFiles:
    def test_killed_at_any_moment_every_file_is_whole(self, tmp_path):
        rng = random.Random(0)
        for number in range(8):
            process = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE)
            process.stdout.readline()
            while number == 7 and not any((tmp_path / "store").glob("[!.]*")):  # on a slow machine
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            if (tmp_path / "file").exists():
                content = (tmp_path / "file").read_bytes()
                assert len(content) == 8_000_000 and len(set(content)) == 1
            store = ContentStore(tmp_path / "store")
            for file in store.folder.glob("[!.]*"):
                assert len(store.get(file.name)) == 50_000
            for file in (tmp_path / "job" / "stages").glob("[!.]*"):
                assert json.loads(file.read_text())["result"] == [int(file.stem)] * 1000
        assert any((tmp_path / "store").glob("[!.]*"))

    def test_two_may_write_a_file_at_one_time(self, tmp_path, monkeypatch):
        """Also processes of the same number, in two containers: the second one writes before the first one's file has its name."""
        replace = Path.replace

        def be_overtaken(self, target):
            monkeypatch.undo()
            write_atomically(target, "second")
            replace(self, target)

        monkeypatch.setattr(Path, "replace", be_overtaken)
        write_atomically(tmp_path / "file", "first")
        assert (tmp_path / "file").read_text() == "first" and len(list(tmp_path.iterdir())) == 1

    def test_a_full_disk_leaves_the_old_file(self, tmp_path):
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
        if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("a small file system can be mounted by root only")
        try:
            write_atomically(disk / "file", "old")
            with pytest.raises(OSError, match="No space left"):
                write_atomically(disk / "file", b"new" * 100_000)
            assert [path.name for path in disk.iterdir()] == ["file"] and (disk / "file").read_text() == "old"
            with pytest.raises(OSError, match="No space left"):
                ContentStore(disk).put(b"new" * 100_000)
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    def test_an_error_leaves_the_old_file(self, tmp_path):
        write_record(tmp_path / "file", {"old": 1})
        with pytest.raises(TypeError):
            write_record(tmp_path / "file", {"new": object()})
        assert read_record(tmp_path / "file") == {"old": 1} and len(list(tmp_path.iterdir())) == 1

    @pytest.mark.parametrize("content", [b"", b'{"result": [1', b"[1]", b"\xff{}", b"null", b"[" * 99_999])
    def test_a_damaged_record_is_none(self, tmp_path, content, capsys):
        (tmp_path / "record.json").write_bytes(content)
        assert read_record(tmp_path / "record.json") == {} == read_record(tmp_path / "missing.json")
        (line,) = capsys.readouterr().err.splitlines()
        assert "record.json" in line

    def test_content_is_stored_once_and_checked(self, tmp_path):
        store = ContentStore(tmp_path)
        name = store.put(b"one", ".txt")
        written = (tmp_path / name).stat().st_mtime_ns
        assert store.put(b"one", ".txt") == name != store.put(b"two", ".txt")
        assert (tmp_path / name).stat().st_mtime_ns == written and store.get(name) == b"one"
        (tmp_path / name).write_bytes(b"0ne")
        with pytest.raises(ValueError, match=rf"{name} has changed"):
            store.get(name)
        assert store.put(b"one", ".txt") == name and store.get(name) == b"one"


class TestStages:
    def test_a_finished_stage_is_not_run_again(self, tmp_path, capsys):
        calls = []
        for _ in range(2):
            result = make_stages(tmp_path).run("dig", lambda: calls.append(1) or {"depth": (1, 2)})
            assert result == {"depth": [1, 2]}  # as JSON gives it back, the first time too
        assert calls == [1]
        shown = capsys.readouterr().out
        assert "1/2  Digging a hole\n" in shown and "1/2  Digging a hole: already done" in shown

    def test_a_stage_that_returned_nothing_is_finished_too(self, tmp_path):
        calls = []
        for _ in range(2):
            assert make_stages(tmp_path).run("dig", lambda: calls.append(1)) is None
        assert calls == [1]

    @pytest.mark.parametrize("damage", ["record", "output"])
    def test_a_stage_without_its_record_or_output_is_run_again_and_so_are_the_later_ones(self, tmp_path, damage):
        calls = []
        hole = tmp_path / "hole.txt"
        files = {"record": tmp_path / "stages" / "dig.json", "output": hole}
        for number in range(3):
            stages = make_stages(tmp_path)
            stages.run("dig", lambda: calls.append("dig") or hole.write_text("deep"), outputs=[hole])
            stages.run("fill", lambda: calls.append("fill"))
            if number == 0:
                files[damage].write_text('{"result": 4, "sec') if damage == "record" else hole.unlink()
        assert calls == ["dig", "fill"] * 2

    @pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
    def test_an_interrupted_stage_is_run_again_and_its_time_counts(self, tmp_path, interruption):
        def stop():
            time.sleep(0.05)
            raise interruption

        with pytest.raises(interruption):
            make_stages(tmp_path).run("fill", stop)
        stages = make_stages(tmp_path)
        assert stages.run("fill", lambda: time.sleep(0.06) or 7) == 7
        (record,) = stages.times()
        assert record["name"] == "fill" and record["title"] == "Filling it again"
        assert record["seconds"] >= 0.1

    def test_a_result_that_is_no_json_leaves_the_stage_unfinished(self, tmp_path):
        stages = make_stages(tmp_path)
        with pytest.raises(TypeError):
            stages.run("dig", lambda: object())
        assert stages.run("dig", lambda: 3) == 3

    def test_a_folder_belongs_to_one_run(self, tmp_path):
        make_stages(tmp_path / "job")
        with pytest.raises(ValueError, match=r"job holds a run with other arguments: depth was 2 and is 3"):
            Stages(tmp_path / "job", TITLES, ARGUMENTS | {"depth": 3})
        (tmp_path / "job" / "arguments.json").write_text("{")
        for folder in (tmp_path / "job", tmp_path):  # whose run it is cannot be read; other files
            with pytest.raises(ValueError, match="is not empty and holds no run"):
                Stages(folder, TITLES, ARGUMENTS) if folder == tmp_path else make_stages(folder)

    def test_a_second_process_is_refused_until_the_first_ends(self, tmp_path):
        program = (
            "import sys, pathlib; from trl_spatial.store import Stages\n"
            f"stages = Stages(pathlib.Path(sys.argv[1]), {TITLES}, {ARGUMENTS}); print('has it', flush=True); sys.stdin.read()"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "has it\n"
        with pytest.raises(ValueError, match=r"Another process .* is running in"):
            make_stages(tmp_path)
        process.kill()
        process.communicate()
        make_stages(tmp_path)


class TestSettings:
    def test_quick_is_smaller_where_nothing_is_said(self):
        full, quick = DemoSettings(), DemoSettings(quick=True, grpo_steps=7)
        for name in ("num_train_pairs", "num_test_pairs", "reward_steps", "grpo_steps", "num_prompts"):
            assert getattr(quick, name) < getattr(full, name)
        assert quick.grpo_steps == 7

    @pytest.mark.parametrize(
        "name", ["num_train_pairs", "num_test_pairs", "reward_steps", "grpo_steps", "num_prompts"]
    )
    def test_numbers_are_positive(self, name):
        with pytest.raises(ValueError, match=f"`{name}` is 0"):
            DemoSettings(**{name: 0})

    def test_a_negative_seed_is_named(self):
        with pytest.raises(ValueError, match="`seed` is -1"):
            DemoSettings(seed=-1)
