import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


DYNAMICS = ("flow_sde", "dance_sde", "cps", "precise")


@dataclass
class SDEStepOutput:
    """
    One step of a flow sampler, from `sigma` to `sigma_next`. Everything is float32.

    Args:
        next_latents (`torch.Tensor` of shape `(batch_size, image_seq_len, num_channels)`):
            Latents at `sigma_next`, without gradient: the ones that were given or, if none were, a sample.
        mean (`torch.Tensor` of shape `(batch_size, image_seq_len, num_channels)`):
            Mean of the Gaussian from which the next latents are drawn.
        std (`torch.Tensor` of shape `(batch_size,)`):
            Its standard deviation, the same for every latent element of an image.
        log_probs (`torch.Tensor` of shape `(batch_size,)`):
            Log-density of the next latents, averaged over the latent elements: the joint one divided by their number.
            0 where `std` is 0, as a deterministic step has no density.
    """

    next_latents: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    log_probs: torch.Tensor


def sde_step(
    velocity: torch.Tensor,
    latents: torch.Tensor,
    sigma: float | torch.Tensor,
    sigma_next: float | torch.Tensor,
    noise_level: float,
    *,
    dynamics: str = "flow_sde",
    sigma_max: float | torch.Tensor | None = None,
    next_latents: torch.Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> SDEStepOutput:
    r"""
    Sample the next latents of a flow-matching model, or score given ones.

    Latents are \\( x_t = (1 - t) x_0 + t e \\) with \\( t \\) the sigma, the velocity is \\( v = e - x_0 \\) and the
    step goes from \\( t \\) to \\( t' = t - h \\). Scoring the latents that a call sampled, with the same other
    arguments, returns its log-probs bit for bit: both use the same code.

    Args:
        velocity (`torch.Tensor` of shape `(batch_size, image_seq_len, num_channels)`):
            Velocity predicted at `latents` and `sigma`. Any shape that starts with the batch works, here and below.
        latents (`torch.Tensor` of shape `(batch_size, image_seq_len, num_channels)`):
            Latents at `sigma`.
        sigma (`float` or `torch.Tensor` of shape `()` or `(batch_size,)`):
            Current sigma, in `(0, 1]`. Sigmas are read on the CPU, so a tensor there costs no synchronization.
        sigma_next (`float` or `torch.Tensor` of shape `()` or `(batch_size,)`):
            Next sigma, in `[0, sigma)`.
        noise_level (`float`):
            Scale of the noise that the step adds; 0 is the deterministic Euler step.
        dynamics (`str`, *optional*, defaults to `"flow_sde"`):
            Reverse process. The first two follow the reverse SDE with diffusion \\( g \\), whose step has mean
            \\( x - h [v + \frac{g^2}{2t} (x + (1 - t) v)] \\) and std \\( g \sqrt{h} \\), and which keeps the law of
            the latents at every sigma as \\( h \to 0 \\).

            - `"flow_sde"`: \\( g = a \sqrt{t / (1 - t)} \\) with the noise level \\( a \\), of
              [Flow-GRPO](https://huggingface.co/papers/2505.05470).
            - `"dance_sde"`: \\( g \\) is the noise level, of
              [DanceGRPO](https://huggingface.co/papers/2505.07818).
            - `"cps"`: mean \\( (1 - t') \hat{x}_0 + t' \cos(a \pi / 2) \hat{e} \\) and std
              \\( t' \sin(a \pi / 2) \\) with \\( a \\) in `[0, 1]`, of
              [Coefficients-preserving sampling](https://huggingface.co/papers/2509.05952). Leaves exactly as much noise
              as `sigma_next` says, but narrows the law of the latents.
            - `"precise"`: mean \\( (1 - t') \hat{x}_0 + t' r^{a^2 / 2} \hat{e} \\) and std
              \\( t' \sqrt{1 - r^{a^2}} \\) with \\( r = \frac{t' (1 - t)}{t (1 - t')} \\), of
              [Precise](https://huggingface.co/papers/2605.23522). The process of `"flow_sde"`, solved exactly for a fixed
              \\( \hat{x}_0 \\): it leaves exactly as much noise as `sigma_next` says, and draws all noise afresh in the
              first step.
        sigma_max (`float` or `torch.Tensor` of shape `()` or `(batch_size,)`, *optional*):
            For the first step of `"flow_sde"`, where sigma is 1 and \\( g \\) infinite: the schedule's second sigma,
            which takes the place of \\( t \\) in the denominator, so that the std is the noise level whatever the
            schedule. The other dynamics do not read it.
        next_latents (`torch.Tensor` of shape `(batch_size, image_seq_len, num_channels)`, *optional*):
            Latents at `sigma_next` to score. They are sampled if not given. Keep them in float32: rounding to bfloat16
            moves the log-prob by about 1e-5, as much as a clip range.
        generator (`torch.Generator` or sequence of `batch_size` of them, *optional*):
            Source of the noise, on any device. Noise is drawn for one image after the other: with one generator per
            image, an image does not depend on its batch.

    Returns:
        [`SDEStepOutput`]:
            Next latents, mean, std and log-probs. Gradients flow through `mean` and `log_probs`.

    Raises:
        `ValueError`: If an argument is outside of its range, `sigma` is 1 in `"flow_sde"` without `sigma_max`, the
            number of generators is not the batch size, or a deterministic step is to be scored.

    Example:

    ```python
    >>> import torch
    >>> from trl_spatial.diffusion_grpo.sde import sde_step

    >>> generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    >>> velocity, latents = torch.ones(2, 16, 4), torch.zeros(2, 16, 4)
    >>> sampled = sde_step(velocity, latents, 0.9, 0.8, 0.7, generator=generators)
    >>> scored = sde_step(velocity, latents, 0.9, 0.8, 0.7, next_latents=sampled.next_latents)
    >>> scored.log_probs == sampled.log_probs
    tensor([True, True])
    ```
    """
    velocity, latents = velocity.float(), latents.float()  # (batch_size, image_seq_len, num_channels)
    for name, tensor in (("velocity", velocity), ("next_latents", next_latents)):
        if tensor is not None and tensor.shape != latents.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}: use that of latents, {tuple(latents.shape)}.")
    batch_size = len(latents)
    t, t_next = _per_image(sigma, "sigma", batch_size), _per_image(sigma_next, "sigma_next", batch_size)
    _check_sigmas(t, t_next)
    t_max = t if sigma_max is None else _per_image(sigma_max, "sigma_max", batch_size)
    transition = _transition(t, t_next, t_max, noise_level, dynamics)
    if next_latents is not None and not transition.std.all():
        raise ValueError(
            f"A step with noise_level={noise_level}, dynamics={dynamics!r} and sigma_next={sigma_next} is deterministic "
            "and has no density: score only the stochastic steps."
        )

    # Moved to the latents' device together: each separate copy from CPU memory would wait for the device.
    weights = _move(transition.stack(), latents.device).view(5, -1, *[1] * (latents.ndim - 1))
    latents_weight, velocity_weight, std, double_variance, log_density_at_mean = weights  # (batch_size, 1, 1) each
    mean = latents_weight * latents + velocity_weight * velocity
    if next_latents is None:
        next_latents = (mean + std * _noise(latents, generator) if transition.std.any() else mean).detach()
    next_latents = next_latents.to(mean)
    squared_error = (next_latents - mean).square().flatten(1).mean(1)  # (batch_size,)
    std = std.flatten()
    log_probs = log_density_at_mean.flatten() - squared_error / double_variance.flatten()
    return SDEStepOutput(next_latents, mean, std, log_probs.masked_fill(std == 0, 0))


