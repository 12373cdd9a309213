"""The loss of DiffusionNFT, a pure function of velocities."""

from dataclasses import dataclass

import torch


# Smallest mean error of an image that its loss is divided by
_SMALLEST_ERROR = 1e-5


@dataclass
class NFTLossOutput:
    """
    Loss of each image, in float32.

    Args:
        loss (`torch.Tensor` of shape `(batch_size,)`):
            Loss per image, to be averaged.
        optimality (`torch.Tensor` of shape `(batch_size,)`):
            Weight of an image as a good one, from 0 to 1; the rest is its weight as a bad one.
    """

    loss: torch.Tensor
    optimality: torch.Tensor


def nft_loss(
    velocity: torch.Tensor,
    old_velocity: torch.Tensor,
    target: torch.Tensor,
    sigma: torch.Tensor,
    advantages: torch.Tensor,
    mixing: float,
    clip: float = 5.0,
) -> NFTLossOutput:
    r"""
    Loss of [DiffusionNFT](https://huggingface.co/papers/2509.16117): two velocities on either side of the old policy's are
    drawn to the true one \\( v^* \\), the better one by the good images and the worse one by the bad images,

    \\( \frac{c}{b} [r \lVert v^+ - v^* \rVert^2 + (1 - r) \lVert v^- - v^* \rVert^2] \\) with
    \\( v^+ = (1 - b) v_\mathrm{old} + b v \\), \\( v^- = (1 + b) v_\mathrm{old} - b v \\) and
    \\( r = \frac12 + \frac{A}{2c} \\) of the advantage \\( A \\), clipped to \\( \pm c \\).

    As in the paper's code, the squares are those of the predicted image, \\( \sigma (v - v^*) \\), divided by its mean absolute
    error, which has no gradient. If the policy equals the old one, the gradient is that of
    \\( A \sigma \lVert v - v^* \rVert^2 / \lVert v - v^* \rVert_1 \\), independent of \\( b \\) and \\( c \\). Once it has moved, an
    image with advantage 0 (including one without a reward) counts as half good, half bad: it pulls the policy back to the old one.

    Args:
        velocity, old_velocity (`torch.Tensor` of shape `(batch_size, image_seq_len, num_channels)`):
            Velocities that the policy and the old policy predict for the same latents.
        target (`torch.Tensor` of shape `(batch_size, image_seq_len, num_channels)`):
            True velocity: the noise in the latents minus the image's latents.
        sigma (`torch.Tensor` of shape `(batch_size,)`):
            Noise level of the latents.
        advantages (`torch.Tensor` of shape `(batch_size,)`):
            Advantages of the images.
        mixing (`float`):
            Share \\( b \\) of the policy in the two velocities, above 0.
        clip (`float`, *optional*, defaults to `5.0`):
            Largest size \\( c \\) of an advantage.

    Returns:
        [`NFTLossOutput`]:
            Loss per image.

    Raises:
        `ValueError`: If the shapes differ.

    Example:

    ```python
    >>> import torch
    >>> from trl_spatial.diffusion_grpo.nft.losses import nft_loss

    >>> old, image = torch.zeros(2, 16, 4), torch.ones(2, 16, 4)
    >>> sigma, advantages = torch.ones(2), torch.tensor([5.0, -5.0])  # the same image as a good and as a bad one
    >>> nft_loss(old + 0.5, old, image, sigma, advantages, mixing=1.0).loss
    tensor([2.5000, 7.5000])
    ```
    """
    if not velocity.shape == old_velocity.shape == target.shape:
        shapes = [tuple(tensor.shape) for tensor in (velocity, old_velocity, target)]
        raise ValueError(f"velocity, old_velocity and target have shapes {shapes}: make them equal.")
    if not sigma.shape == advantages.shape == velocity.shape[:1]:
        shapes = [tuple(tensor.shape) for tensor in (sigma, advantages)]
        raise ValueError(
            f"sigma and advantages have shapes {shapes}: use one value for each of {len(velocity)} images."
        )
    velocity, old_velocity, target = velocity.float(), old_velocity.float(), target.float()
    step = mixing * (velocity - old_velocity)
    better, worse = old_velocity + step, old_velocity - step
    optimality = (advantages.float() / clip).clamp(-1, 1) / 2 + 0.5  # (batch_size,)
    loss = optimality * _image_error(better, target, sigma) + (1 - optimality) * _image_error(worse, target, sigma)
    return NFTLossOutput(loss * clip / mixing, optimality)


def _image_error(velocity: torch.Tensor, target: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Mean squared error of the predicted image, divided by its mean absolute error, `(batch_size,)`."""
    error = sigma[:, None, None] * (velocity - target)
    size = error.detach().abs().flatten(1).mean(1).clamp(min=_SMALLEST_ERROR)
    return error.square().flatten(1).mean(1) / size
