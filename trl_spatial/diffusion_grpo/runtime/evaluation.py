"""Evaluation of a policy: the same prompts and noise every time, the deterministic sampler, rewards of its own."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from ...generation.seeds import image_generator
from ..policies.base import DiffusionPolicy, SamplingOptions
from ..reward_functions import RewardFunctions
from ..rollout import sample_rollout
from .prompt_cache import PromptCache


@dataclass
class EvaluationOutput:
    """
    What an evaluation found, for the images of one process in the order of their rows.

    Args:
        rewards (`torch.Tensor` of shape `(n, num_funcs)`):
            Rewards of each function, float32, on the CPU; NaN where it has no opinion.
        indices (`torch.Tensor` of shape `(n,)`):
            Numbers of the images among those of all processes: `row * num_images + image`.
        images (`list[Image.Image]`):
            The images whose number is below `num_kept_images`, for the logs.
        prompts (`list[str]`):
            Their prompts.
    """

    rewards: torch.Tensor
    indices: torch.Tensor
    images: list[Image.Image]
    prompts: list[str]


def evaluate_policy(
    policy: DiffusionPolicy,
    transformer: torch.nn.Module,
    prompt_cache: PromptCache,
    rows: Sequence[dict[str, Any]],
    reward_functions: RewardFunctions,
    options: SamplingOptions,
    *,
    batch_size: int,
    seed: int,
    num_images: int = 1,
    num_kept_images: int = 0,
    rank: int = 0,
    world_size: int = 1,
    is_collective: bool = False,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    show_progress: bool = False,
) -> EvaluationOutput:
    """
    Generates images for the rows of a dataset and rewards them. Image `j` of row `i` starts from the noise of `(seed, i,
    j)`, whatever the batch size and the number of processes, so that two evaluations differ by the weights alone.

    Args:
        policy ([`DiffusionPolicy`]):
            The model family.
        transformer (`torch.nn.Module`):
            The weights to evaluate.
        prompt_cache ([`PromptCache`]):
            Embeddings of prompts.
        rows (`Sequence[dict]`):
            All rows, with a `prompt` and what else the reward functions need. Each process takes its share.
        reward_functions ([`RewardFunctions`]):
            The rewards, called with the images of one batch at a time.
        options ([`SamplingOptions`]):
            Size, steps and guidance of the images.
        batch_size (`int`):
            Images per forward pass.
        seed (`int`):
            Seed of the noise.
        num_images (`int`, *optional*, defaults to `1`):
            Images per row.
        num_kept_images (`int`, *optional*, defaults to `0`):
            The first so many images are returned; the others are dropped once they are rewarded.
        rank (`int`, *optional*, defaults to `0`), world_size (`int`, *optional*, defaults to `1`):
            Number of this process and of all.
        is_collective (`bool`, *optional*, defaults to `False`):
            Whether a forward pass needs all processes, as that of a sharded transformer does. Those with fewer batches than
            others then draw one more in vain.
        autocast (`Callable[[], AbstractContextManager]`, *optional*):
            Makes the context of the forward passes, such as `accelerator.autocast`. Reward functions run outside.
        show_progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        [`EvaluationOutput`]: Rewards of this process's images. A process has none if there are fewer images than
        processes.
    """
    sigmas = policy.prepare_sigmas(options)  # (num_inference_steps + 1,)
    indices = list(range(rank, len(rows) * num_images, world_size))
    # Process 0 has the most images.
    num_drawn = len(range(0, len(rows) * num_images, world_size)) if is_collective else len(indices)
    rewards, images, prompts = [torch.empty(0, len(reward_functions.names))], [], []
    was_training = transformer.training
    transformer.eval()
    with tqdm(total=len(indices), desc="Evaluating", unit="image", disable=not show_progress) as progress:
        for start in range(0, num_drawn, batch_size):
            # In vain, the first image of all is drawn
            batch = indices[start : start + batch_size] or [0]
            batch_rows = [rows[index // num_images] for index in batch]
            batch_prompts = [row["prompt"] for row in batch_rows]
            with autocast():
                rollout = sample_rollout(
                    policy,
                    transformer,
                    prompt_cache.get(batch_prompts),
                    [image_generator(seed, *divmod(index, num_images)) for index in batch],
                    options,
                    sigmas=sigmas,
                    trained_steps=(),  # no noise: the ODE sampler
                    noise_level=0.0,
                    dynamics="flow_sde",
                    batch_size=batch_size,
                )
            if start >= len(indices):
                continue
            columns = {name: [row[name] for row in batch_rows] for name in batch_rows[0] if name != "prompt"}
            rewards.append(reward_functions(batch_prompts, rollout.images, **columns))
            num_kept = sum(index < num_kept_images for index in batch)  # the indices ascend
            images += rollout.images[:num_kept]
            prompts += batch_prompts[:num_kept]
            progress.update(len(batch))
    transformer.train(was_training)
    return EvaluationOutput(torch.cat(rewards), torch.tensor(indices, dtype=torch.long), images, prompts)
