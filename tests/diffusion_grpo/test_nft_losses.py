"""Oracles: the paper's formulas in the space of images, by autograd; limits; a world of two images whose optimum is known."""

import pytest
import torch

from trl_spatial.diffusion_grpo.nft.losses import nft_loss


SHAPE = (5, 6, 4)
SIGMA = torch.tensor([1.0, 0.9, 0.5, 0.3, 0.1])
ADVANTAGES = torch.tensor([1.5, -0.5, 0.0, 2.0, -7.0])  # the last one beyond the clip


def draw(seed, *shape):
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient_of(function, velocity):
    velocity = velocity.clone().requires_grad_()
    return torch.autograd.grad(function(velocity).sum(), velocity)[0]


@pytest.mark.parametrize("mixing", [1.0, 0.1])
@pytest.mark.parametrize("clip", [5.0, 1.0])
def test_is_the_papers_loss_in_the_space_of_images(mixing, clip):
    image, noise, old, velocity = (draw(seed) for seed in range(4))
    sigma = SIGMA.double()[:, None, None]
    noisy = (1 - sigma) * image + sigma * noise

    def written_out(velocity):
        total = torch.zeros(len(image), dtype=torch.float64)
        optimality = (ADVANTAGES.double() / clip).clip(-1, 1) / 2 + 1 / 2
        for weight, sign in ((optimality, 1), (1 - optimality, -1)):
            implicit = old + sign * mixing * (velocity - old)
            predicted = noisy - sigma * implicit
            size = (predicted - image).abs().mean(dim=(1, 2)).detach()
            total = total + weight * ((predicted - image) ** 2).mean(dim=(1, 2)) / size
        return clip / mixing * total

    def ours(velocity):
        return nft_loss(velocity, old, noise - image, SIGMA, ADVANTAGES, mixing, clip).loss

    torch.testing.assert_close(ours(velocity), written_out(velocity).float(), rtol=1e-5, atol=1e-6)
    expected = gradient_of(written_out, velocity)
    torch.testing.assert_close(
        gradient_of(ours, velocity), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item()
    )


@pytest.mark.parametrize("mixing", [1.0, 0.25])
@pytest.mark.parametrize("clip", [5.0, 2.0])
def test_at_the_old_policy_the_gradient_is_the_advantage_times_that_of_flow_matching(mixing, clip):
    """Neither the mixing nor the clip matters there: only where the policy is drawn to."""
    old, target = draw(0).float(), draw(1).float()
    advantages = ADVANTAGES.clamp(-clip, clip)
    gradient = gradient_of(lambda velocity: nft_loss(velocity, old, target, SIGMA, advantages, mixing, clip).loss, old)

    def flow_matching(velocity):
        size = (old - target).abs().mean(dim=(1, 2))
        return advantages * SIGMA * ((velocity - target) ** 2).mean(dim=(1, 2)) / size

    torch.testing.assert_close(gradient, gradient_of(flow_matching, old), rtol=1e-5, atol=1e-7)


def test_without_a_preference_the_policy_is_drawn_back_to_the_old_one():
    old, target, step = draw(0).float(), draw(1).float(), 0.3 * draw(2).float()
    gradient = gradient_of(
        lambda velocity: nft_loss(velocity, old, target, SIGMA, torch.zeros(5), 0.5).loss, old + step
    )
    assert ((gradient * step).sum(dim=(1, 2)) > 0).all()


def test_without_a_preference_there_is_no_gradient_at_the_old_policy():
    old, target = draw(0).float(), draw(1).float()
    gradient = gradient_of(lambda velocity: nft_loss(velocity, old, target, SIGMA, torch.zeros(5), 0.5).loss, old)
    assert gradient.abs().max() == 0


