"""The loss of a trained denoising step, by the switches of the configuration."""

import math
from dataclasses import dataclass

import torch

from .losses import PolicyLossOutput, clipped_policy_loss, gaussian_kl, kl_mask, normalized_log_ratio, velocity_kl


@dataclass
class ScoredStep:
    """
    A denoising step of `n` images as one set of weights scores it: the policy's, or the reference's.

    Args:
        velocity (`torch.Tensor` of shape `(n, image_seq_len, num_channels)`):
            Predicted velocity.
        mean (`torch.Tensor` of shape `(n, image_seq_len, num_channels)`):
            Mean of the step.
        std (`torch.Tensor` of shape `(n,)`):
            Standard deviation of the step.
        log_probs (`torch.Tensor` of shape `(n,)`):
            Log-probs of the latents that were sampled.
    """

    velocity: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    log_probs: torch.Tensor


def policy_objective(
    scored: ScoredStep,
    old_log_probs: torch.Tensor,
    old_mean: torch.Tensor | None,
    advantages: torch.Tensor,
    *,
    epsilon: float,
    epsilon_high: float | None = None,
    ratio_norm: bool = False,
    mask_threshold: float | None = None,
    step_weight: float = 1.0,
) -> PolicyLossOutput:
    """
    Policy loss of every image: clipped, clipped after ratio normalisation, or masked.

    Args:
        scored ([`ScoredStep`]):
            The step under the policy.
        old_log_probs (`torch.Tensor` of shape `(n,)`):
            Log-probs under the old policy.
        old_mean (`torch.Tensor` of shape `(n, image_seq_len, num_channels)`, *optional*):
            Mean of the step under the old policy, for `ratio_norm` and `mask_threshold`.
        advantages (`torch.Tensor` of shape `(n,)`):
            Advantages.
        epsilon (`float`), epsilon_high (`float`, *optional*):
            Clip range.
        ratio_norm (`bool`, *optional*, defaults to `False`):
            Whether to use [`normalized_log_ratio`] and `step_weight`.
        mask_threshold (`float`, *optional*):
            If given, [`kl_mask`] takes the place of the clip.
        step_weight (`float`, *optional*, defaults to `1.0`):
            Weight of this denoising step, for `ratio_norm`.

    Returns:
        [`PolicyLossOutput`]: A term that the mask drops counts as clipped.
    """
    if not ratio_norm and mask_threshold is None:
        return clipped_policy_loss(scored.log_probs, old_log_probs, advantages, epsilon, epsilon_high)
    if old_mean is None:
        raise ValueError("`old_mean` is None. Pass the means of the old policy: `ratio_norm` and the mask need them.")
    if mask_threshold is None:
        log_ratio = normalized_log_ratio(scored.log_probs - old_log_probs, scored.mean, old_mean, scored.std)
        output = clipped_policy_loss(log_ratio, torch.zeros_like(log_ratio), advantages, epsilon, epsilon_high)
        output.loss = output.loss * step_weight
        return output
    output = clipped_policy_loss(scored.log_probs, old_log_probs, advantages, math.inf)
    log_ratio = (scored.log_probs - old_log_probs).detach()
    is_kept = kl_mask(log_ratio, advantages, scored.mean.detach(), old_mean, scored.std, mask_threshold)
    output.loss = output.loss * is_kept
    output.is_clipped_low, output.is_clipped_high = ~is_kept & (advantages < 0), ~is_kept & (advantages > 0)
    return output


def reference_kl(scored: ScoredStep, reference: ScoredStep, estimator: str) -> torch.Tensor:
    """KL divergence of the policy from the reference, of shape `(n,)`; `estimator` is `"exact"` or `"velocity"`."""
    if estimator == "velocity":
        return velocity_kl(scored.velocity, reference.velocity)
    return gaussian_kl(scored.mean, reference.mean, scored.std)
