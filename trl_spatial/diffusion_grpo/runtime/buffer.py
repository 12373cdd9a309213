"""The kept images of a rollout, handed out in batches of training."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from .prompt_cache import PromptCache


@dataclass
class TrainingStep:
    """One trained denoising step of a batch of `n` images: what a loss is computed on."""

    embeds: dict[str, torch.Tensor]  # of the prompts, a row per image
    step: int  # index of the denoising step
    latents: torch.Tensor  # before the step: (n, image_seq_len, num_channels), float32
    next_latents: torch.Tensor  # after it
    advantages: torch.Tensor  # (n,), float32
    is_on_policy: bool  # the policy has not changed since the rollout: it is the old policy itself
    # of the old policy, views of the buffer; `None` if there is one update per rollout, or no loss needs them later
    old_log_probs: torch.Tensor | None  # (n,)
    old_mean: torch.Tensor | None  # (n, image_seq_len, num_channels)

    def store_old_policy(self, log_probs: torch.Tensor, mean: torch.Tensor) -> None:
        """Writes what later updates need of the old policy into the buffer."""
        if self.old_log_probs is not None:
            self.old_log_probs.copy_(log_probs)
        if self.old_mean is not None:
            self.old_mean.copy_(mean)


@dataclass(kw_only=True)
class RolloutBuffer:
    """Kept images of a rollout, `n` in number, and how far training has come with them. A subclass adds what its loss needs."""

    prompts: list[str]
    advantages: torch.Tensor  # (n,), float32
    batch_size: int  # images per batch
    num_iterations: int  # how often every batch is trained on
    num_batches_on_policy: int  # how many are trained on before the policy changes
    position: int = 0  # batches handed out so far, over all iterations

    @property
    def num_batches(self) -> int:
        """Number of batches of an iteration."""
        return len(self.prompts) // self.batch_size

    @property
    def is_used_up(self) -> bool:
        """Whether all batches of all iterations were handed out."""
        return self.position == self.num_batches * self.num_iterations

    def rows(self, position: int) -> slice:
        """The images of the batch at a position."""
        start = position % self.num_batches * self.batch_size
        return slice(start, start + self.batch_size)

    def batch_steps(self, position: int, prompt_cache: PromptCache) -> list[Any]:
        """What a loss is computed on, one after the other, for the batch at a position, with the embeddings of its prompts."""
        raise NotImplementedError

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What a checkpoint keeps: tensors, and the rest as JSON holds it."""
        values = vars(self)
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        return tensors, {name: value for name, value in values.items() if name not in tensors}

    @classmethod
    def from_state(cls, tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any], device: torch.device) -> Self:
        """Undoes [`~RolloutBuffer.state`]."""
        # Copies: tensors in a mapped file may lie at other addresses than those of training, where kernels round differently
        copies: dict[str, Any] = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
        return cls(**rest, **copies)


@dataclass(kw_only=True)
class StepsBuffer(RolloutBuffer):
    """
    A [`RolloutBuffer`] with `K` trained denoising steps of each image. What belongs to the old policy is `None` where the
    loss never needs it again.
    """

    trained_steps: tuple[int, ...]  # indices of denoising steps
    latents: torch.Tensor  # before each trained step: (n, K, image_seq_len, num_channels), float32
    next_latents: torch.Tensor  # after it
    old_log_probs: torch.Tensor | None  # (n, K), float32
    old_means: torch.Tensor | None  # (n, K, image_seq_len, num_channels), float32

    def batch_steps(self, position: int, prompt_cache: PromptCache) -> list[TrainingStep]:
        """The trained steps of the batch at a position, as views of the buffer, with the embeddings of its prompts."""
        rows = self.rows(position)
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
