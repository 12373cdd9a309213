"""Tokens that rows of a batch begin with are computed once: the instruction of all rows, the image of rows that share it.

The rows become one sequence without padding, cut into segments: the common beginning of all rows, then for each image what
its rows have in common, then the rest of each row. A token attends to its own segment and to those its row begins with, so
that every row has the score it has alone.
"""

import copy
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


SHARED_SDPA = "sdpa_with_shared_prefixes"
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # whose language models do nothing but attend across tokens


class Segment(NamedTuple):
    """
    A part of the sequence.

    Args:
        length (`int`):
            Number of its tokens.
        parents (`tuple[int, ...]`):
            The segments that its rows begin with, in their order.
        mask (`torch.BoolTensor` of shape `(1, 1, length, num_keys)`, *optional*):
            Which tokens its tokens attend to, of those of its parents and its own. If `None`, it has no parents.
    """

    length: int
    parents: tuple[int, ...]
    mask: torch.Tensor | None

    def to(self, device: torch.device) -> "Segment":
        """The segment for attention on a device."""
        return self if self.mask is None else self._replace(mask=self.mask.to(device))


class SharedRows(NamedTuple):
    """
    The rows of a batch as one sequence.

    Args:
        source (`torch.LongTensor` of shape `(num_tokens,)`):
            Where each token of the sequence is in the flattened batch.
        place (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Where each token of the batch is in the sequence; 0 for padding.
        segments (`list[Segment]`):
            The parts of the sequence, in its order.
    """

    source: torch.Tensor
    place: torch.Tensor
    segments: list[Segment]


def use_shared_prefixes(backbone: PreTrainedModel) -> None:
    """
    Makes the language model of a Qwen-VL model that attends with sdpa fit for [`SharedRows`]. Other models, and other
    attention functions, are left as they are.
    """
    if backbone.config.model_type not in FAMILIES:
        return
    language_model = backbone.language_model
    config = copy.copy(language_model.config)  # the backbone's own is what a copy of it is built from
    # Qwen3-VL has no windows, nor a field for them.
    if config._attn_implementation != "sdpa" or getattr(config, "use_sliding_window", False):
        return
    config._attn_implementation = SHARED_SDPA
    language_model.config = config
    for layer in language_model.layers:
        layer.self_attn.config = config


def encode_rows(
    backbone: PreTrainedModel, is_wanted: torch.Tensor, *, pixel_values: torch.Tensor, **batch: torch.Tensor
) -> torch.Tensor:
    """
    Computes hidden states of a batch, shared beginnings once if [`use_shared_prefixes`] made the backbone fit.

    Args:
        backbone ([`~transformers.PreTrainedModel`]):
            An image-text model without its LM head.
        is_wanted (`torch.BoolTensor` of shape `(batch_size, sequence_length)`):
            The tokens whose hidden states are returned.
        pixel_values (`torch.Tensor` of shape `(total_patches, patch_dim)`):
            Patches of all images.
        batch (`dict[str, torch.Tensor]`):
            What else a [`GaussianRewardModel`] reads.

    Returns:
        `torch.Tensor` of shape `(num_wanted, hidden_size)`: the hidden states of the last layer, in the order of the batch.
    """
    if backbone.get_decoder().config._attn_implementation != SHARED_SDPA:
        return _encode_apart(backbone, is_wanted, pixel_values, **batch)
    on_cpu = {name: values.cpu() for name, values in batch.items()}
    return _encode_shared(backbone, is_wanted.cpu(), pixel_values, **on_cpu)


def _encode_shared(
    backbone: PreTrainedModel,
    is_wanted: torch.Tensor,
    pixel_values: torch.Tensor,
    *,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    mm_token_type_ids: torch.Tensor,
    image_grid_thw: torch.Tensor,
    image_index: torch.Tensor,
) -> torch.Tensor:
    position_ids, _ = backbone.get_rope_index(
        input_ids, mm_token_type_ids, image_grid_thw=image_grid_thw[image_index], attention_mask=attention_mask
    )  # (3, batch_size, sequence_length)
    rows = share_prefixes(input_ids, attention_mask, image_index.tolist(), backbone.config.image_token_id)
    device = pixel_values.device
    hidden_states = backbone(
        input_ids=input_ids.flatten()[rows.source].unsqueeze(0).to(device),
        mm_token_type_ids=mm_token_type_ids.flatten()[rows.source].unsqueeze(0).to(device),
        position_ids=position_ids.flatten(1)[:, rows.source].unsqueeze(1).to(device),
        pixel_values=pixel_values,
        image_grid_thw=image_grid_thw.to(device),
        use_cache=False,
        segments=[segment.to(device) for segment in rows.segments],
    ).last_hidden_state  # (1, num_tokens, hidden_size)
    return hidden_states[0, rows.place[is_wanted].to(hidden_states.device)]


