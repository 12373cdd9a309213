"""Scouts: cheap images choose the seeds that are drawn in full. Tiny FLUX pipelines on the CPU."""

import hashlib

import numpy as np
import pytest

from tests.diffusion_grpo.conftest import redness
from trl_spatial.diffusion_grpo.policies import SamplingOptions, make_policy
from trl_spatial.diffusion_grpo.rollout import sample_rollout
from trl_spatial.generation.seeds import image_generator


SCOUTS = {"num_scouts": 8, "scout_steps": 1, "top_k": 1}


class RecordingReward:
    """Redness, and the prompts, digests and rewards of every call."""

    __name__ = "redness"

    def __init__(self, reward=redness):
        self.reward, self.calls = reward, []

    def __call__(self, prompts, images, **columns):
        rewards = self.reward(prompts, images)
        digests = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
        self.calls.append((list(prompts), digests, rewards))
        return rewards


def logs_of(trainer):
    return [log for log in trainer.state.log_history if "loss" in log]


def run(make_trainer, reward=None, **kwargs):
    reward = reward or RecordingReward()
    trainer = make_trainer(reward, **{"max_steps": 1, **kwargs})
    trainer.train()
    return trainer, reward


@pytest.mark.parametrize("dynamics", ["flow_sde", "cps"])
def test_what_is_drawn_is_what_a_run_without_scouts_draws_of_these_seeds(make_trainer, dynamics):
    _, with_scouts = run(make_trainer, **SCOUTS, dynamics=dynamics, noise_level=0.8)
    _, without = run(make_trainer, num_generations=8, top_k=1, dynamics=dynamics, noise_level=0.8)
    (_, _, scout_rewards), (prompts, drawn, _) = with_scouts.calls
    all_prompts, all_drawn, _ = without.calls[0]
    groups = np.array(scout_rewards).reshape(2, 8)
    expected = [
        8 * group + image for group in range(2) for image in sorted((groups[group].argmin(), groups[group].argmax()))
    ]
    assert drawn == [all_drawn[index] for index in expected]
    assert prompts == [all_prompts[index] for index in expected] and len(set(drawn)) == 4


def test_a_scout_starts_from_the_latents_of_its_image(make_trainer, make_pipeline):
    """Of one step: the pipeline's own image of that step, from the seed of the image."""
    trainer, reward = run(make_trainer, **SCOUTS)
    policy = make_policy(make_pipeline(), max_sequence_length=16)
    options = SamplingOptions(16, 16, 1, trainer.args.guidance_scale)
    prompts = reward.calls[0][0]
    rollout = sample_rollout(
        policy,
        policy.transformer,
        policy.encode_prompt(prompts),
        [image_generator(trainer.args.seed, 0, group, image) for group in range(2) for image in range(8)],
        options,
        sigmas=policy.prepare_sigmas(options),
        trained_steps=(),
        noise_level=0.0,
        dynamics="flow_sde",
        batch_size=8,
    )
    assert [hashlib.sha256(image.tobytes()).hexdigest() for image in rollout.images] == reward.calls[0][1]


def test_the_best_and_the_worst_of_the_final_rewards_count(make_trainer):
    """The advantages are those of the final images, also where scouts had it wrong."""
    finals = iter([[float(index) for index in range(16)], [5.0, 1.0, 1.0, 5.0]])
    trainer, _ = run(make_trainer, lambda prompts, images, **columns: next(finals), **SCOUTS, beta=0.0)
    assert trainer._buffer.advantages.tolist() == [1.0, -1.0, -1.0, 1.0]
    assert logs_of(trainer)[0]["scout_rank_correlation"] == 0  # right for one prompt, wrong for the other


