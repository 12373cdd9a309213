import math
from dataclasses import dataclass

import torch


@dataclass
class PolicyLossOutput:
    """
    Clipped policy loss of each sample. Ratio and loss are float32.

    Args:
        loss (`torch.Tensor` of shape `(batch_size,)`):
            Loss per sample, to be averaged.
        ratio (`torch.Tensor` of shape `(batch_size,)`):
            Probability ratio of the policy to the one that the old log-probs are from.
        is_clipped_low, is_clipped_high (`torch.BoolTensor` of shape `(batch_size,)`):
            Where the ratio fell below the range of a negative advantage, or rose above that of a positive one, so that
            the loss has no gradient.
    """

    loss: torch.Tensor
    ratio: torch.Tensor
    is_clipped_low: torch.Tensor
    is_clipped_high: torch.Tensor


def clipped_policy_loss(
    log_probs: torch.Tensor,
    old_log_probs: torch.Tensor,
    advantages: torch.Tensor,
    epsilon: float,
    epsilon_high: float | None = None,
) -> PolicyLossOutput:
    r"""
    Clipped surrogate \\( -\min(r A, \mathrm{clip}(r, 1 - \epsilon, 1 + \epsilon_\mathrm{high}) A) \\) of
    [PPO](https://huggingface.co/papers/1707.06347), as [Flow-GRPO](https://huggingface.co/papers/2505.05470) applies it
    to a denoising step.

    With log-probs that are means over D latent elements, \\( r \\) is the joint ratio to the power 1/D, and a clip
    range means nothing without D: 1e-4 is 6.6 nats of joint log-ratio at 512² (D = 65,536) and 26 at 1024².

    Args:
        log_probs, old_log_probs (`torch.Tensor` of shape `(batch_size,)`):
            Log-probs of the samples under the policy, and under the one that drew them. With one update per rollout
            the latter are `log_probs.detach()`, and the ratio is exactly 1.
        advantages (`torch.Tensor` of shape `(batch_size,)`):
            Advantages of the samples.
        epsilon (`float`):
            Clip range below 1, and above it too without `epsilon_high`. `math.inf` clips nothing.
        epsilon_high (`float`, *optional*):
            Clip range above 1.

    Returns:
        [`PolicyLossOutput`]:
            Loss, ratio and what was clipped, per sample.

    Raises:
        `ValueError`: If the shapes differ.

    Example:

    ```python
    >>> import torch
    >>> from trl_spatial.diffusion_grpo.losses import clipped_policy_loss

    >>> log_probs, old_log_probs = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -1.5, -0.5])
    >>> clipped_policy_loss(log_probs, old_log_probs, torch.tensor([1.0, 1.0, -1.0]), epsilon=0.2).loss
    tensor([-1.0000, -1.2000,  0.8000])
    ```
    """
    shapes = [tuple(tensor.shape) for tensor in (log_probs, old_log_probs, advantages)]
    if len(set(shapes)) > 1:
        raise ValueError(f"log_probs, old_log_probs and advantages have shapes {shapes}: make them equal.")
    advantages = advantages.float()
    ratio = (log_probs.float() - old_log_probs.float()).exp()
    low, high = 1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high)
    loss = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    return PolicyLossOutput(
        loss=loss,
        ratio=ratio.detach(),
        is_clipped_low=(ratio < low) & (advantages < 0),
        is_clipped_high=(ratio > high) & (advantages > 0),
    )


def normalized_log_ratio(
    log_ratio: torch.Tensor, mean: torch.Tensor, old_mean: torch.Tensor, std: torch.Tensor
) -> torch.Tensor:
    r"""
    Log-ratio without its bias, from [GRPO-Guard](https://huggingface.co/papers/2510.22319).

    Under the policy that drew the samples, a log-ratio averaged over D latent elements has expectation
    \\( -\delta^2 / 2 \\) and spread \\( \delta / \sqrt{D} \\), where \\( \delta \\) is the root mean square of
    `mean - old_mean` in units of `std`. Once it exceeds 2/D the bias dominates, and the upper clip almost never triggers.
    Adding it back leaves a log-ratio of expectation 0 at every step. It is linear in `mean`.

    Args:
        log_ratio (`torch.Tensor` of shape `(batch_size,)`):
            `log_probs - old_log_probs`.
        mean, old_mean (`torch.Tensor` of shape `(batch_size, image_seq_len, num_channels)`):
            Mean of the step under the policy, and under the one that drew the samples.
        std (`torch.Tensor` of shape `(batch_size,)`):
            Standard deviation of the step.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`:
            Log-ratio plus \\( \delta^2 / 2 \\), in float32. The step size \\( h \\) remains in it: divide the loss by
            it to give all steps equal weight.
    """
    return log_ratio.float() + gaussian_kl(mean, old_mean, std)


