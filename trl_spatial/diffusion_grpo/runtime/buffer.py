"""The kept images of a rollout, handed out in training batches."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from .activations import RolloutActivations
from .prompt_cache import PromptCache


@dataclass
class TrainingStep:
    """One trained denoising step of a batch of `n` images: the input of a loss."""

    embeds: dict[str, torch.Tensor]  # prompt embeddings, a row per image
    step: int  # index of the denoising step
    latents: torch.Tensor  # before the step: (n, image_seq_len, num_channels), float32
    next_latents: torch.Tensor  # after it
    advantages: torch.Tensor  # (n,), float32
    is_on_policy: bool  # the policy has not changed since the rollout: it is the old policy itself
    # the old policy's, views of the buffer; `None` if there is one update per rollout, or no loss needs them later
    old_log_probs: torch.Tensor | None  # (n,)
    old_mean: torch.Tensor | None  # (n, image_seq_len, num_channels)
    block_outputs: list[list[torch.Tensor]] | None  # of the rollout, for `reusing`; `None` if they are to be computed

    def store_old_policy(self, log_probs: torch.Tensor, mean: torch.Tensor) -> None:
        """Writes the old policy's values that later updates need into the buffer."""
        if self.old_log_probs is not None:
            self.old_log_probs.copy_(log_probs)
        if self.old_mean is not None:
            self.old_mean.copy_(mean)


@dataclass(kw_only=True)
class RolloutBuffer:
    """The `n` kept images of a rollout, and training's position in them. A subclass adds what its loss needs."""

    prompts: list[str]
    advantages: torch.Tensor  # (n,), float32
    batch_size: int  # images per batch
    num_iterations: int  # how often every batch is trained on
    num_batches_on_policy: int  # how many batches are trained on before the policy changes
    position: int = 0  # batches handed out so far, over all iterations

    @property
    def num_batches(self) -> int:
        """Number of batches of an iteration."""
        return len(self.prompts) // self.batch_size

    @property
    def is_used_up(self) -> bool:
        """Whether all batches of all iterations have been handed out."""
        return self.position == self.num_batches * self.num_iterations

    def rows(self, position: int) -> slice:
        """The images of the batch at a position."""
        start = position % self.num_batches * self.batch_size
        return slice(start, start + self.batch_size)

    def batch_steps(self, position: int, prompt_cache: PromptCache) -> list[Any]:
        """Returns the inputs of the loss for the batch at a position, one per backward pass, with its prompt embeddings."""
        raise NotImplementedError

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Returns the state for a checkpoint: tensors, and the rest as JSON values."""
        values = vars(self)
        tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
        return tensors, {name: value for name, value in values.items() if name not in tensors}

    @classmethod
    def from_state(cls, tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any], device: torch.device) -> Self:
        """Restores a buffer from its [`~RolloutBuffer.state`]."""
        # Copies: tensors in a memory-mapped file may be aligned differently than in training, and kernels then round differently
        copies: dict[str, Any] = {name: tensor.to(device, copy=True) for name, tensor in tensors.items()}
        return cls(**rest, **copies)


@dataclass(kw_only=True)
class StepsBuffer(RolloutBuffer):
    """
    A [`RolloutBuffer`] with `K` trained denoising steps of each image. The old policy's fields are `None` if the loss never
    needs them later.
    """

    trained_steps: tuple[int, ...]  # indices of denoising steps
    latents: torch.Tensor  # before each trained step: (n, K, image_seq_len, num_channels), float32
    next_latents: torch.Tensor  # after it
    old_log_probs: torch.Tensor | None  # (n, K), float32
    old_means: torch.Tensor | None  # (n, K, image_seq_len, num_channels), float32
    # `None` once the policy has changed, so that checkpoints, which are saved after an update, do not have it
    activations: RolloutActivations | None = None

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
                block_outputs=None if self.activations is None else self.activations.of(k, rows),
            )
            for k, step in enumerate(self.trained_steps)
        ]