def test_scouts_without_a_reward_are_warned_about(make_trainer, caplog):
    """Such as those in which a detector finds nothing: the images are learned from, but nobody chose them."""
    finals = iter([[None] * 8 + [float(index) for index in range(8)], [5.0, 1.0, 1.0, 5.0]])
    trainer, _ = run(make_trainer, lambda prompts, images, **columns: next(finals), **SCOUTS)
    assert "No scout of 1 of the 2 prompts of this rollout has a reward" in caplog.text
    assert trainer._buffer.advantages.tolist() == [1.0, -1.0, -1.0, 1.0]


def test_scouts_that_cost_as_much_as_images_foretell_them(make_trainer):
    """With all steps and next to no noise a scout is the image."""
    trainer, _ = run(
        make_trainer, num_scouts=8, scout_steps=3, top_k=3, gradient_accumulation_steps=6, noise_level=1e-9
    )
    assert logs_of(trainer)[0]["scout_rank_correlation"] == pytest.approx(1.0)


def test_what_is_counted(make_trainer):
    trainer, reward = run(make_trainer, **SCOUTS, max_steps=2)
    log = logs_of(trainer)[-1]
    assert [len(prompts) for prompts, _, _ in reward.calls] == [16, 4, 16, 4]
    assert (log["num_scout_images"], log["num_images"], log["num_trained_images"]) == (32, 8, 8)
    # a step of each scout; three steps of each image, of which two are trained by a forward and a backward pass
    assert log["num_policy_passes"] == 32 * 1 + 8 * 3 + 8 * 2 * 2
    assert log["num_reference_passes"] == 8 * 2
    assert 0.7 < log["velocity_ratio"] < 1.3 and log["velocity_ratio"] != 1 and 0 < log["group_diversity"] < 1
    passes = log["num_policy_passes"] + log["num_reference_passes"]
    assert log["passes_per_update"] == passes / 2 and log["passes_per_trained_image"] == passes / 8


def test_images_are_scored_once_whatever_a_group_would_have_without_scouts(make_trainer):
    """A rollout of two updates, in batches as in training: its log-probs hold, and no passes are spent to score them again."""
    trainer, _ = run(
        make_trainer, **SCOUTS, num_generations=5, gradient_accumulation_steps=1, steps_per_generation=2,
        rollout_batch_size=2, max_steps=2,
    )  # fmt: skip
    assert logs_of(trainer)[-1]["num_old_log_prob_passes"] == 0


def test_images_without_scouts_are_counted_apart_too(make_trainer):
    trainer, _ = run(make_trainer, max_steps=2)
    log = logs_of(trainer)[-1]
    assert (log["num_scout_images"], log["num_images"], log["num_trained_images"]) == (0, 16, 8)
    assert "scout_rank_correlation" not in log


def test_overlapped_rewards_change_nothing(make_trainer):
    plain, overlapped = (
        [
            digest
            for _, digests, _ in run(make_trainer, **SCOUTS, overlap_rewards=is_overlapped, rollout_batch_size=2)[
                1
            ].calls
            for digest in digests
        ]
        for is_overlapped in (False, True)
    )
    assert plain == overlapped and len(plain) == 16 + 4


def test_too_few_steps_for_the_scheduler_is_an_error(make_trainer, make_pipeline):
    pipeline = make_pipeline()
    pipeline.scheduler.register_to_config(shift_terminal=0.02)
    with pytest.raises(ValueError, match="`scout_steps`: `num_inference_steps=1` is too few"):
        make_trainer(pipeline=pipeline, **SCOUTS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"scout_steps": None}, "`num_scouts` is 8 and `scout_steps` is None"),
        ({"num_scouts": None}, "`num_scouts` is None and `scout_steps` is 1"),
        ({"top_k": None}, "`num_scouts` is 8 and `top_k` is None"),
        ({"top_k": 5}, r"`top_k` is 5 and `num_scouts` is 8. Use `top_k` between 1 and 4, half of a group\.$"),
        ({"scout_steps": 4}, "`scout_steps` is 4 and `num_inference_steps` is 3"),
        ({"num_scouts": 1}, "`num_scouts` is 1. Use at least 2"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(make_trainer, wrong, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**(SCOUTS | wrong))
