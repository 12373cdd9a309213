"""Computes tokens that rows of a batch begin with only once: the instruction of all rows, the image of rows that share it.

The rows become one sequence without padding, cut into segments: the prefix of all rows; then, for each image, what its rows
have in common, followed by the rest of each row. A token attends to its own segment and to those its row begins with, so every
row gets the score it would get alone.
"""

import copy
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .positions import image_text_positions


SHARED_SDPA = "sdpa_with_shared_prefixes"
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # in their language models, only attention mixes tokens


class Segment(NamedTuple):
    """
    A part of the sequence.

    Args:
        length (`int`):
            Number of its tokens.
        parents (`tuple[int, ...]`):
            The segments that its rows begin with, in order.
    """

    length: int
    parents: tuple[int, ...]


class SegmentBatch(NamedTuple):
    """
    Segments whose attention is computed in one call. Shorter ones are padded.

    Args:
        queries (`torch.LongTensor` of shape `(num_segments, length)`):
            Positions of their tokens in the sequence; padding repeats the last one.
        keys (`torch.LongTensor` of shape `(num_segments, num_keys)`):
            Positions of their parents' tokens and their own; padding is 0.
        mask (`torch.BoolTensor` of shape `(num_segments, 1, length, num_keys)`):
            Which of these keys each query attends to.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    mask: torch.Tensor


class SharedRows(NamedTuple):
    """
    The rows of a batch as one sequence.

    Args:
        source (`torch.LongTensor` of shape `(num_tokens,)`):
            Position in the flattened batch of each token of the sequence.
        place (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Position in the sequence of each token of the batch; 0 for padding.
        segments (`list[Segment]`):
            The parts of the sequence, in its order.
    """

    source: torch.Tensor
    place: torch.Tensor
    segments: list[Segment]


def use_shared_prefixes(backbone: PreTrainedModel) -> None:
    """
    Makes the language model of a Qwen-VL model with sdpa attention work on [`SharedRows`]. Other models, and other attention
    functions, are not changed.
    """
    if backbone.config.model_type not in FAMILIES:
        return
    language_model = backbone.language_model
    config = copy.copy(language_model.config)  # copies of the backbone are built from its own, which must not change
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
    Computes hidden states of a batch, and shared prefixes only once if [`use_shared_prefixes`] was applied to the backbone.

    Args:
        backbone ([`~transformers.PreTrainedModel`]):
            An image-text model without its LM head.
        is_wanted (`torch.BoolTensor` of shape `(batch_size, sequence_length)`):
            The tokens whose hidden states are returned.
        pixel_values (`torch.Tensor` of shape `(total_patches, patch_dim)`):
            Patches of all images.
        batch (`dict[str, torch.Tensor]`):
            The other inputs of a [`GaussianRewardModel`].

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
    position_ids = image_text_positions(
        attention_mask, mm_token_type_ids, image_grid_thw[image_index], backbone.visual.spatial_merge_size
    )  # (3, batch_size, sequence_length)
    rows = share_prefixes(input_ids, attention_mask, image_index.tolist(), backbone.config.image_token_id)
    batches, output_places = batch_segments(rows.segments)
    device = pixel_values.device
    hidden_states = backbone(
        input_ids=input_ids.flatten()[rows.source].unsqueeze(0).to(device),
        mm_token_type_ids=mm_token_type_ids.flatten()[rows.source].unsqueeze(0).to(device),
        position_ids=position_ids.flatten(1)[:, rows.source].unsqueeze(1).to(device),
        pixel_values=pixel_values,
        image_grid_thw=image_grid_thw.to(device),
        use_cache=False,
        segments=(
            [SegmentBatch(*(places.to(device) for places in batch)) for batch in batches],
            output_places.to(device),
        ),
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
    Finds the prefixes that rows have in common.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
            Token ids, on the CPU.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`):
            1 for tokens, 0 for padding, on the CPU.
        images (`list[int]`):
            Number of the image of each row.
        image_token_id (`int`):
            The token of a piece of an image, whose content differs from image to image.
    """
    columns = [mask.nonzero().flatten() for mask in attention_mask]
    rows = [ids[places].tolist() for ids, places in zip(input_ids, columns, strict=True)]
    sources: list[torch.Tensor] = []
    place = torch.zeros_like(input_ids)
    segments: list[Segment] = []

    def add(members: list[int], start: int, end: int, parents: tuple[int, ...]) -> tuple[int, ...]:
        """Adds a segment that the rows have in common. Returns the parents of the segments that follow it."""
        if start == end:
            return parents
        first = sum(segment.length for segment in segments)
        for row in members:
            place[row, columns[row][start:end]] = torch.arange(first, first + end - start)
        sources.append(members[0] * input_ids.shape[1] + columns[members[0]][start:end])
        segments.append(Segment(end - start, parents))
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
    low, high = min(rows), max(rows)  # rows that sort between these two share what the two have in common
    return next((i for i, (one, other) in enumerate(zip(low, high, strict=False)) if one != other), len(low))


def batch_segments(segments: list[Segment]) -> tuple[list[SegmentBatch], torch.Tensor]:
    """
    Batches segments of similar length, so that attention needs few calls, however many rows there are.

    Returns:
        The batches, and a `torch.LongTensor` of shape `(num_tokens,)`: the position of each token of the sequence among the
        queries of all batches, one after another.
    """
    lengths = [segment.length for segment in segments]
    places = torch.arange(sum(lengths)).split(lengths)
    keys = [torch.cat([places[i] for i in (*segment.parents, n)]) for n, segment in enumerate(segments)]
    output_places = torch.empty(sum(lengths), dtype=torch.long)
    batches: list[SegmentBatch] = []
    num_queries = 0
    numbers = sorted(range(len(segments)), key=lambda n: (len(segments[n].parents), lengths[n]), reverse=True)
    while numbers:
        longest = numbers[0]
        members = [n for n in numbers if _are_similar(lengths[n], lengths[longest], len(keys[n]), len(keys[longest]))]
        numbers = [n for n in numbers if n not in members]
        token = torch.arange(lengths[longest]).expand(len(members), -1)
        token = token.minimum(torch.tensor([[lengths[n] - 1] for n in members]))  # (num_segments, length)
        last_key = token + torch.tensor([[len(keys[n]) - lengths[n]] for n in members])
        num_keys = max(len(keys[n]) for n in members)
        mask = torch.arange(num_keys) <= last_key[..., None]
        padded_keys = pad_sequence([keys[n] for n in members], batch_first=True)
        queries = torch.stack([places[n][of_segment] for n, of_segment in zip(members, token, strict=True)])
        batches.append(SegmentBatch(queries, padded_keys, mask[:, None]))
        for n in members:
            output_places[places[n]] = torch.arange(num_queries, num_queries + lengths[n])
            num_queries += lengths[longest]
    return batches, output_places


def _are_similar(length: int, longest: int, num_keys: int, most_keys: int) -> bool:
    """Returns whether a segment may be padded to another, which wastes at most about a third of what is computed for it."""
    return 0.8 * longest <= length <= longest and 0.8 * most_keys <= num_keys <= 1.25 * most_keys


def shared_sdpa(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: tuple[list[SegmentBatch], torch.Tensor] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Attention in transformers' interface, with one call for each batch of segments.

    Args:
        query, key, value (`torch.Tensor` of shape `(1, num_heads, sequence_length, head_dim)`):
            The whole sequence.
        segments (`tuple[list[SegmentBatch], torch.Tensor]`, *optional*):
            Its parts, from [`batch_segments`]. If `None`, this is transformers' sdpa.

    Returns:
        `torch.Tensor` of shape `(1, sequence_length, num_heads, head_dim)`, and no attention weights.
    """
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    batches, output_places = segments
    outputs = []
    for batch in batches:
        states = [
            whole[0].transpose(0, 1).index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2)
            for whole, places in ((query, batch.queries), (key, batch.keys), (value, batch.keys))
        ]  # each (num_segments, num_heads, length or num_keys, head_dim)
        outputs.append(sdpa_attention_forward(module, *states, batch.mask, **kwargs)[0].flatten(0, 1))
    return torch.cat(outputs).index_select(0, output_places).unsqueeze(0), None


AttentionInterface.register(SHARED_SDPA, shared_sdpa)
AttentionMaskInterface.register(SHARED_SDPA, sdpa_mask)