def kl_mask(
    log_ratio: torch.Tensor,
    advantages: torch.Tensor,
    mean: torch.Tensor,
    old_mean: torch.Tensor,
    std: torch.Tensor,
    threshold: float,
) -> torch.Tensor:
    r"""
    Terms to keep in an unclipped policy loss, from [Flow-DPPO](https://huggingface.co/papers/2606.11025).

    A term is dropped if the policy has moved away from the old one, by a KL divergence above `threshold`, and the term
    would move it further: the ratio is above 1 and its advantage positive, or below 1 and negative.

    Args:
        log_ratio (`torch.Tensor` of shape `(batch_size,)`):
            `log_probs - old_log_probs`, or the normalized one.
        advantages (`torch.Tensor` of shape `(batch_size,)`):
            Advantages of the samples.
        mean, old_mean (`torch.Tensor` of shape `(batch_size, image_seq_len, num_channels)`):
            Mean of the step under the policy, and under the one that drew the samples.
        std (`torch.Tensor` of shape `(batch_size,)`):
            Standard deviation of the step.
        threshold (`float`):
            Largest KL divergence \\( \delta^2 / 2 \\), averaged over the latent elements, at which every term is kept.
            The paper uses 1e-5.

    Returns:
        `torch.BoolTensor` of shape `(batch_size,)`:
            Whether to keep each term. Multiply the loss by it.
    """
    has_moved = gaussian_kl(mean, old_mean, std) > threshold
    moves_further = log_ratio.sign() * advantages.sign() > 0
    return ~(has_moved & moves_further)


def gaussian_kl(mean: torch.Tensor, mean_ref: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    r"""
    KL divergence \\( (\mu - \mu_\mathrm{ref})^2 / (2 s^2) \\) of two steps with the same std, averaged over the latent
    elements.

    It is exact; Flow-GRPO's code leaves the step size out of \\( s^2 \\), so that its \\( \beta \\) is weaker than
    ours by that factor: 7.4 on average at 6 steps and 512² pixels of FLUX.1.

    Args:
        mean, mean_ref (`torch.Tensor` of shape `(batch_size, image_seq_len, num_channels)`):
            Mean of the step under the policy and under the reference policy.
        std (`torch.Tensor` of shape `(batch_size,)`):
            Standard deviation of the step, above 0.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`:
            KL divergence per latent element, in float32.
    """
    return _mean_squared_error(mean, mean_ref) / (2 * std.float().square())


def velocity_kl(velocity: torch.Tensor, velocity_ref: torch.Tensor) -> torch.Tensor:
    """
    Mean squared difference of two velocities: a KL divergence that does not depend on the sampler.

    Args:
        velocity, velocity_ref (`torch.Tensor` of shape `(batch_size, image_seq_len, num_channels)`):
            Velocity predicted by the policy and by the reference policy.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`:
            Mean squared difference, in float32.
    """
    return _mean_squared_error(velocity, velocity_ref)


def velocity_ratio(velocity: torch.Tensor, velocity_ref: torch.Tensor) -> torch.Tensor:
    """
    Size of a velocity relative to the reference's. Losses that push away from bad images inflate it: a value far from 1 is a
    sign of oversaturated images.

    Args:
        velocity, velocity_ref (`torch.Tensor` of shape `(batch_size, image_seq_len, num_channels)`):
            Velocity predicted by the policy and by the reference policy.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`:
            Ratio of their norms, in float32.
    """
    return velocity.float().flatten(1).norm(dim=1) / velocity_ref.float().flatten(1).norm(dim=1)


def _mean_squared_error(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x.float() - y.float()).square().flatten(1).mean(1)


@dataclass
class ScoredStep:
    """A denoising step of `n` images, scored with one set of weights: the policy's or the reference's."""

    velocity: torch.Tensor  # (n, image_seq_len, num_channels)
    mean: torch.Tensor  # (n, image_seq_len, num_channels)
    std: torch.Tensor  # (n,)
    log_probs: torch.Tensor  # (n,), of the sampled latents


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
    Computes the policy loss of every image. By default it is clipped. With `ratio_norm`, it is clipped after
    [`normalized_log_ratio`] and multiplied by `step_weight`. With `mask_threshold`, [`kl_mask`] replaces the clip, and dropped
    terms count as clipped. The last two need `old_mean`, the mean of the step under the old policy.
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
