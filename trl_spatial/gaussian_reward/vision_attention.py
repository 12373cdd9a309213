"""Attention of Qwen's vision towers without FlashAttention: all windows, or images, of one size in one call.

By itself, transformers attends to one window at a time: 5,600 calls for eight images of 512 × 512 pixels.
"""

import copy
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index


# transformers passes on a batch of images as one uncut sequence only if "flash" is in the name.
PACKED_SDPA = "sdpa_in_flash_layout"
HAS_WINDOWS = {"qwen2_vl": False, "qwen2_5_vl": True, "qwen3_vl": False}  # the families with such a tower


class Packing(NamedTuple):
    """
    The structure of a sequence of segments that attend only to themselves.

    Args:
        groups (`tuple[tuple[int, int], ...]`):
            Number of segments and their length, for each length that occurs.
        order (`torch.LongTensor` of shape `(sequence_length,)`, *optional*):
            Positions of the patches, segment by segment and group by group. If `None`, they are already in that order.
        inverse (`torch.LongTensor` of shape `(sequence_length,)`, *optional*):
            The inverse of `order`.
    """

    groups: tuple[tuple[int, int], ...]
    order: torch.Tensor | None
    inverse: torch.Tensor | None


def use_packed_sdpa(backbone: PreTrainedModel) -> None:
    """
    Makes the vision tower of a Qwen-VL model with sdpa attention attend to all windows, or images, of one size in one call.
    Other models, and other attention functions, are not changed.
    """
    if backbone.config.model_type not in HAS_WINDOWS or backbone.visual.config._attn_implementation != "sdpa":
        return
    tower = backbone.visual
    config = copy.copy(tower.config)  # copies of the backbone are built from its own, which must not change
    config._attn_implementation = PACKED_SDPA
    tower.config = config
    for block in tower.blocks:
        block.attn.config = config
    add_packings = partial(_add_packings, HAS_WINDOWS[backbone.config.model_type])
    tower.register_forward_pre_hook(add_packings, with_kwargs=True)


class ImageLayout(NamedTuple):
    """
    The layout of an image's patches.

    Args:
        position_ids (`torch.LongTensor` of shape `(num_patches, 2)`):
            Row and column of each patch.
        window_index (`torch.LongTensor` of shape `(num_tokens,)`):
            Tokens, which are squares of patches, window by window. Empty in a tower without windows.
        window_lengths (`torch.LongTensor` of shape `(num_windows,)`):
            Number of patches in each window.
    """

    position_ids: torch.Tensor
    window_index: torch.Tensor
    window_lengths: torch.Tensor


@lru_cache(maxsize=1024)
def _image_layout(grid: tuple[int, int, int], merge_size: int, window: tuple[int, int] | None) -> ImageLayout:
    """Computes the layout of an image from its grid of patches, and from the sizes of a window and of a patch in pixels."""
    grid_thw = torch.tensor([grid])
    position_ids = get_vision_position_ids(grid_thw, merge_size)
    if window is None:
        none = torch.empty(0, dtype=torch.long)
        return ImageLayout(position_ids, none, none)
    window_size, patch_size = window
    window_index, boundaries = get_vision_window_index(grid_thw, merge_size, window_size, patch_size)
    return ImageLayout(position_ids, window_index, boundaries.diff().long())


def _add_packings(
    has_windows: bool, tower: PreTrainedModel, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]] | None:
    """Computes, once per forward pass and on the CPU, what all blocks of the tower need to know about the images."""
    config = tower.config
    if config._attn_implementation != PACKED_SDPA:
        return None
    device, merge_size = args[0].device, config.spatial_merge_size
    grid = kwargs["grid_thw"].cpu()
    window = (config.window_size, config.patch_size) if has_windows else None
    layouts = [_image_layout(tuple(image), merge_size, window) for image in grid.tolist()]
    lengths = (grid[:, 1] * grid[:, 2]).repeat_interleave(grid[:, 0])  # patches per frame of an image
    image = torch.arange(len(lengths)).repeat_interleave(lengths)  # number of each patch's frame
    added: dict[str, Any] = {"position_ids": torch.cat([layout.position_ids for layout in layouts]).to(device)}
    if has_windows:
        starts = (grid.prod(-1) // merge_size**2).cumsum(0).roll(1).tolist()
        starts[0] = 0
        window_index = torch.cat([layout.window_index + start for layout, start in zip(layouts, starts, strict=True)])
        window_lengths = torch.cat([layout.window_lengths for layout in layouts])
        # Put windows of one size next to each other, so that they need not be gathered in every block.
        token_lengths = window_lengths.repeat_interleave(window_lengths // merge_size**2)
        window_index = window_index[token_lengths.argsort(descending=True, stable=True)]
        window_lengths = window_lengths.sort(descending=True, stable=True).values
        numbers = torch.arange(len(window_lengths)).repeat_interleave(window_lengths)
        added["window_index"] = window_index.to(device)
        added["cu_window_seqlens"] = pack(numbers, window_lengths, device)
        added["max_window_seqlen"] = int(window_lengths.max())
        image = image.view(-1, merge_size**2)[window_index].flatten()
    added["cu_seqlens"] = pack(image, lengths, device)
    added["max_seqlen"] = int(lengths.max())
    return args, kwargs | added


def pack(segment: torch.Tensor, lengths: torch.Tensor, device: torch.device) -> Packing:
    """
    Makes the packing of a sequence.

    Args:
        segment (`torch.LongTensor` of shape `(sequence_length,)`):
            Number of each patch's segment.
        lengths (`torch.LongTensor` of shape `(num_segments,)`):
            Length of each segment.
        device (`torch.device`):
            Where the attention runs.
    """
    values, counts = lengths.unique(return_counts=True)
    groups = tuple(zip(counts.tolist(), values.tolist(), strict=True))[::-1]
    rank = lengths.argsort(descending=True, stable=True).argsort()  # place of each segment, longest first
    order = rank[segment].argsort(stable=True)
    if torch.equal(order, torch.arange(len(order))):
        return Packing(groups, None, None)
    return Packing(groups, order.to(device), order.argsort().to(device))


def packed_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    dropout: float,
    cu_seq_lens_q: Packing,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Attention within the segments of a sequence, in transformers' interface, with one call per segment length.

    Args:
        query, key, value (`torch.Tensor` of shape `(1, num_heads, sequence_length, head_dim)`):
            The whole sequence.
        cu_seq_lens_q (`Packing`):
            Its segments, passed where FlashAttention gets their boundaries.

    Returns:
        `torch.Tensor` of shape `(1, sequence_length, num_heads, head_dim)`, and no attention weights.
    """
    groups, order, inverse = cu_seq_lens_q
    states = [query, key, value]
    if order is not None:
        states = [state.index_select(2, order) for state in states]
    sizes = [count * length for count, length in groups]
    outputs = []
    for (count, length), *parts in zip(groups, *(state[0].split(sizes, dim=1) for state in states), strict=True):
        batch = [
            part.unflatten(1, (count, length)).transpose(0, 1) for part in parts
        ]  # (count, num_heads, length, head_dim)
        attended, _ = sdpa_attention_forward(module, *batch, None, dropout=dropout, scaling=scaling, is_causal=False)
        outputs.append(attended.flatten(0, 1))  # (count · length, num_heads, head_dim)
    output = torch.cat(outputs)
    if inverse is not None:
        output = output.index_select(0, inverse)
    return output.unsqueeze(0), None


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
