"""Oracles: PPO's objective case by case, torch.distributions, the law of large numbers, closed forms."""

import math
from itertools import pairwise

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from trl_spatial.diffusion_grpo.losses import (
    clipped_policy_loss,
    gaussian_kl,
    kl_mask,
    normalized_log_ratio,
    velocity_kl,
    velocity_ratio,
)
from trl_spatial.diffusion_grpo.sde import sde_step


def log_probs_of(ratios):
    """Old log-probs, and log-probs in the given ratio to them."""
    old_log_probs = torch.linspace(-1.1, -0.4, len(ratios))
    return (old_log_probs + torch.tensor(ratios).log()).requires_grad_(), old_log_probs


class TestClippedPolicyLoss:
    # ratio, advantage, loss, its gradient by the log-prob, clipped low, clipped high; epsilon 0.2, above 0.3
    CASES = [
        (1.0, 2.0, -2.0, -2.0, False, False),
        (1.0, -2.0, 2.0, 2.0, False, False),
        (1.1, 2.0, -2.2, -2.2, False, False),
        (0.9, -2.0, 1.8, 1.8, False, False),
        (1.25, 2.0, -2.5, -2.5, False, False),
        (1.5, 2.0, -2.6, 0.0, False, True),  # it is good enough
        (0.5, -2.0, 1.6, 0.0, True, False),  # it is bad enough
        (1.5, -2.0, 3.0, 3.0, False, False),  # got better by mistake: the way back is open
        (0.5, 2.0, -1.0, -1.0, False, False),
        (1.5, 0.0, 0.0, 0.0, False, False),
    ]

    def test_is_ppos(self):
        ratios, advantages, losses, gradients, clipped_low, clipped_high = zip(*self.CASES, strict=True)
        log_probs, old_log_probs = log_probs_of(ratios)
        output = clipped_policy_loss(log_probs, old_log_probs, torch.tensor(advantages), 0.2, 0.3)
        output.loss.sum().backward()
        torch.testing.assert_close(output.loss.detach(), torch.tensor(losses))
        torch.testing.assert_close(log_probs.grad, torch.tensor(gradients))
        torch.testing.assert_close(output.ratio, torch.tensor(ratios))
        assert output.is_clipped_low.tolist() == list(clipped_low)
        assert output.is_clipped_high.tolist() == list(clipped_high)

    def test_range_is_symmetric_without_another(self):
        log_probs, old_log_probs = log_probs_of([0.79, 0.81, 1.19, 1.21])
        up = clipped_policy_loss(log_probs, old_log_probs, torch.ones(4), 0.2)
        down = clipped_policy_loss(log_probs, old_log_probs, -torch.ones(4), 0.2)
        assert up.is_clipped_high.tolist() == [False, False, False, True]
        assert down.is_clipped_low.tolist() == [True, False, False, False]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_ratio_to_itself_is_one_and_the_gradient_the_advantage(self, dtype):
        log_probs = torch.randn(6, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        advantages = torch.linspace(-2, 2, 6)
        output = clipped_policy_loss(log_probs, log_probs.detach(), advantages, 1e-4)
        output.loss.sum().backward()
        assert output.ratio.equal(torch.ones(6))
        assert output.loss.equal(-advantages)
        assert log_probs.grad.equal(-advantages.to(dtype))
        assert not (output.is_clipped_low | output.is_clipped_high).any()

    @pytest.mark.parametrize("epsilon", [1e-4, 1e-5])
    def test_tells_a_ratio_inside_a_tiny_range_from_one_outside(self, epsilon):
        # in bfloat16 1.0001 is 1
        log_ratio = epsilon * torch.tensor([-1.2, -0.8, 0.8, 1.2], dtype=torch.float64)
        old_log_probs = torch.full((4,), -0.7)
        log_probs = (old_log_probs + log_ratio).float()
        output = clipped_policy_loss(log_probs, old_log_probs, torch.ones(4), epsilon)
        assert output.ratio.dtype == output.loss.dtype == torch.float32
        assert output.is_clipped_high.tolist() == [False, False, False, True]

    def test_without_range_is_not_clipped(self):
        log_probs, old_log_probs = log_probs_of([1e-3, 0.5, 2.0, 1e3])
        advantages = torch.tensor([-1.0, -1.0, 1.0, 1.0])
        output = clipped_policy_loss(log_probs, old_log_probs, advantages, math.inf)
        torch.testing.assert_close(output.loss, -output.ratio * advantages)
        assert not (output.is_clipped_low | output.is_clipped_high).any()

    def test_range_means_more_the_more_elements_there_are(self):
        # a clip of 1e-4 is 6.6 nats of joint log-ratio at 512² and 26 at 1024²
        for num_elements, nats in ((65_536, 6.6), (262_144, 26)):
            for joint, is_clipped in ((0.98 * nats, False), (1.02 * nats, True)):
                log_ratio = torch.tensor([joint / num_elements])
                output = clipped_policy_loss(log_ratio, torch.zeros(1), torch.ones(1), 1e-4)
                assert output.is_clipped_high.item() is is_clipped

    def test_of_different_shapes_is_an_error(self):
        with pytest.raises(ValueError, match=r"have shapes \[\(4,\), \(4,\), \(4, 1\)\]: make them equal"):
            clipped_policy_loss(torch.zeros(4), torch.zeros(4), torch.ones(4, 1), 0.2)


class TestMovedPolicy:
    """A step that is drawn from one policy and scored under another whose mean is delta standard deviations away."""

    ARGS = dict(sigma=0.6525, sigma_next=0.4842, noise_level=0.9)

    def score(self, delta, shape=(400, 256, 16), seed=0):
        """Old and new step, with the noise of a random direction."""
        generator = torch.Generator().manual_seed(seed)
        latents, velocity, direction = torch.randn(3, *shape, generator=generator)
        old = sde_step(velocity, latents, **self.ARGS, generator=generator)
        direction = direction / direction.square().mean((1, 2), keepdim=True).sqrt()
        # its mean is linear in the velocity
        slope = (0.6525 - 0.4842) * (1 + 0.9**2 / 2)
        moved = velocity + delta * old.std[:, None, None] / slope * direction
        moved.requires_grad_()
        new = sde_step(moved, latents, **self.ARGS, next_latents=old.next_latents)
        return old, new, moved

    @pytest.mark.parametrize("delta", [0.03, 0.3])
    def test_normalized_log_ratio_is_mean_free(self, delta):
        old, new, _ = self.score(delta)
        num_images, num_elements = old.mean.shape[0], old.mean[0].numel()
        log_ratio = (new.log_probs - old.log_probs).detach()
        normalized = normalized_log_ratio(log_ratio, new.mean, old.mean, new.std).detach()
        spread = delta / math.sqrt(num_elements)
        standard_error = spread / math.sqrt(num_images)
        assert log_ratio.mean().item() == pytest.approx(-(delta**2) / 2, abs=4 * standard_error)
        assert log_ratio.mean().abs() > 10 * standard_error
        assert normalized.mean().item() == pytest.approx(0, abs=4 * standard_error)
        assert normalized.std().item() == pytest.approx(spread, rel=4 / math.sqrt(2 * num_images))

    def test_upper_clip_fires_as_often_as_the_lower_one_only_after_normalization(self):
        old, new, _ = self.score(0.03)
        log_ratio = (new.log_probs - old.log_probs).detach()
        normalized = normalized_log_ratio(log_ratio, new.mean, old.mean, new.std).detach()
        zeros, ones = torch.zeros(400), torch.ones(400)

        def clip_shares(log_ratio):
            high = clipped_policy_loss(log_ratio, zeros, ones, 3e-4).is_clipped_high
            low = clipped_policy_loss(log_ratio, zeros, -ones, 3e-4).is_clipped_low
            return high.float().mean().item(), low.float().mean().item()

        high, low = clip_shares(log_ratio)
        assert high < 0.1 < 0.6 < low
        high, low = clip_shares(normalized)
        assert high == pytest.approx(low, abs=0.1)
        assert high > 0.15

    def test_normalized_log_ratio_is_linear_in_the_mean(self):
        old, new, moved = self.score(0.3, shape=(2, 8, 4))
        normalized = normalized_log_ratio(new.log_probs - old.log_probs, new.mean, old.mean, new.std)
        (gradient,) = torch.autograd.grad(normalized.sum(), new.mean)
        noise = (old.next_latents - old.mean) / old.std[:, None, None]
        expected = noise / old.std[:, None, None] / 32
        torch.testing.assert_close(gradient, expected)
        torch.testing.assert_close(normalized, ((new.mean - old.mean) * expected).sum((1, 2)), rtol=1e-3, atol=1e-6)
        assert moved.requires_grad

    def test_gaussian_kl_is_the_expectation_of_the_negative_log_ratio(self):
        old, new, _ = self.score(0.3)
        kl = gaussian_kl(old.mean, new.mean, new.std)
        torch.testing.assert_close(kl, torch.full((400,), 0.3**2 / 2), rtol=1e-4, atol=0)
        log_ratio = (old.log_probs - new.log_probs).detach()
        assert log_ratio.mean().item() == pytest.approx(kl.mean().item(), abs=4 * 0.3 / 64 / 20)

    @pytest.mark.parametrize(("delta", "threshold"), [(0.03, 1e-5), (0.03, 1e-3)])
    def test_kl_mask_drops_what_has_moved_and_moves_on(self, delta, threshold):
        old, new, _ = self.score(delta)
        log_ratio = new.log_probs - old.log_probs
        for sign in (1.0, -1.0):
            kept = kl_mask(log_ratio, torch.full((400,), sign), new.mean, old.mean, new.std, threshold)
            moves_on = (log_ratio > 0) if sign > 0 else (log_ratio < 0)
            assert 0 < moves_on.sum() < 400
            assert kept.equal(~moves_on if delta**2 / 2 > threshold else torch.ones(400, dtype=torch.bool))
        no_advantage = kl_mask(log_ratio, torch.zeros(400), new.mean, old.mean, new.std, threshold)
        assert no_advantage.all()

    def test_kl_mask_keeps_everything_of_an_unchanged_policy(self):
        old, new, _ = self.score(0.0, shape=(4, 8, 4))
        log_ratio = new.log_probs - old.log_probs
        assert kl_mask(log_ratio, torch.ones(4), new.mean, old.mean, new.std, 1e-5).all()
        assert normalized_log_ratio(log_ratio, new.mean, old.mean, new.std).equal(torch.zeros(4))


class TestKL:
    def test_gaussian_kl_is_that_of_torch(self):
        mean, mean_ref = torch.randn(2, 5, 16, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
        std = torch.tensor([0.01, 0.4, 0.9, 1.0, 3.0])
        normals = [Normal(m.double(), std.double()[:, None, None]) for m in (mean, mean_ref)]
        expected = kl_divergence(*normals).mean((1, 2)).float()
        torch.testing.assert_close(gaussian_kl(mean, mean_ref, std), expected)
        torch.testing.assert_close(gaussian_kl(mean_ref, mean, std), expected)

    def test_gaussian_kl_of_a_step_is_its_velocity_kl_by_a_factor(self):
        # Flow-SDE: (h (1 + a²/2))² / (2 a² h t / (1 - t)), Flow-GRPO's own without the h below
        (latents, velocity, velocity_ref) = torch.randn(3, 4, 16, 4, generator=torch.Generator().manual_seed(0))
        t, t_next, a = 0.6, 0.45, 0.7
        step, step_ref = (sde_step(v, latents, t, t_next, a) for v in (velocity, velocity_ref))
        factor = 0.15 * (1 + a**2 / 2) ** 2 / (2 * a**2 * t / (1 - t))
        kl = gaussian_kl(step.mean, step_ref.mean, step.std)
        torch.testing.assert_close(kl, factor * velocity_kl(velocity, velocity_ref), rtol=1e-4, atol=0)

    def test_velocity_kl_is_the_mean_squared_error(self):
        velocity, velocity_ref = torch.randn(2, 3, 8, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
        losses = [torch.nn.functional.mse_loss(*pair) for pair in zip(velocity, velocity_ref, strict=True)]
        torch.testing.assert_close(velocity_kl(velocity, velocity_ref), torch.stack(losses))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_of_equals_is_zero_in_float32_without_gradient(self, dtype):
        mean = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        for kl in (gaussian_kl(mean, mean.detach(), torch.ones(3)), velocity_kl(mean, mean.detach())):
            assert kl.dtype == torch.float32
            assert kl.equal(torch.zeros(3))
            (gradient,) = torch.autograd.grad(kl.sum(), mean)
            assert gradient.equal(torch.zeros_like(mean))


def test_the_velocity_ratio_is_how_much_longer_a_velocity_is():
    reference = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    factors = torch.tensor([1.0, 0.5, 3.0])
    torch.testing.assert_close(velocity_ratio(-factors[:, None, None] * reference, reference), factors)


def test_a_beta_of_flow_grpo_is_weaker_by_the_step_sizes():
    """Its KL divergence has the variance of the diffusion alone, at the 6 steps of FLUX.1 at 512² pixels."""
    sigmas = torch.tensor([1, 0.9037, 0.7897, 0.6525, 0.4842, 0.2730])
    velocity, reference, latents = torch.randn(3, 1, 16, 8, generator=torch.Generator().manual_seed(0)).unbind()
    factors = []
    for index, (t, t_next) in enumerate(pairwise(sigmas)):
        first = sigmas[1] if index == 0 else None
        ours, theirs = (
            sde_step(v, latents, t, t_next, 0.9, sigma_max=first, generator=torch.Generator())
            for v in (velocity, reference)
        )
        diffusion = 0.9 * (t / (1 - (t if index else sigmas[1]))).sqrt()
        divergence = (ours.mean - theirs.mean).square().mean() / (2 * diffusion.square())
        factors.append((gaussian_kl(ours.mean, theirs.mean, ours.std) / divergence).item())
    assert factors == pytest.approx([10.4, 8.8, 7.3, 5.9, 4.7], abs=0.05)
    assert sum(factors) / 5 == pytest.approx(7.4, abs=0.05)
