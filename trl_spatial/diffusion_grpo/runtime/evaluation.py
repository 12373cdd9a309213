"""Evaluation: images of the same prompts and noise every time, and what reward functions say of them."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from PIL import Image

from ...generation.drawing import DrawnBatch
from ..policies.base import DiffusionPolicy, SamplingOptions
from ..reward_functions import RewardFunctions
from ..rollout import sample_rollout
from .prompt_cache import PromptCache


@dataclass
class EvaluationOutput:
    """
    Rewards and images of one process, in the order of their rows.

    Args:
        rewards (`torch.Tensor` of shape `(n, num_funcs)`):
            Rewards of each function, float32, on the CPU; NaN where it gave none.
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


class PolicyGenerator:
    """
    Draws with a policy by the deterministic sampler: an [`~generation.generators.ImageGenerator`].

    Args:
        policy ([`DiffusionPolicy`]):
            The model family.
        transformer (`torch.nn.Module`):
            Its weights, or what wraps them in training.
        prompt_cache ([`PromptCache`]):
            Embeddings of prompts.
        options ([`SamplingOptions`]):
            Size, steps and guidance of the images.
        autocast (`Callable[[], AbstractContextManager]`, *optional*):
            Makes the context of the forward passes, such as `accelerator.autocast`.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        transformer: torch.nn.Module,
        prompt_cache: PromptCache,
        options: SamplingOptions,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.policy, self.transformer, self.prompt_cache = policy, transformer, prompt_cache
        self.options, self.autocast = options, autocast
        self._sigmas = policy.prepare_sigmas(options)  # (num_inference_steps + 1,)

    def __call__(self, prompts: list[str], generators: list[torch.Generator]) -> list[Image.Image]:
        was_training = self.transformer.training
        self.transformer.eval()
        with self.autocast():
            rollout = sample_rollout(
                self.policy,
                self.transformer,
                self.prompt_cache.get(prompts),
                generators,
                self.options,
                sigmas=self._sigmas,
                trained_steps=(),  # no noise: the ODE sampler
                noise_level=0.0,
                dynamics="flow_sde",
                batch_size=len(prompts),
            )
        self.transformer.train(was_training)
        return rollout.images


def reward_images(
    batches: Iterable[DrawnBatch], reward_functions: RewardFunctions, *, num_kept_images: int = 0
) -> EvaluationOutput:
    """
    Rewards images as they are drawn.

    Args:
        batches (`Iterable[DrawnBatch]`):
            The images, from [`~generation.drawing.draw_rows`]. The columns of their rows go to the reward functions.
        reward_functions ([`RewardFunctions`]):
            The rewards, called with one batch at a time.
        num_kept_images (`int`, *optional*, defaults to `0`):
            The first so many images are returned; the others are dropped once they are rewarded.

    Returns:
        [`EvaluationOutput`]: Rewards and images; none if there are no batches, as in a process without images.
    """
    rewards, indices, images, prompts = [torch.empty(0, len(reward_functions.names))], [], [], []
    for batch in batches:
        columns = {name: [row[name] for row in batch.rows] for name in batch.rows[0]}
        batch_prompts = columns.pop("prompt")
        rewards.append(reward_functions(batch_prompts, batch.images, **columns))
        indices += batch.indices
        num_kept = sum(index < num_kept_images for index in batch.indices)  # they ascend
        images += batch.images[:num_kept]
        prompts += batch_prompts[:num_kept]
    return EvaluationOutput(torch.cat(rewards), torch.tensor(indices, dtype=torch.long), images, prompts)