def test_without_a_preference_the_gradient_vanishes_with_the_mixing():
    """Elsewhere, too: as the first power of it."""
    old, target, velocity = (draw(seed).float() for seed in range(3))

    def size(mixing):
        def loss(velocity):
            return nft_loss(velocity, old, target, SIGMA, torch.zeros(5), mixing).loss

        return gradient_of(loss, velocity).norm().item()

    assert size(0.02) == pytest.approx(2 * size(0.01), rel=0.05)
    assert size(0.01) < 0.05 * size(1.0)


def test_an_advantage_beyond_the_clip_counts_as_the_clip():
    old, target, velocity = (draw(seed).float() for seed in range(3))
    losses, optimality = zip(
        *(
            (output.loss, output.optimality)
            for factor in (1.0, 100.0)
            for output in [nft_loss(velocity, old, target, SIGMA, factor * 5 * torch.ones(5), 1.0)]
        ),
        strict=True,
    )
    torch.testing.assert_close(*losses)
    assert torch.cat(optimality).tolist() == [1.0] * 10


class TestTwoImages:
    """
    Latents that may come from either of two images, `a` and `-a`, the first a good one and the second a bad one. The old
    policy knows no better than their mean, 0. In the theory the policy's image is `a / b`: the better velocity then gives the
    good image for certain, and the worse one the bad image.
    """

    A = torch.tensor([0.7, -0.7, 0.7, 0.7])[None, None]
    SIGMA = 0.6
    NOISY = torch.tensor([0.1, 0.2, -0.3, 0.4])[None, None]

    def gradient(self, image, mixing, advantage):
        """By the image that the policy predicts."""
        images = torch.cat([self.A, -self.A])
        targets = (self.NOISY - images) / self.SIGMA  # noise minus image
        old = (self.NOISY / self.SIGMA).expand(2, -1, -1)
        advantages = torch.tensor([advantage, -advantage])

        def loss(image):
            velocity = ((self.NOISY - image) / self.SIGMA).expand(2, -1, -1)
            return nft_loss(velocity, old, targets, torch.full((2,), self.SIGMA), advantages, mixing).loss

        return gradient_of(loss, image)

    @pytest.mark.parametrize("mixing", [1.0, 0.5])
    @pytest.mark.parametrize("advantage", [5.0, 1.0])
    def test_descent_ends_at_the_optimum(self, mixing, advantage):
        image = torch.zeros_like(self.A)
        for step in range(300):
            image = image - 0.2 * 0.97**step * self.gradient(image, mixing, advantage)
        torch.testing.assert_close(image, self.A / mixing, rtol=0, atol=2e-3)

    def test_equal_advantages_move_nothing(self):
        for image in (0 * self.A, 0.3 * self.A, -0.9 * self.A):
            assert self.gradient(image, 1.0, 0.0).abs().max() < 1e-5  # of 2.5

    def test_a_bad_image_pushes_away_where_there_is_no_good_one(self):
        """Two equal images, both bad: the policy moves to the other side of the old one."""
        target = (self.NOISY - self.A) / self.SIGMA
        old = self.NOISY / self.SIGMA

        def loss(velocity):
            return nft_loss(velocity, old, target, torch.tensor([self.SIGMA]), torch.tensor([-2.0]), 1.0).loss

        moved = old - 0.1 * gradient_of(loss, old)
        assert (moved - target).norm() > (old - target).norm()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": torch.zeros(5, 6, 3)}, "velocity, old_velocity and target have shapes"),
        ({"sigma": torch.ones(())}, "use one value for each of 5 images"),
        ({"advantages": torch.ones(4)}, "use one value for each of 5 images"),
    ],
)
def test_wrong_shapes_are_named(changes, message):
    tensors = {
        **dict.fromkeys(("velocity", "old_velocity", "target"), torch.zeros(SHAPE)),
        **dict.fromkeys(("sigma", "advantages"), torch.ones(5)),
    }
    with pytest.raises(ValueError, match=message):
        nft_loss(**(tensors | changes), mixing=1.0)
