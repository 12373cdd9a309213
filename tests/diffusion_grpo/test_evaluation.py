"""Oracle: the pipeline itself, called image by image."""

import numpy as np
import pytest
import torch

from trl_spatial.diffusion_grpo.policies import SamplingOptions
from trl_spatial.diffusion_grpo.reward_functions import RewardFunctions
from trl_spatial.diffusion_grpo.runtime.evaluation import PolicyGenerator, reward_images
from trl_spatial.diffusion_grpo.runtime.prompt_cache import PromptCache
from trl_spatial.generation.drawing import draw_rows
from trl_spatial.generation.seeds import image_generator


ROWS = [
    {"prompt": "a red cube", "target": 1.0},
    {"prompt": "a blue sphere to the left of a lamp", "target": 2.0},
    {"prompt": "a red cube", "target": 3.0},  # the same prompt again is another row, with other noise
]
OPTIONS = SamplingOptions(height=32, width=48, num_inference_steps=3, guidance_scale=2.0)


def brightness(prompts, images, **columns):
    return [float(np.asarray(image, dtype=np.float32).mean()) for image in images]


def target(prompts, images, target):
    return target


@pytest.fixture(scope="module")
def evaluate(flux_policy):
    cache = PromptCache(flux_policy, "cpu")
    functions = RewardFunctions([brightness, target])

    generator = PolicyGenerator(flux_policy, flux_policy.transformer, cache, OPTIONS)

    def evaluate(num_kept_images=100, **kwargs):
        batches = draw_rows(generator, ROWS, **({"batch_size": 2, "seed": 7, "num_images": 2} | kwargs))
        return reward_images(batches, functions, num_kept_images=num_kept_images)

    return evaluate


def test_images_are_those_of_the_pipeline(evaluate, flux_policy):
    output = evaluate()
    assert output.indices.tolist() == list(range(6))
    assert output.prompts == [row["prompt"] for row in ROWS for _ in range(2)]
    assert output.rewards[:, 1].tolist() == [1, 1, 2, 2, 3, 3]
    for index, image in enumerate(output.images):
        row, number = divmod(index, 2)
        expected = flux_policy.pipeline(
            ROWS[row]["prompt"],
            height=OPTIONS.height,
            width=OPTIONS.width,
            num_inference_steps=OPTIONS.num_inference_steps,
            guidance_scale=OPTIONS.guidance_scale,
            max_sequence_length=16,
            generator=image_generator(7, row, number),
        ).images[0]
        # one grey level of rounding
        assert np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int)).max() <= 1
        assert output.rewards[index, 0].item() == pytest.approx(brightness([], [expected])[0], abs=0.1)


def test_is_the_same_every_time_and_for_any_batch(evaluate):
    first, second, other_batch, other_seed = evaluate(), evaluate(), evaluate(batch_size=5), evaluate(seed=8)
    assert torch.equal(first.rewards, second.rewards)
    torch.testing.assert_close(other_batch.rewards, first.rewards, rtol=0, atol=0.1)
    assert ((other_seed.rewards - first.rewards)[:, 0].abs() > 0.1).any()


@pytest.mark.parametrize("world_size", [2, 4, 7])
def test_processes_share_the_work(evaluate, world_size):
    whole = evaluate(batch_size=1)
    shares = [evaluate(batch_size=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    sizes = [len(share.rewards) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    indices = torch.cat([share.indices for share in shares])
    assert indices.sort().values.tolist() == list(range(6))
    assert torch.equal(torch.cat([share.rewards for share in shares])[indices.argsort()], whole.rewards)


def test_keeps_the_first_images_only(evaluate):
    shares = [evaluate(num_kept_images=3, rank=rank, world_size=2) for rank in range(2)]
    assert [len(share.images) for share in shares] == [2, 1]
    assert all(len(share.rewards) == 3 for share in shares)
    assert [share.prompts for share in shares] == [[row["prompt"] for row in ROWS]] * 2


def test_leaves_no_trace(evaluate, flux_policy):
    flux_policy.transformer.train()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    evaluate()
    assert flux_policy.transformer.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in flux_policy.transformer.parameters())
    flux_policy.transformer.eval()


def test_autocast_is_around_the_model_and_not_around_the_rewards(evaluate, flux_policy):
    seen = []

    def is_autocast(prompts, images, **columns):
        seen.append(torch.is_autocast_enabled("cpu"))
        return [0.0] * len(images)

    hook = flux_policy.transformer.register_forward_hook(
        lambda *_: seen.append(torch.is_autocast_enabled("cpu"))  # the transformer's turn
    )
    generator = PolicyGenerator(
        flux_policy,
        flux_policy.transformer,
        PromptCache(flux_policy, "cpu"),
        OPTIONS,
        autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    )
    reward_images(draw_rows(generator, ROWS[:1], batch_size=1, seed=0), RewardFunctions(is_autocast))
    hook.remove()
    assert seen == [True] * OPTIONS.num_inference_steps + [False]
