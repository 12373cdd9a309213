"""The first layer of Qwen's vision towers, computed as a matrix product."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from .vision_attention import HAS_WINDOWS


class PatchProjection(nn.Conv3d):
    """A convolution whose kernel is as large as its input, as a matrix product: PyTorch's convolution takes three times as long."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Maps patches `(num_patches, channels, frames, rows, columns)` to `(num_patches, hidden_size, 1, 1, 1)`."""
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]


def multiply_patches(backbone: PreTrainedModel) -> None:
    """Makes the vision tower of a Qwen-VL model use [`PatchProjection`]. Its weights, and other models, are not changed."""
    if backbone.config.model_type in HAS_WINDOWS:
        backbone.visual.patch_embed.proj.__class__ = PatchProjection
