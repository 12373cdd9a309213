"""The kept images of a rollout, handed out in batches of training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .prompt_cache import PromptCache


@dataclass
class TrainingStep:
    """
    One trained denoising step of a batch of `n` images: what a loss is computed on.

    Args:
        embeds (`dict[str, torch.Tensor]`):
            Embeddings of the prompts, a row per image.
        step (`int`):
            Index of the denoising step.
        latents, next_latents (`torch.Tensor` of shape `(n, image_seq_len, num_channels)`):
            Latents before and after the step, float32.
        advantages (`torch.Tensor` of shape `(n,)`):
            Advantages of the images, float32.
        is_on_policy (`bool`):
            Whether the policy has not changed since the rollout: it is the old policy itself.
        old_log_probs (`torch.Tensor` of shape `(n,)`, *optional*):
            Log-probs of the old policy, a view of the buffer. `None` if there is one update per rollout.
        old_mean (`torch.Tensor` of shape `(n, image_seq_len, num_channels)`, *optional*):
            Means of the old policy, a view of the buffer. `None` if the loss does not need them later.
    """

    embeds: dict[str, torch.Tensor]
    step: int
    latents: torch.Tensor
    next_latents: torch.Tensor
    advantages: torch.Tensor
    is_on_policy: bool
    old_log_probs: torch.Tensor | None
    old_mean: torch.Tensor | None

    def store_old_policy(self, log_probs: torch.Tensor, mean: torch.Tensor) -> None:
        """Writes what later updates need of the old policy into the buffer."""
        if self.old_log_probs is not None:
            self.old_log_probs.copy_(log_probs)
        if self.old_mean is not None:
            self.old_mean.copy_(mean)


@dataclass
class RolloutBuffer:
    """
    Kept images of a rollout, `n` in number, with their `K` trained steps, and how far training has come with them.

    Args:
        prompts (`list[str]` of length `n`):
            Prompt of each image.
        trained_steps (`tuple[int, ...]` of length `K`):
            Indices of the trained steps.
        latents, next_latents (`torch.Tensor` of shape `(n, K, image_seq_len, num_channels)`):
            Latents before and after each trained step, float32.
        advantages (`torch.Tensor` of shape `(n,)`):
            Advantages, float32.
        old_log_probs (`torch.Tensor` of shape `(n, K)`, *optional*):
            Log-probs of the old policy, float32; `None` if there is one update per rollout.
        old_means (`torch.Tensor` of shape `(n, K, image_seq_len, num_channels)`, *optional*):
            Means of the old policy, float32, if the loss needs them.
        batch_size (`int`):
            Images per batch.
        num_iterations (`int`):
            How often every batch is trained on.
        num_batches_on_policy (`int`):
            How many batches are trained on before the policy changes.
        position (`int`, *optional*, defaults to `0`):
            Number of batches handed out so far, over all iterations.
    """

    prompts: list[str]
    trained_steps: tuple[int, ...]
    latents: torch.Tensor
    next_latents: torch.Tensor
    advantages: torch.Tensor
    old_log_probs: torch.Tensor | None
    old_means: torch.Tensor | None
    batch_size: int
    num_iterations: int
    num_batches_on_policy: int
    position: int = 0

    @property
    def num_batches(self) -> int:
        """Number of batches of an iteration."""
        return len(self.prompts) // self.batch_size

    @property
    def is_used_up(self) -> bool:
        """Whether all batches of all iterations were handed out."""
        return self.position == self.num_batches * self.num_iterations

    def batch_steps(self, position: int, prompt_cache: PromptCache) -> list[TrainingStep]:
        """The trained steps of the batch at a position, as views of the buffer, with the embeddings of its prompts."""
        start = position % self.num_batches * self.batch_size
        rows = slice(start, start + self.batch_size)
        embeds = prompt_cache.get(self.prompts[rows])
        return [
            TrainingStep(
                embeds=embeds,
                step=step,
                latents=self.latents[rows, k],
                next_latents=self.next_latents[rows, k],
                advantages=self.advantages[rows],
                is_on_policy=position < self.num_batches_on_policy,
                old_log_probs=None if self.old_log_probs is None else self.old_log_probs[rows, k],
                old_mean=None if self.old_means is None else self.old_means[rows, k],
            )
            for k, step in enumerate(self.trained_steps)
        ]

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What a checkpoint keeps: tensors, and the rest as JSON holds it."""
        values = vars(self)
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        return tensors, {name: value for name, value in values.items() if name not in tensors}

    @classmethod
    def from_state(
        cls, tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any], device: torch.device
    ) -> "RolloutBuffer":
        """Undoes [`~RolloutBuffer.state`]."""
        # Copies: tensors in a mapped file may lie at other addresses than those of training, where kernels round differently
        values = {**rest, **{name: tensor.to(device, copy=True) for name, tensor in tensors.items()}}
        return cls(**{**values, "trained_steps": tuple(rest["trained_steps"])})
