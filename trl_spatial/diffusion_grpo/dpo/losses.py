"""The loss of offline preference optimization, a pure function of velocities."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass
class DPOLossOutput:
    """
    Preference loss of each pair, in float32.

    Args:
        loss (`torch.Tensor` of shape `(batch_size,)`):
            Loss per pair, to be averaged.
        chosen_rewards, rejected_rewards (`torch.Tensor` of shape `(batch_size,)`):
            Implicit rewards of the images, without gradient: `beta / 2` times how much closer the policy's velocity is to
            the image's than the reference's. The loss is `-log(sigmoid(chosen_rewards - rejected_rewards))`.
    """

    loss: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor


def diffusion_dpo_loss(
    chosen_velocity: torch.Tensor,
    chosen_reference: torch.Tensor,
    chosen_target: torch.Tensor,
    rejected_velocity: torch.Tensor,
    rejected_reference: torch.Tensor,
    rejected_target: torch.Tensor,
    beta: float,
) -> DPOLossOutput:
    r"""
    Loss of [Diffusion-DPO](https://huggingface.co/papers/2311.12908) for flow matching:
    \\( -\log \sigma(-\frac{\beta}{2} [(\lVert v^w - u^w \rVert^2 - \lVert v_\mathrm{ref}^w - u^w \rVert^2) -
    (\lVert v^l - u^l \rVert^2 - \lVert v_\mathrm{ref}^l - u^l \rVert^2)]) \\), with the velocities \\( v \\) predicted at
    the same noise level, and the true ones \\( u \\) of the chosen image \\( w \\) and the rejected image \\( l \\).

    Squares are averaged over the latent elements, so that `beta` means the same at every image size.

    Args:
        chosen_velocity, rejected_velocity (`torch.Tensor` of shape `(batch_size, image_seq_len, num_channels)`):
            Velocities that the policy predicts.
        chosen_reference, rejected_reference (`torch.Tensor` of shape `(batch_size, image_seq_len, num_channels)`):
            Velocities that the reference policy predicts for the same latents.
        chosen_target, rejected_target (`torch.Tensor` of shape `(batch_size, image_seq_len, num_channels)`):
            True velocities: the noise in the latents minus the image's latents.
        beta (`float`):
            How strongly the policy is held to the reference. The gradient vanishes with it.

    Returns:
        [`DPOLossOutput`]:
            Loss and implicit rewards per pair.

    Raises:
        `ValueError`: If the shapes differ.

    Example:

    ```python
    >>> import torch
    >>> from trl_spatial.diffusion_grpo.dpo.losses import diffusion_dpo_loss

    >>> better, worse, reference = torch.ones(1, 16, 4), torch.zeros(1, 16, 4), torch.zeros(1, 16, 4)
    >>> diffusion_dpo_loss(better / 2, reference, better, better / 2, reference, worse, beta=2.0).loss
    tensor([0.3133])
    ```
    """
    tensors = (
        chosen_velocity,
        chosen_reference,
        chosen_target,
        rejected_velocity,
        rejected_reference,
        rejected_target,
    )
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1:
        raise ValueError(f"The velocities and targets have shapes {shapes}: make them equal.")
    chosen_rewards = beta / 2 * _gain(chosen_velocity, chosen_reference, chosen_target)  # (batch_size,)
    rejected_rewards = beta / 2 * _gain(rejected_velocity, rejected_reference, rejected_target)  # (batch_size,)
    loss = -F.logsigmoid(chosen_rewards - rejected_rewards)
    return DPOLossOutput(loss, chosen_rewards.detach(), rejected_rewards.detach())


def _gain(velocity: torch.Tensor, reference: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The reference's mean squared error minus the policy's, `(batch_size,)`."""
    velocity, reference, target = velocity.float(), reference.float(), target.float()
    # The difference of squares as a product, which rounds less: both are about 1, and `beta` is in the thousands.
    return ((reference - velocity) * (velocity + reference - 2 * target)).flatten(1).mean(1)
