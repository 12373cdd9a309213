import math

import pytest
import torch

from trl_spatial.diffusion_grpo.losses import ScoredStep, policy_objective, reference_kl
from trl_spatial.diffusion_grpo.sde import sde_step


NUM_IMAGES, SHAPE = 6, (64, 16)
ADVANTAGES = torch.tensor([1.0, -1.0, 2.0, -0.5, 0.0, 0.7])


def scored(velocity, sampled):
    output = sde_step(velocity, sampled["latents"], 0.8, 0.6, 0.9, next_latents=sampled["next_latents"])
    return ScoredStep(velocity, output.mean, output.std, output.log_probs)


@pytest.fixture
def sampled():
    """Latents that the old policy sampled, and its step."""
    generator = torch.Generator().manual_seed(0)
    latents, velocity = torch.randn(2, NUM_IMAGES, *SHAPE, generator=generator)
    output = sde_step(velocity, latents, 0.8, 0.6, 0.9, generator=generator)
    sampled = {"latents": latents, "velocity": velocity, "next_latents": output.next_latents}
    return {**sampled, "old": scored(velocity, sampled)}


@pytest.fixture
def moved(sampled):
    """The same step under a policy that has moved in a random direction."""
    direction = torch.randn(NUM_IMAGES, *SHAPE, generator=torch.Generator().manual_seed(1))
    return scored((sampled["velocity"] + 0.3 * direction).requires_grad_(), sampled)


def objective(policy, old, **kwargs):
    return policy_objective(policy, old.log_probs, old.mean, ADVANTAGES, **{"epsilon": 10.0, **kwargs})


@pytest.mark.parametrize("kwargs", [{}, {"ratio_norm": True}, {"mask_threshold": 1e-9}], ids=str)
def test_on_policy_all_variants_are_the_policy_gradient(sampled, kwargs):
    velocity = sampled["velocity"].clone().requires_grad_()
    policy = scored(velocity, sampled)
    old = ScoredStep(*(tensor.detach() for tensor in vars(policy).values()))
    output = objective(policy, old, **kwargs)
    assert torch.equal(output.ratio, torch.ones(NUM_IMAGES))
    assert not output.is_clipped_low.any() and not output.is_clipped_high.any()
    (gradient,) = torch.autograd.grad(output.loss.sum(), velocity, retain_graph=True)
    (expected,) = torch.autograd.grad(-(ADVANTAGES * policy.log_probs).sum(), velocity)
    torch.testing.assert_close(gradient, expected)


def test_normalised_log_ratio_is_linear_in_the_mean(sampled, moved):
    # log r = mean(z · d) / std - delta² / 2: what is left is the first term
    old = sampled["old"]
    std = old.std.view(-1, 1, 1)
    noise = (sampled["next_latents"] - old.mean) / std
    expected = (noise * (moved.mean - old.mean) / std).mean(dim=(1, 2))
    output = objective(moved, old, ratio_norm=True)
    torch.testing.assert_close(output.ratio.log(), expected, rtol=1e-3, atol=1e-6)
    plain = objective(moved, old)
    assert (plain.ratio < output.ratio).all()
    torch.testing.assert_close(
        objective(moved, old, ratio_norm=True, step_weight=3.0).loss, 3.0 * output.loss, rtol=1e-6, atol=0
    )


def test_the_mask_drops_what_moved_further_away(sampled, moved):
    old = sampled["old"]
    kl = ((moved.mean - old.mean) ** 2).mean(dim=(1, 2)) / (2 * old.std**2)
    threshold = kl.median().item()
    log_ratio = moved.log_probs - old.log_probs
    is_dropped = (kl > threshold) & (log_ratio * ADVANTAGES > 0)
    assert 0 < is_dropped.sum() < NUM_IMAGES
    output = objective(moved, old, mask_threshold=threshold, epsilon=1e-12)  # no clip
    expected = torch.where(is_dropped, 0.0, -log_ratio.exp() * ADVANTAGES)
    torch.testing.assert_close(output.loss, expected)
    assert torch.equal(output.is_clipped_low | output.is_clipped_high, is_dropped)
    assert not (output.is_clipped_low & (ADVANTAGES > 0)).any()


def test_kl_estimators(sampled, moved):
    old, h, t, noise_level = sampled["old"], 0.2, 0.8, 0.9
    exact, velocity = reference_kl(moved, old, "exact"), reference_kl(moved, old, "velocity")
    torch.testing.assert_close(velocity, ((moved.velocity - old.velocity) ** 2).mean(dim=(1, 2)))
    # The mean moves by -h (1 + a² / 2) per unit of velocity, and std² = a² h t / (1 - t).
    factor = (h * (1 + noise_level**2 / 2)) ** 2 / (2 * noise_level**2 * h * t / (1 - t))
    torch.testing.assert_close(exact, factor * velocity, rtol=1e-4, atol=0)
    assert math.isfinite(exact.sum().item())