def _encode_apart(
    backbone: PreTrainedModel,
    is_wanted: torch.Tensor,
    pixel_values: torch.Tensor,
    *,
    image_grid_thw: torch.Tensor,
    image_index: torch.Tensor,
    **batch: torch.Tensor,
) -> torch.Tensor:
    patches = pixel_values.split(image_grid_thw.prod(-1).tolist())
    hidden_states = backbone(
        **batch,
        pixel_values=torch.cat([patches[image] for image in image_index.tolist()]),
        image_grid_thw=image_grid_thw[image_index],
        use_cache=False,
    ).last_hidden_state  # (batch_size, sequence_length, hidden_size)
    return hidden_states[is_wanted.to(hidden_states.device)]


def share_prefixes(
    input_ids: torch.Tensor, attention_mask: torch.Tensor, images: list[int], image_token_id: int
) -> SharedRows:
    """
    Finds what rows have in common.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Token ids, on the CPU.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`):
            1 for tokens, 0 for padding, on the CPU.
        images (`list[int]`):
            Number of the image of each row.
        image_token_id (`int`):
            The token of a piece of an image, which differs from image to image.
    """
    columns = [mask.nonzero().flatten() for mask in attention_mask]
    rows = [ids[places].tolist() for ids, places in zip(input_ids, columns, strict=True)]
    sources: list[torch.Tensor] = []
    place = torch.zeros_like(input_ids)
    segments: list[Segment] = []

    def add(members: list[int], start: int, end: int, parents: tuple[int, ...]) -> tuple[int, ...]:
        """Adds tokens of rows that have them in common. Returns the parents of what follows."""
        if start == end:
            return parents
        first = sum(segment.length for segment in segments)
        for row in members:
            place[row, columns[row][start:end]] = torch.arange(first, first + end - start)
        sources.append(members[0] * input_ids.shape[1] + columns[members[0]][start:end])
        num_keys = sum(segments[parent].length for parent in parents) + end - start
        mask = torch.ones(1, 1, end - start, num_keys, dtype=torch.bool).tril(start) if parents else None
        segments.append(Segment(end - start, parents, mask))
        return *parents, len(segments) - 1

    everyone = list(range(len(rows)))
    begin = 0 if len(rows) == 1 else _common_length([row[: row.index(image_token_id)] for row in rows])
    root = add(everyone, 0, begin, ())
    for image in sorted(set(images)):
        members = [row for row in everyone if images[row] == image]
        split = begin
        if len(members) > 1:
            split = _common_length([rows[row][:-1] for row in members])
        branch = add(members, begin, split, root)
        for row in members:
            add([row], split, len(rows[row]), branch)
    return SharedRows(torch.cat(sources), place, segments)


def _common_length(rows: list[list[int]]) -> int:
    """Number of tokens that all rows begin with."""
    low, high = min(rows), max(rows)  # what these two have in common all have that lie between
    return next((i for i, (one, other) in enumerate(zip(low, high, strict=False)) if one != other), len(low))


def shared_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: list[Segment] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Attention in transformers' interface, with one call for each segment.

    Args:
        query, key, value (`torch.Tensor` of shape `(1, num_heads, sequence_length, head_dim)`):
            The whole sequence.
        segments (`list[Segment]`, *optional*):
            Its parts. If `None`, this is transformers' sdpa.

    Returns:
        `torch.Tensor` of shape `(1, sequence_length, num_heads, head_dim)`, and no attention weights.
    """
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    lengths = [segment.length for segment in segments]
    queries, keys, values = (states.split(lengths, dim=2) for states in (query, key, value))
    outputs = []
    for number, (_, parents, mask) in enumerate(segments):
        seen = (*parents, number)
        states = [torch.cat([parts[i] for i in seen], dim=2) for parts in (keys, values)]
        outputs.append(sdpa_attention_forward(module, queries[number], *states, mask, **kwargs)[0])
    return torch.cat(outputs, dim=1), None


AttentionInterface.register(SHARED_SDPA, shared_sdpa)
AttentionMaskInterface.register(SHARED_SDPA, sdpa_mask)