def sde_window(
    num_inference_steps: int,
    window_size: int | None,
    window_range: Sequence[int] | None,
    *,
    seed: int,
    rollout_index: int,
) -> tuple[int, ...]:
    """
    Denoising steps that are stochastic and trained; all others are deterministic.

    The last step is never among them: its noise would remain in the image. A window is the same for all images and on
    every process, as it depends on the arguments only.

    Args:
        num_inference_steps (`int`):
            Number of denoising steps.
        window_size (`int` or `None`):
            Number of consecutive steps. If `None`, all steps but the last.
        window_range (sequence of two `int`, or `None`):
            First step of the range in which the window lies, and the step that follows its last. If `None`, the first
            half of the steps, or as many of the first as the window needs. Not used without a `window_size`.
        seed (`int`):
            Seed of the run.
        rollout_index (`int`):
            Index of the rollout since the start of training. Each rollout has its own window.

    Returns:
        `tuple[int, ...]`:
            Indices of the steps, ascending.

    Raises:
        `ValueError`: If no step is left besides the last, the window does not fit into its range, or the range does not fit
            into the steps.

    Example:

    ```python
    >>> from trl_spatial.diffusion_grpo.sde import sde_window

    >>> sde_window(6, None, None, seed=0, rollout_index=0)
    (0, 1, 2, 3, 4)
    >>> [sde_window(10, 2, None, seed=0, rollout_index=index) for index in range(4)]
    [(2, 3), (0, 1), (3, 4), (3, 4)]
    ```
    """
    if num_inference_steps < 2:
        raise ValueError(f"num_inference_steps is {num_inference_steps}: use at least 2, the last is not stochastic.")
    last = num_inference_steps - 1
    if window_size is None:
        return tuple(range(last))
    if not 1 <= window_size <= last:
        raise ValueError(f"sde_window_size is {window_size}: use 1 to {last}, or None for all steps but the last.")
    start, stop = window_range or (0, max(num_inference_steps // 2, window_size))
    if not 0 <= start <= stop - window_size <= last - window_size:
        raise ValueError(
            f"sde_window_range is {(start, stop)}: a window of {window_size} steps needs a range (first, stop) with "
            f"0 <= first, first + {window_size} <= stop and stop <= {last}, as the last of {num_inference_steps} steps "
            "is not stochastic."
        )
    # SeedSequence is stable across numpy versions and mixes neighbouring seeds and indices
    draw = int(np.random.SeedSequence([seed, rollout_index]).generate_state(1)[0])
    start += draw % (stop - window_size - start + 1)
    return tuple(range(start, start + window_size))


@dataclass
class _Transition:
    """
    A Gaussian step `N(latents_weight * latents + velocity_weight * velocity, std**2)`; each is of shape
    `(batch_size,)`.
    """

    latents_weight: torch.Tensor
    velocity_weight: torch.Tensor
    std: torch.Tensor

    def stack(self) -> torch.Tensor:
        """
        Stacks the three fields, twice the variance, and the log-density at the mean: `(5, batch_size)` in float32. A step
        without noise has no density; its last two rows are those of std 1, which keeps the gradient of its log-prob finite.
        """
        std = torch.where(self.std == 0, 1, self.std)
        constant = -std.log() - math.log(2 * math.pi) / 2
        return torch.stack([self.latents_weight, self.velocity_weight, self.std, 2 * std.square(), constant]).float()


def _transition(
    t: torch.Tensor, t_next: torch.Tensor, t_max: torch.Tensor, noise_level: float, dynamics: str
) -> _Transition:
    if dynamics not in DYNAMICS:
        raise ValueError(f"Unknown dynamics {dynamics!r}: use one of {', '.join(map(repr, DYNAMICS))}.")
    if noise_level < 0 or (dynamics == "cps" and noise_level > 1):
        raise ValueError(f"noise_level is {noise_level}: use a value of at least 0, and in 'cps' at most 1.")
    if noise_level == 0:  # Euler in all dynamics; Flow-SDE's diffusion would be 0 * inf in the first step
        return _reverse_sde(t, t_next, torch.zeros_like(t))
    if dynamics == "cps":
        kept = torch.full_like(t, math.cos(noise_level * math.pi / 2))
        return _coefficients_preserving(t, t_next, kept, t_next * math.sin(noise_level * math.pi / 2))
    if dynamics == "precise":
        log_kept = (
            noise_level**2 / 2 * (t_next * (1 - t) / (t * (1 - t_next))).log()
        )  # -inf in the first and last step
        return _coefficients_preserving(t, t_next, log_kept.exp(), t_next * (-(2 * log_kept).expm1()).sqrt())
    if dynamics == "dance_sde":
        return _reverse_sde(t, t_next, torch.full_like(t, noise_level**2))
    # sigmas fall, so the minimum replaces the t of the first step only, without comparing floats for equality
    t_denominator = torch.minimum(t, t_max)
    if (t_denominator >= 1).any():
        raise ValueError(
            "sigma is 1 in a step of 'flow_sde', whose noise is infinite there: pass the schedule's second sigma as "
            "sigma_max in the first step."
        )
    return _reverse_sde(t, t_next, noise_level**2 * t / (1 - t_denominator))


def _reverse_sde(t: torch.Tensor, t_next: torch.Tensor, squared_diffusion: torch.Tensor) -> _Transition:
    h = t - t_next
    score_weight = h * squared_diffusion / (2 * t)  # of x + (1 - t) v, which is -t times the score
    return _Transition(1 - score_weight, -h - score_weight * (1 - t), (squared_diffusion * h).sqrt())


def _coefficients_preserving(
    t: torch.Tensor, t_next: torch.Tensor, kept: torch.Tensor, std: torch.Tensor
) -> _Transition:
    clean_weight = 1 - t_next  # of x - t v, the predicted image
    noise_weight = t_next * kept  # of x + (1 - t) v, the predicted noise
    return _Transition(clean_weight + noise_weight, noise_weight * (1 - t) - clean_weight * t, std)


def _noise(latents: torch.Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> torch.Tensor:
    generators = list(generator) if isinstance(generator, Sequence) else [generator] * len(latents)
    if len(generators) != len(latents):
        raise ValueError(
            f"There are {len(generators)} generators for {len(latents)} images: pass one, or one for each."
        )
    noise = [
        torch.randn(
            (1, *latents.shape[1:]),
            generator=one,
            device=one.device if one else latents.device,
            dtype=torch.float32,
        )
        for one in generators
    ]
    return _move(torch.cat(noise), latents.device)  # (batch_size, image_seq_len, num_channels)


def _move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    # CUDA has read pageable memory before this returns, so nothing has to wait for the copy.
    return tensor.to(device, non_blocking=device.type == "cuda")


def _per_image(sigma: float | torch.Tensor, name: str, batch_size: int) -> torch.Tensor:
    # Schedules are float32, and plain numbers are rounded as if they came from one, so that both give the same bits. The
    # coefficients are computed in float64 on the CPU, accurate to the last digit of float32.
    sigma = torch.as_tensor(sigma, dtype=torch.float32).to("cpu", torch.float64)  # () or (batch_size,)
    if sigma.shape not in ((), (batch_size,)):
        raise ValueError(
            f"{name} has shape {tuple(sigma.shape)}: use a number or one value for each of {batch_size} images."
        )
    return sigma.expand(batch_size).contiguous()


def _check_sigmas(t: torch.Tensor, t_next: torch.Tensor) -> None:
    if not ((t_next >= 0) & (t_next < t) & (t <= 1)).all():
        steps = ", ".join(
            f"{before:g} to {after:g}" for before, after in zip(t.tolist(), t_next.tolist(), strict=True)
        )
        raise ValueError(f"Steps from sigma {steps}: use sigmas that fall from 1 to 0.")
