"""A job of several stages that is interrupted."""

import json
import time

import pytest

from trl_spatial.demo.settings import DemoSettings
from trl_spatial.store import Stages


TITLES = {"dig": "Digging a hole", "fill": "Filling it again"}


def test_a_finished_stage_is_not_run_again(tmp_path, capsys):
    calls = []
    for _ in range(2):
        result = Stages(tmp_path, TITLES).run("dig", lambda: calls.append(1) or {"depth": (1, 2)})
        assert result == {"depth": [1, 2]}  # as JSON gives it back, the first time too
    assert calls == [1]
    shown = capsys.readouterr().out
    assert "1/2  Digging a hole\n" in shown and "1/2  Digging a hole: done before" in shown


def test_a_stage_that_returned_nothing_is_finished_too(tmp_path):
    calls = []
    for _ in range(2):
        assert Stages(tmp_path, TITLES).run("dig", lambda: calls.append(1)) is None
    assert calls == [1]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_stage_is_run_again_and_its_time_counts(tmp_path, interruption):
    def stop():
        time.sleep(0.05)
        raise interruption

    with pytest.raises(interruption):
        Stages(tmp_path, TITLES).run("fill", stop)
    stages = Stages(tmp_path, TITLES)
    assert stages.run("fill", lambda: time.sleep(0.06) or 7) == 7
    (record,) = stages.times()
    assert record["name"] == "fill" and record["title"] == "Filling it again"
    assert record["seconds"] >= 0.1


def test_records_are_whole_files(tmp_path):
    Stages(tmp_path, TITLES).run("dig", lambda: [1.5])
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["result"] == [1.5]


def test_a_result_that_is_no_json_leaves_the_stage_unfinished(tmp_path):
    stages = Stages(tmp_path, TITLES)
    with pytest.raises(TypeError):
        stages.run("dig", lambda: object())
    assert stages.run("dig", lambda: 3) == 3


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
