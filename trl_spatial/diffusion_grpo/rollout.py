"""Sampling images from the policy: the choice of prompts, and what training needs from the trained steps."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn

from .policies import DiffusionPolicy, SamplingOptions
from .policies.base import move_embeds
from .runtime.activations import RolloutActivations
from .sde import sde_step


@dataclass
class Rollout:
    """
    Images sampled from the policy and their trained steps. `n` images, `K` trained steps.

    Args:
        images (`list[Image]` of length `n`):
            Decoded images.
        latents, next_latents (`torch.Tensor` of shape `(n, K, image_seq_len, num_channels)`):
            Latents before and after each trained step, float32.
        log_probs (`torch.Tensor` of shape `(n, K)`):
            Log-probability of each trained step, mean over latent elements, float32.
        final_latents (`torch.Tensor` of shape `(n, image_seq_len, num_channels)`):
            Latents that the images are decoded from, float32.
        activations ([`~runtime.activations.RolloutActivations`], *optional*):
            Outputs of the transformer's blocks at the trained steps, if they are kept.
    """

    images: list[Image.Image]
    latents: torch.Tensor
    next_latents: torch.Tensor
    log_probs: torch.Tensor
    final_latents: torch.Tensor
    activations: RolloutActivations | None = None


@torch.no_grad()
def sample_rollout(
    policy: DiffusionPolicy,
    transformer: nn.Module,
    embeds: dict[str, torch.Tensor],
    generators: list[torch.Generator],
    options: SamplingOptions,
    *,
    sigmas: torch.Tensor,
    trained_steps: tuple[int, ...],
    noise_level: float,
    dynamics: str,
    batch_size: int,
    on_batch: Callable[[int, list[Image.Image]], None] | None = None,
    keep_activations: bool = False,
) -> Rollout:
    """
    Samples images: stochastic at the trained steps, by the ODE at the others.

    An image takes all its random numbers from its own generator, so it does not depend on the other images.

    Args:
        policy ([`~policies.DiffusionPolicy`]):
            The policy.
        transformer (`torch.nn.Module`):
            Its transformer, or what wraps it in training.
        embeds (`dict[str, torch.Tensor]`):
            Embeddings of the prompts, a row per image, on any device: those of a batch are moved to the transformer's.
        generators (`list[torch.Generator]` of length `n`):
            One per image: it draws the first latents, then the noise of each trained step.
        options ([`~policies.SamplingOptions`]):
            Size, number of steps and guidance.
        sigmas (`torch.Tensor` of shape `(num_inference_steps + 1,)`):
            Noise levels, from the policy.
        trained_steps (`tuple[int, ...]` of length `K`):
            Indices of the stochastic steps, ascending, without the last step. Empty: the ODE sampler.
        noise_level (`float`):
            Noise of the trained steps; at 0 the images are the pipeline's.
        dynamics (`str`):
            See [`~sde.sde_step`].
        batch_size (`int`):
            Images per forward pass of the transformer and of the VAE's decoder.
        on_batch (`Callable[[int, list[Image]], None]`, *optional*):
            Called with the row of the first image and the images of each batch, once they are drawn.
        keep_activations (`bool`, *optional*, defaults to `False`):
            Whether to keep the outputs of the transformer's blocks at the trained steps.

    Returns:
        [`Rollout`]: On the device of the latents.

    Raises:
        `ValueError`: If rows and generators differ in number, or `trained_steps` is not as above.
    """
    num_steps, num_images = len(sigmas) - 1, len(generators)
    _check_sizes(num_steps, trained_steps, num_images, embeds)
    activations = RolloutActivations(policy.transformer, num_images, len(trained_steps)) if keep_activations else None
    batches = []
    for start in range(0, num_images, batch_size):
        rows = slice(start, start + batch_size)
        latents = policy.prepare_latents(generators[rows], options)  # (n, image_seq_len, num_channels)
        batch_embeds = move_embeds({name: tensor[rows] for name, tensor in embeds.items()}, latents.device)
        device_sigmas = sigmas.to(latents.device)  # moved once instead of at every step
        before = latents.new_empty(len(latents), len(trained_steps), *latents.shape[1:])
        after, log_probs = torch.empty_like(before), before.new_empty(before.shape[:2])
        for step in range(num_steps):
            recording: AbstractContextManager = nullcontext()
            if activations is not None and step in trained_steps:
                recording = activations.recording(trained_steps.index(step), rows)
            with recording:
                velocity = policy.predict_velocity(transformer, latents, device_sigmas[step], batch_embeds, options)
            output = sde_step(
                velocity,
                latents,
                sigmas[step],
                sigmas[step + 1],
                noise_level if step in trained_steps else 0.0,
                dynamics=dynamics,
                sigma_max=sigmas[1] if step == 0 else None,
                generator=generators[rows],
            )
            if step in trained_steps:
                k = trained_steps.index(step)
                before[:, k], after[:, k], log_probs[:, k] = latents, output.next_latents, output.log_probs
            latents = output.next_latents
        batches.append(Rollout(policy.decode_latents(latents, options), before, after, log_probs, latents))
        if on_batch is not None:
            on_batch(start, batches[-1].images)
    return Rollout(
        images=[image for batch in batches for image in batch.images],
        latents=torch.cat([batch.latents for batch in batches]),
        next_latents=torch.cat([batch.next_latents for batch in batches]),
        log_probs=torch.cat([batch.log_probs for batch in batches]),
        final_latents=torch.cat([batch.final_latents for batch in batches]),
        activations=activations,
    )


def _check_sizes(
    num_steps: int, trained_steps: tuple[int, ...], num_images: int, embeds: dict[str, torch.Tensor]
) -> None:
    if list(trained_steps) != sorted(set(trained_steps) & set(range(num_steps - 1))):
        raise ValueError(
            f"`trained_steps={trained_steps}` must be ascending indices from 0 to {num_steps - 2}: the last of "
            f"{num_steps} steps is never stochastic."
        )
    num_rows = {len(rows) for rows in embeds.values()}
    if num_rows != {num_images}:
        raise ValueError(
            f"Got {num_images} generators and embeddings of {sorted(num_rows)} rows; pass one of each per image."
        )


def rollout_prompts(num_rows: int, num_prompts: int, rollout_index: int, *, seed: int) -> list[int]:
    """
    Chooses the rows of a rollout's prompts, for all processes, from its arguments alone, so that a resumed run continues
    with the right ones.

    An epoch visits every row once, in its own order. Its last rollout is filled up from further permutations, so that
    all rollouts have the same size and no row is left out.
    """
    epoch, position = divmod(rollout_index, num_rollouts_per_epoch(num_rows, num_prompts))
    start, stop = position * num_prompts, (position + 1) * num_prompts
    permutations = [
        np.random.default_rng([seed, epoch, number]).permutation(num_rows)
        for number in range(start // num_rows, -(-stop // num_rows))
    ]
    offset = start // num_rows * num_rows
    return np.concatenate(permutations)[start - offset : stop - offset].tolist()


def num_rollouts_per_epoch(num_rows: int, num_prompts: int) -> int:
    """Number of rollouts it takes to visit every row."""
    return -(-num_rows // num_prompts)
