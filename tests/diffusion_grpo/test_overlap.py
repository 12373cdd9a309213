"""Rewards that are computed while images are drawn: the same training, errors in the open, and what is missing is told."""

import threading
import time
import traceback
from concurrent.futures import wait

import pytest
import torch
from PIL import Image

from tests.diffusion_grpo.conftest import redness
from trl_spatial.diffusion_grpo.reward_functions import OverlappedRewards, RewardFunctions
from trl_spatial.diffusion_grpo.runtime.monitoring import RewardsMonitor


def trained_weights(trainer):
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}


class Spy:
    """Rewards redness, plus what a column says, and takes note of its calls."""

    def __init__(self):
        self.sizes, self.threads = [], set()

    def __call__(self, prompts, images, bonus, **columns):
        assert len(prompts) == len(images) == len(bonus)
        assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        self.sizes.append(len(images))
        self.threads.add(threading.current_thread())
        return [value + extra for value, extra in zip(redness(prompts, images), bonus, strict=True)]


def test_training_is_the_same_bit_for_bit(make_trainer):
    rows = [{"prompt": f"a red cube {i}", "bonus": 0.01 * i} for i in range(4)]
    weights, rewards, spies = [], [], [Spy(), Spy()]
    for spy, overlap_rewards in zip(spies, (False, True), strict=True):
        trainer = make_trainer(spy, train_dataset=rows, overlap_rewards=overlap_rewards, rollout_batch_size=3)
        trainer.train()
        weights.append(trained_weights(trainer))
        logs = [log for log in trainer.state.log_history if "loss" in log]
        rewards.append([(log["reward"], log["loss"]) for log in logs])
        assert all(log["time/reward"] >= 0 for log in logs)
    assert rewards[0] == rewards[1]
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name
    assert spies[0].sizes == [8, 8] and spies[0].threads == {threading.main_thread()}
    assert spies[1].sizes == [3, 3, 2] * 2 and threading.main_thread() not in spies[1].threads


def test_an_error_comes_out_with_its_traceback_and_ends_the_drawing(make_trainer):
    calls = []

    def breaks(prompts, images, **columns):
        calls.append(len(images))
        raise KeyError("no such layer")

    trainer = make_trainer(breaks, overlap_rewards=True, rollout_batch_size=1)
    with pytest.raises(KeyError, match="no such layer") as error:
        trainer.train()
    assert "breaks" in [frame.name for frame in traceback.extract_tb(error.tb)]
    assert calls == [1]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rewards")]


def test_after_an_error_nothing_more_is_drawn_and_nothing_more_is_rewarded():
    calls, are_two_added = [], threading.Event()

    def breaks(prompts, images, **columns):
        calls.append(len(images))
        assert are_two_added.wait(120)
        raise KeyError("no such layer")

    image = Image.new("RGB", (8, 8))
    with OverlappedRewards(RewardFunctions([breaks]), ["a lamp"] * 3, {}, torch.device("cpu")) as rewards:
        for row in range(2):
            rewards.add(row, [image])
        are_two_added.set()
        wait(rewards._futures)
        with pytest.raises(KeyError, match="no such layer"):  # out of the drawing
            rewards.add(2, [image])
        with pytest.raises(KeyError, match="no such layer"):
            rewards.collect()
    assert calls == [1]


def test_where_processes_draw_together_an_error_waits_for_the_last_image():
    """The others would wait for the images of this one."""
    failed = threading.Event()

    def breaks(prompts, images, **columns):
        failed.set()
        raise KeyError("no such layer")

    with OverlappedRewards(RewardFunctions(breaks), ["a"] * 3, {}, torch.device("cpu"), is_collective=True) as rewards:
        for row in range(3):
            rewards.add(row, [Image.new("RGB", (8, 8))])
            assert failed.wait(120)
            rewards._futures[-1].exception(120)
        with pytest.raises(KeyError, match="no such layer"):
            rewards.collect()


def test_the_logged_time_is_what_the_rollout_waited(make_trainer):
    def slow(prompts, images, **columns):
        time.sleep(0.2)
        return redness(prompts, images)

    trainer = make_trainer(
        slow, overlap_rewards=True, rollout_batch_size=8, max_steps=1
    )  # one batch: nothing overlaps
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    assert log["time/reward"] >= 0.15
    phases = ("encode", "sample", "reward", "train", "rest")
    assert sum(log[f"time/{phase}"] for phase in phases) == pytest.approx(log["time/step"], rel=1e-6)


def test_a_rollout_without_rewards_has_no_gradient(make_trainer, caplog):
    class Failing:
        __name__ = "failing"

        def __call__(self, prompts, images, **columns):
            return [None] * len(images)

    trainer = make_trainer(Failing(), beta=0.0, weight_decay=0.0)
    before = trained_weights(trainer)
    trainer.train()
    for name, weight in trained_weights(trainer).items():
        assert torch.equal(weight, before[name]), name
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["rewards/failing/frac_none"] for log in logs] == [1.0, 1.0]
    assert [(log["loss"], log["grad_norm"]) for log in logs] == [(0.0, 0.0)] * 2
    warnings = [record.message for record in caplog.records]
    assert sum("`failing` gave no reward to 8 of the 8 images" in message for message in warnings) == 1
    assert sum("there is nothing to learn" in message for message in warnings) == 2


def test_missing_rewards_are_told_when_they_begin():
    monitor, nan = RewardsMonitor(), float("nan")

    def rollout(num_none):
        return torch.stack([torch.ones(20), torch.tensor([nan] * num_none + [1.0] * (20 - num_none))], dim=1)

    varied = torch.arange(20.0)
    warned = [len(monitor.update(["good", "bad"], rollout(num_none), varied)) for num_none in (0, 2, 3, 4, 2, 20)]
    assert warned == [0, 0, 1, 0, 0, 1]
    (warning,) = RewardsMonitor().update(["good", "bad"], rollout(3), varied)
    assert "`bad` gave no reward to 3 of the 20 images" in warning and "frac_none" in warning
