"""Oracles: autograd of the written-out loss in float64, the limit of a small beta, and toys whose optimum is known."""

import math

import pytest
import torch

from trl_spatial.diffusion_grpo.dpo.losses import diffusion_dpo_loss


SHAPE = (3, 16, 4)


def random_velocities(seed=0, spread=1.0):
    """Velocity, reference and target of the chosen and of the rejected images, in the order of the arguments."""
    generator = torch.Generator().manual_seed(seed)
    reference, other_reference, target, other_target, moved, other_moved = torch.randn(6, *SHAPE, generator=generator)
    velocities = (reference + spread * moved, other_reference + spread * other_moved)
    return [velocities[0], reference, target, velocities[1], other_reference, other_target]


def written_out(v_w, ref_w, u_w, v_l, ref_l, u_l, beta):
    """The paper's formula term by term, in float64."""

    def error(velocity, target):
        return ((velocity.double() - target.double()) ** 2).mean(dim=(1, 2))

    inner = (error(v_w, u_w) - error(ref_w, u_w)) - (error(v_l, u_l) - error(ref_l, u_l))
    return -torch.log(1 / (1 + torch.exp(beta / 2 * inner)))


@pytest.mark.parametrize(("beta", "spread"), [(0.5, 1.0), (10.0, 0.3), (2000.0, 1e-3)])
def test_loss_and_gradient_are_those_of_the_formula(beta, spread):
    arguments = random_velocities(spread=spread)
    ours, theirs = ([tensor.clone().requires_grad_() for tensor in arguments] for _ in range(2))
    output, expected = diffusion_dpo_loss(*ours, beta), written_out(*theirs, beta)
    torch.testing.assert_close(output.loss.double(), expected, rtol=1e-5, atol=1e-6)
    for position in (0, 3):
        (gradient,) = torch.autograd.grad(output.loss.sum(), ours[position], retain_graph=True)
        (reference,) = torch.autograd.grad(expected.sum(), theirs[position], retain_graph=True)
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-6 * beta)


def test_rewards_are_how_much_closer_the_policy_is_and_make_the_loss():
    velocity, reference, target, *rejected = random_velocities()
    output = diffusion_dpo_loss(velocity, reference, target, *rejected, beta=3.0)
    gain = ((reference - target) ** 2).mean((1, 2)) - ((velocity - target) ** 2).mean((1, 2))
    torch.testing.assert_close(output.chosen_rewards, 1.5 * gain)
    margins = output.chosen_rewards - output.rejected_rewards
    torch.testing.assert_close(output.loss, torch.log1p(torch.exp(-margins)))
    assert not output.chosen_rewards.requires_grad


def test_at_the_reference_the_loss_is_exactly_log_2():
    _, chosen_reference, chosen_target, _, rejected_reference, rejected_target = random_velocities()
    output = diffusion_dpo_loss(
        chosen_reference.clone(), chosen_reference, chosen_target,
        rejected_reference.clone(), rejected_reference, rejected_target, beta=5000.0,
    )  # fmt: skip
    assert output.loss.equal(torch.full((3,), math.log(2)))


def test_equal_images_have_nothing_to_prefer():
    velocity, reference, target = random_velocities()[:3]
    velocity.requires_grad_()
    output = diffusion_dpo_loss(velocity, reference, target, velocity, reference, target, beta=2000.0)
    assert output.loss.equal(torch.full((3,), math.log(2)))
    output.loss.sum().backward()
    assert velocity.grad.abs().max() < 1e-5  # of terms of the size of beta over the number of elements, 30


def test_a_small_beta_is_learning_from_the_chosen_and_unlearning_the_rejected():
    beta = 1e-4
    arguments = random_velocities()
    arguments[0].requires_grad_(), arguments[3].requires_grad_()
    output = diffusion_dpo_loss(*arguments, beta=beta)
    torch.testing.assert_close(output.loss, torch.full((3,), math.log(2)), rtol=0, atol=1e-3)
    output.loss.sum().backward()
    num_elements = SHAPE[1] * SHAPE[2]
    for sign, velocity, target in ((1, arguments[0], arguments[2]), (-1, arguments[3], arguments[5])):
        expected = (
            sign * (velocity - target) / num_elements / 2
        )  # half of the gradient of the mean squared error, over two
        torch.testing.assert_close(velocity.grad / beta, expected.detach(), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("share", [0.9, 0.6, 0.5])
def test_the_optimum_of_a_contested_pair(share):
    # One velocity for both images: a share of the votes prefers the first. Bradley and Terry's probability is then the share.
    beta, first, second, reference = 4.0, torch.full((1, 1, 1), 1.0), torch.full((1, 1, 1), -0.5), torch.tensor(0.2)
    velocity = torch.zeros(1, 1, 1, requires_grad=True)
    optimizer = torch.optim.SGD([velocity], lr=0.2)
    for _ in range(500):
        optimizer.zero_grad()
        kept = reference.expand(1, 1, 1)
        agree = diffusion_dpo_loss(velocity, kept, first, velocity, kept, second, beta).loss
        disagree = diffusion_dpo_loss(velocity, kept, second, velocity, kept, first, beta).loss
        (share * agree + (1 - share) * disagree).sum().backward()
        optimizer.step()
    expected = reference + math.log(share / (1 - share)) / (beta * (first - second))
    torch.testing.assert_close(velocity.detach(), expected, rtol=0, atol=1e-4)


def test_other_shapes_are_an_error():
    arguments = random_velocities()
    with pytest.raises(ValueError, match=r"shapes \[.*\(1, 16, 4\)"):
        diffusion_dpo_loss(*arguments[:5], arguments[5][:1], beta=1.0)
