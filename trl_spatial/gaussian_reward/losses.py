import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def gaussian_bradley_terry_loss(
    chosen_mean: torch.Tensor,
    chosen_log_std: torch.Tensor,
    rejected_mean: torch.Tensor,
    rejected_log_std: torch.Tensor,
    *,
    objective: str = "expected_nll",
    estimator: str = "closed_form",
    num_samples: int = 1000,
    generator: torch.Generator | None = None,
    margin: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    Bradley-Terry loss for rewards that are Gaussian instead of single numbers.

    With independent rewards the difference of a pair is \\( z \sim \mathcal{N}(d, s^2) \\), where \\( d \\) is the
    difference of the means (less the margin) and \\( s^2 \\) the sum of the variances. As \\( s \to 0 \\) both
    objectives become TRL's `-logsigmoid(d)`, exactly.

    Proposed by [HPSv3](https://huggingface.co/papers/2508.03789) and used by
    [SpatialScore](https://huggingface.co/papers/2602.24233).

    Args:
        chosen_mean (`torch.Tensor` of shape `(batch,)`):
            Mean reward of the chosen images.
        chosen_log_std (`torch.Tensor` of shape `(batch,)`):
            Logarithm of the standard deviation of the reward of the chosen images.
        rejected_mean (`torch.Tensor` of shape `(batch,)`):
            Mean reward of the rejected images.
        rejected_log_std (`torch.Tensor` of shape `(batch,)`):
            Logarithm of the standard deviation of the reward of the rejected images.
        objective (`str`, *optional*, defaults to `"expected_nll"`):
            - `"expected_nll"`: \\( \mathbb{E}[-\log \sigma(z)] \\), the papers' objective. Convex in \\( z \\), so
              that a smaller std lowers the loss of *every* pair.
            - `"marginal_nll"`: \\( -\log \mathbb{E}[\sigma(z)] \\), the negative log-likelihood of the preference. A
              larger std lowers the loss of a pair in the wrong order, so the std can represent noise.
        estimator (`str`, *optional*, defaults to `"closed_form"`):
            - `"closed_form"`: without sampling. The expectations have no elementary form, so a fixed quadrature rule
              gives them, and their gradients, to 1e-6 in float64 and 1e-5 in float32 while the std of each reward is
              at most 20 (a log std of 3). Beyond that they stay finite but lose digits: the marginal loss is off by
              1e-4 at 60 and by 1 % at 1000.
            - `"monte_carlo"`: mean over `num_samples` samples, as in the papers, but drawn in antithetic pairs: with
              independent samples the gradient of a small std often has the wrong sign. Unbiased for
              `"expected_nll"`; the logarithm biases `"marginal_nll"` by a term of order `1 / num_samples`.
        num_samples (`int`, *optional*, defaults to `1000`):
            Number of samples per pair. Used only by the `"monte_carlo"` estimator.
        generator (`torch.Generator`, *optional*):
            Source of the samples. Used only by the `"monte_carlo"` estimator.
        margin (`torch.Tensor` of shape `(batch,)`, *optional*):
            Margin by which the chosen mean should exceed the rejected mean.

    Returns:
        `torch.Tensor` of shape `(batch,)`:
            Loss per pair, in float32. Half-precision inputs are raised to it; float64 inputs keep their precision.

    Raises:
        `ValueError`: If the shapes differ, or `objective`, `estimator` or `num_samples` is not one of the above.

    Example:

    ```python
    >>> import torch
    >>> from trl_spatial.gaussian_reward.losses import gaussian_bradley_terry_loss

    >>> mean, log_std = torch.tensor([1.0, -1.0]), torch.tensor([0.0, 0.0])
    >>> gaussian_bradley_terry_loss(mean, log_std, -mean, log_std)
    tensor([0.2412, 2.2412])
    ```
    """
    _check_shapes(chosen_mean, chosen_log_std, rejected_mean, rejected_log_std, margin)
    mean = _raise_precision(chosen_mean) - _raise_precision(rejected_mean)
    if margin is not None:
        mean = mean - margin.to(mean)
    std = _difference_std(chosen_log_std, rejected_log_std)

    if estimator == "closed_form":
        normal = _normal_quadrature(mean)
    elif estimator == "monte_carlo":
        normal = _normal_samples(mean, num_samples, generator)
    else:
        raise ValueError(f"Unknown estimator {estimator!r}: use 'closed_form' or 'monte_carlo'.")

    if objective == "expected_nll":
        return _expected_nll(mean, std, normal)
    if objective == "marginal_nll":
        return -F.logsigmoid(_preference_logit(mean, std, normal))
    raise ValueError(f"Unknown objective {objective!r}: use 'expected_nll' or 'marginal_nll'.")


def preference_probability(
    chosen_mean: torch.Tensor,
    chosen_log_std: torch.Tensor,
    rejected_mean: torch.Tensor,
    rejected_log_std: torch.Tensor,
) -> torch.Tensor:
    r"""
    Probability \\( P = \mathbb{E}[\sigma(z)] \\) that the chosen image is preferred to the rejected one.

    It is `exp(-loss)` of [`gaussian_bradley_terry_loss`] with `objective="marginal_nll"`. Swapping the images of a
    pair maps \\( P \\) to \\( 1 - P \\).

    Args:
        chosen_mean (`torch.Tensor` of shape `(batch,)`):
            Mean reward of the chosen images.
        chosen_log_std (`torch.Tensor` of shape `(batch,)`):
            Logarithm of the standard deviation of the reward of the chosen images.
        rejected_mean (`torch.Tensor` of shape `(batch,)`):
            Mean reward of the rejected images.
        rejected_log_std (`torch.Tensor` of shape `(batch,)`):
            Logarithm of the standard deviation of the reward of the rejected images.

    Returns:
        `torch.Tensor` of shape `(batch,)`:
            Probability per pair, in `[0, 1]`, in float32 (float64 for float64 inputs).

    Raises:
        `ValueError`: If the shapes differ.

    Example:

    ```python
    >>> import torch
    >>> from trl_spatial.gaussian_reward.losses import preference_probability

    >>> mean, log_std = torch.tensor([1.0, 1.0]), torch.tensor([-4.0, 3.0])
    >>> preference_probability(mean, log_std, -mean, log_std)
    tensor([0.8808, 0.5280])
    ```
    """
    _check_shapes(chosen_mean, chosen_log_std, rejected_mean, rejected_log_std)
    mean = _raise_precision(chosen_mean) - _raise_precision(rejected_mean)
    std = _difference_std(chosen_log_std, rejected_log_std)
    return _preference_logit(mean, std, _normal_quadrature(mean)).sigmoid()


@dataclass
class _StandardNormal:
    """
    Weighted points that represent a standard normal: `(log_weights.exp() * f(points)).sum(-1)` approximates `E[f(x)]`. `points`
    have the shape `(num_points,)` or `(batch, num_points)`; the weights sum to 1.
    """

    points: torch.Tensor
    log_weights: torch.Tensor


def _normal_quadrature(like: torch.Tensor) -> _StandardNormal:
    # The trapezoidal rule converges exponentially for functions analytic around the real line. The nearest poles of
    # sigmoid(d + s * x) lie pi / s from it, so the error is about exp(-2 * pi**2 / (s * step)): a step of 1 / 32 (an
    # exact binary number) is ample for s = 28, two rewards of std 20. In the tail the integrand peaks up to
    # sqrt(abs(d)) away from 0: 10 standard deviations to each side reach beyond the peak at d = 40.
    points = torch.linspace(-10, 10, 641, dtype=like.dtype, device=like.device)
    return _StandardNormal(points, torch.log_softmax(-(points**2) / 2, dim=0))


def _normal_samples(like: torch.Tensor, num_samples: int, generator: torch.Generator | None) -> _StandardNormal:
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}: use at least 1.")
    half = torch.randn(
        *like.shape, math.ceil(num_samples / 2), generator=generator, dtype=like.dtype, device=like.device
    )
    points = torch.cat([half, -half], dim=-1)[..., :num_samples]  # (batch, num_samples)
    return _StandardNormal(points, torch.full_like(points, -math.log(num_samples)))


def _expected_nll(mean: torch.Tensor, std: torch.Tensor, normal: _StandardNormal) -> torch.Tensor:
    # The loss of the mean plus the average excess of the points over it: exact as std -> 0. For a mean below 0,
    # softplus(-z) = softplus(z) - z and -z has no excess on average: leaving it out keeps the digits of the std's
    # gradient, which it would drown.
    sign = torch.where(mean < 0, -1, 1).to(mean)[..., None]
    z = mean[..., None] + std[..., None] * normal.points  # (batch, num_points)
    excess = F.logsigmoid(sign * mean[..., None]) - F.logsigmoid(sign * z)
    return (normal.log_weights.exp() * excess).sum(-1) - F.logsigmoid(mean)  # autocast would run a matmul in bf16


def _preference_logit(mean: torch.Tensor, std: torch.Tensor, normal: _StandardNormal) -> torch.Tensor:
    # log P - log(1 - P) keeps the digits of both tails. Each is taken relative to its value at the mean, so that the
    # logit is exactly the mean as std -> 0.
    mean = mean[..., None]
    z = mean + std[..., None] * normal.points  # (batch, num_points)
    log_chosen = torch.logsumexp(normal.log_weights + (F.logsigmoid(z) - F.logsigmoid(mean)), dim=-1)
    log_rejected = torch.logsumexp(normal.log_weights + (F.logsigmoid(-z) - F.logsigmoid(-mean)), dim=-1)
    return mean.squeeze(-1) + (log_chosen - log_rejected)


def _difference_std(chosen_log_std: torch.Tensor, rejected_log_std: torch.Tensor) -> torch.Tensor:
    # sqrt(exp(2a) + exp(2b)) without the squares, which under- or overflow long before the result does.
    return (torch.logaddexp(2 * _raise_precision(chosen_log_std), 2 * _raise_precision(rejected_log_std)) / 2).exp()


def _raise_precision(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check_shapes(
    chosen_mean: torch.Tensor,
    chosen_log_std: torch.Tensor,
    rejected_mean: torch.Tensor,
    rejected_log_std: torch.Tensor,
    margin: torch.Tensor | None = None,
) -> None:
    # (batch, 1) against (batch,) would broadcast to every chosen against every rejected.
    for name, tensor in {
        "chosen_log_std": chosen_log_std,
        "rejected_mean": rejected_mean,
        "rejected_log_std": rejected_log_std,
        "margin": margin,
    }.items():
        if tensor is not None and tensor.shape != chosen_mean.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} but chosen_mean has shape {tuple(chosen_mean.shape)}: pass "
                "tensors of the same shape (batch,), one value per pair."
            )
