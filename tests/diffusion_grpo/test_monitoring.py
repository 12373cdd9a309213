"""Each warning at the edge of its condition; false alarms and misses of the hacking monitor by simulation."""

import math
import time

import pytest
import torch

from trl_spatial.diffusion_grpo.runtime.monitoring import (
    HackingMonitor,
    RewardsMonitor,
    StepTimer,
    setup_warnings,
)


# The paper's recipe at 512²: nothing to warn of.
PAPER = dict(
    dynamics="flow_sde",
    noise_level=0.9,
    trains_first_step=True,
    epsilon=1e-4,
    num_latent_elements=65536,
    num_updates_per_rollout=1,
    is_ratio_corrected=False,
    num_groups_per_update=48,
)


class TestSetup:
    def test_the_paper_is_fine(self):
        assert setup_warnings(**PAPER) == []

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"noise_level": math.sqrt(2)}, ["`noise_level` is 1.414", "`sde_window_range`"]),
            (
                {"num_updates_per_rollout": 2},
                ["`epsilon` is 0.0001", "2 / 65536", "3.1e-05", "`ratio_norm=True`", "`kl_mask`"],
            ),
            ({"num_groups_per_update": 7.5}, ["7.5 groups", "`gradient_accumulation_steps`"]),
        ],
    )
    def test_names_the_value_and_the_fix(self, changes, words):
        (warning,) = setup_warnings(**{**PAPER, **changes})
        assert all(word in warning for word in words)

    @pytest.mark.parametrize(
        "changes",
        [
            {"noise_level": 1.41},
            {"noise_level": 2.0, "trains_first_step": False},
            {"noise_level": 2.0, "dynamics": "dance_sde"},
            {"num_updates_per_rollout": 2, "is_ratio_corrected": True},
            {"num_updates_per_rollout": 2, "epsilon": 3e-5},
            {"num_groups_per_update": 8},
        ],
    )
    def test_does_not_warn_beside_the_condition(self, changes):
        assert setup_warnings(**{**PAPER, **changes}) == []

    def test_the_epsilon_it_warns_from_is_where_the_bias_beats_the_spread(self):
        # The log ratio of one step of delta standard deviations: z · d / std - delta² / 2, averaged over D elements.
        # It reaches ±epsilon by its spread when epsilon = delta / sqrt(D); there the bias is as large at epsilon = 2/D.
        num_elements, num_draws = 256, 4000
        generator = torch.Generator().manual_seed(0)
        for factor, is_worse in ((0.2, False), (5.0, True)):
            epsilon = factor * 2 / num_elements
            delta = epsilon * math.sqrt(num_elements)
            noise = torch.randn(num_draws, num_elements, generator=generator)
            log_ratio = (noise * delta - delta**2 / 2).mean(dim=1)
            assert (-log_ratio.mean() > log_ratio.std()).item() is is_worse
            warnings = setup_warnings(
                **{**PAPER, "num_latent_elements": num_elements, "epsilon": epsilon, "num_updates_per_rollout": 2}
            )
            assert bool(warnings) is is_worse


def warnings_of_rewards(combined):
    combined = torch.tensor(combined)
    return RewardsMonitor().update(["judge"], torch.zeros(len(combined), 1), combined)


class TestEqualRewards:
    def test_warns_of_equal_rewards(self):
        (warning,) = warnings_of_rewards([0.5, math.nan, 0.5])
        assert "All 2 images" in warning and "0.5" in warning

    def test_warns_of_no_rewards(self):
        (warning,) = warnings_of_rewards([math.nan, math.nan])
        assert "None of the 2 images" in warning

    @pytest.mark.parametrize("rewards", [[0.5, 0.5, 0.6], [0.0, math.nan, 1.0], [1.0]])
    def test_is_silent_otherwise(self, rewards):
        assert warnings_of_rewards(rewards) == []


class TestHackingMonitor:
    NUM_IMAGES = 50

    def warnings_of(self, trained_slope, held_out_slope, *, generator, noise=0.1, num_evaluations=3):
        """Warnings after a run whose mean rewards change by the slopes; images differ much, their noise is small."""
        trained_base, held_out_base = (torch.randn(self.NUM_IMAGES, generator=generator) * 5 for _ in range(2))
        monitor, warnings = HackingMonitor(), []
        for index in range(num_evaluations):
            trained, held_out = (
                base + index * slope + noise * torch.randn(self.NUM_IMAGES, generator=generator)
                for base, slope in ((trained_base, trained_slope), (held_out_base, held_out_slope))
            )
            warnings = monitor.update(100 * index, trained, {"judge": held_out}, range(self.NUM_IMAGES))
        return warnings

    def test_finds_hacking(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            (warning,) = self.warnings_of(0.1, -0.1, generator=generator)
            assert "`judge`" in warning and "Since step 0" in warning and "`beta`" in warning

    @pytest.mark.parametrize(("trained", "held_out"), [(0.1, 0.1), (-0.1, -0.1), (-0.1, 0.1), (0.0, -0.1), (0.1, 0.0)])
    def test_is_silent_unless_one_rises_and_the_other_falls(self, trained, held_out):
        generator = torch.Generator().manual_seed(0)
        num_alarms = sum(bool(self.warnings_of(trained, held_out, generator=generator)) for _ in range(100))
        assert num_alarms <= 8  # by chance 2.5 of 100 where one of them stands still

    def test_is_silent_about_noise(self):
        generator = torch.Generator().manual_seed(0)
        assert sum(bool(self.warnings_of(0, 0, generator=generator)) for _ in range(1000)) <= 5

    def test_looks_at_the_last_three_evaluations(self):
        generator = torch.Generator().manual_seed(0)
        assert not self.warnings_of(0.1, -0.1, generator=generator, num_evaluations=2)
        assert "Since step 300" in self.warnings_of(0.1, -0.1, generator=generator, num_evaluations=6)[0]

    def test_takes_evaluations_as_they_come(self):
        monitor = HackingMonitor()

        def update(step, num_images=4):
            return monitor.update(
                step,
                torch.full((num_images,), 1.0 * step),
                {"judge": torch.full((num_images,), -1.0 * step)},
                range(num_images),
            )

        assert not any(update(step) for step in (1, 2, 2, 2))  # one step several times is one evaluation
        assert update(3)
        assert not any(update(step, num_images=5) for step in (4, 5))  # other images: they have no past
        assert update(6, num_images=5)

    def test_images_of_one_prompt_rise_together(self):
        """Fifty images of two prompts, of which one rises by chance: not a rise of the reward."""
        for prompts, is_warned in ((range(50), True), (["one"] * 25 + ["other"] * 25, False)):
            monitor = HackingMonitor()
            for step in range(3):
                move = step * torch.tensor([1.0, -0.1]).repeat_interleave(25)
                warnings = monitor.update(step, move, {"judge": -move}, prompts)
            assert bool(warnings) == is_warned

    def test_compares_images_that_both_evaluations_rewarded(self):
        monitor = HackingMonitor()
        missing = torch.full((4,), math.nan)
        for step in range(3):
            warnings = monitor.update(
                step,
                torch.tensor([0.0, 0.0, 1.0, math.nan]) + step,
                {"judge": torch.tensor([math.nan, 5.0, 6.0, 7.0]) - step, "absent": missing},
                list("abcd"),
            )
        (warning,) = warnings
        assert "rose by 2" in warning and "`judge` fell by 2" in warning


class TestStepTimer:
    def test_phases_and_rest_make_up_the_step(self):
        timer = StepTimer()
        with timer.phase("sample"):
            time.sleep(0.02)
        time.sleep(0.01)
        for _ in range(2):
            with timer.phase("train"):
                time.sleep(0.01)
        times = timer.collect()
        assert list(times) == ["time/sample", "time/train", "time/rest", "time/step"]
        assert times["time/sample"] >= 0.02 and times["time/train"] >= 0.02 and times["time/rest"] >= 0.01
        assert times["time/step"] == pytest.approx(sum(times.values()) - times["time/step"])
        assert list(timer.collect()) == ["time/rest", "time/step"]

    def test_a_phase_within_another_is_counted_once(self):
        timer = StepTimer()
        with timer.phase("sample"):
            with timer.phase("encode"):
                time.sleep(0.05)
            time.sleep(0.01)
        times = timer.collect()
        assert times["time/encode"] >= 0.05
        assert 0.01 <= times["time/sample"] <= times["time/step"] - times["time/encode"]

    def test_waits_for_the_accelerator_inside_the_phase(self):
        timer = StepTimer(synchronize=lambda: time.sleep(0.02))
        with timer.phase("train"):
            pass
        assert timer.collect()["time/train"] >= 0.02

    def test_a_phase_ends_with_an_error(self):
        timer = StepTimer()
        with pytest.raises(ZeroDivisionError), timer.phase("reward"):
            raise ZeroDivisionError
        time.sleep(0.05)
        times = timer.collect()
        assert times["time/rest"] >= 0.05 and times["time/reward"] <= times["time/step"] - times["time/rest"]

    def test_restart_forgets(self):
        timer = StepTimer()
        with timer.phase("sample"):
            time.sleep(0.05)
        start = time.perf_counter()
        timer.restart()
        times = timer.collect()
        assert list(times) == ["time/rest", "time/step"] and times["time/step"] <= time.perf_counter() - start
