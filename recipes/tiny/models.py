"""Tiny models of the real Qwen-VL classes, with tokenizer and processor, built without a network.

The tests run on them, and the recipe that pretrains the tiny backbone of `trl_spatial demo` starts from them. Sizes
are arguments; the rest is as in the released models: special tokens, byte-level BPE, rotary positions on three axes.
"""

import json
from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from trl_spatial.gaussian_reward.processing import DEFAULT_INSTRUCTION, SpatialScoreProcessor, build_chat_template


QWEN_SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
TEMPORAL_PATCH_SIZE = 2


def build_tokenizer(corpus: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """
    Trains a Qwen tokenizer in which every word of the corpus is one token.

    Args:
        corpus (`Iterable[str]`):
            Texts that hold every word in each of its spellings: "red" at the start of a text and " red" after a space
            are two words.
        vocab_size (`int`):
            Maximum number of tokens: 256 bytes, 14 special tokens, the words, and the pieces they are merged from.

    Returns:
        [`~transformers.Qwen2Tokenizer`]: It encodes any text; a word that is not in the corpus is split into pieces.

    Raises:
        `ValueError`: If `vocab_size` is too small for every word to become one token.
    """
    bpe = Qwen2Tokenizer(unk_token=None, eos_token="<|im_end|>").backend_tokenizer
    # Without a size limit, merging continues until every word is whole.
    trainer = trainers.BpeTrainer(
        vocab_size=10**6, min_frequency=0, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(corpus, trainer)
    trained = json.loads(bpe.to_str())["model"]
    num_tokens = len(trained["vocab"]) + len(QWEN_SPECIAL_TOKENS)
    if num_tokens > vocab_size:
        raise ValueError(f"Every word of the corpus as one token needs vocab_size >= {num_tokens}, got {vocab_size}.")
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(merge) for merge in trained["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=32768,
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": QWEN_SPECIAL_TOKENS}, replace_extra_special_tokens=False
    )
    return tokenizer


def build_processor(
    tokenizer: Qwen2Tokenizer,
    *,
    patch_size: int = 8,
    merge_size: int = 2,
    min_pixels: int | None = None,
    max_pixels: int = 64 * 64,
    instruction: str = DEFAULT_INSTRUCTION,
) -> SpatialScoreProcessor:
    """
    Builds the processor of a tiny reward model. It adds the reward token to `tokenizer`.

    Args:
        tokenizer ([`~transformers.Qwen2Tokenizer`]):
            From [`build_tokenizer`].
        patch_size (`int`, *optional*, defaults to `8`):
            Side of a patch in pixels.
        merge_size (`int`, *optional*, defaults to `2`):
            `merge_size` × `merge_size` patches become one image token.
        min_pixels (`int`, *optional*):
            Smaller images are enlarged to this many pixels. If `None`, to one image token.
        max_pixels (`int`, *optional*, defaults to `4096`):
            Larger images are shrunk to this many pixels; the default is 64 × 64: 64 patches, 16 image tokens.
        instruction (`str`, *optional*, defaults to [`DEFAULT_INSTRUCTION`]):
            What to judge.
    """
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=patch_size,
        merge_size=merge_size,
        temporal_patch_size=TEMPORAL_PATCH_SIZE,
        min_pixels=(patch_size * merge_size) ** 2 if min_pixels is None else min_pixels,
        max_pixels=max_pixels,
    )
    return SpatialScoreProcessor(image_processor, tokenizer, chat_template=build_chat_template(instruction))


def build_qwen2_5_vl(
    tokenizer: Qwen2Tokenizer,
    *,
    hidden_size: int = 64,
    intermediate_size: int = 128,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 4,
    num_key_value_heads: int | None = None,
    vision_hidden_size: int = 32,
    vision_depth: int = 2,
    vision_heads: int = 2,
    vision_window_size: int | None = None,
    patch_size: int = 8,
    merge_size: int = 2,
    rope_theta: float = 1e6,
    vocab_size: int | None = None,
    tie_word_embeddings: bool = True,
    initializer_range: float = 0.02,
    attn_implementation: str = "sdpa",
    seed: int = 0,
) -> Qwen2_5_VLForConditionalGeneration:
    """
    Builds a tiny Qwen2.5-VL with random weights, in evaluation mode.

    Args:
        tokenizer ([`~transformers.Qwen2Tokenizer`]):
            From [`build_tokenizer`].
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads (`int`):
            Sizes of the language model. `hidden_size // num_attention_heads` must be a multiple of 4.
        num_key_value_heads (`int`, *optional*):
            If `None`, as many as `num_attention_heads`.
        vision_hidden_size, vision_depth, vision_heads (`int`):
            Sizes of the vision tower.
        vision_window_size (`int`, *optional*):
            Side, in pixels, of the windows in which all blocks of the vision tower but the last attend. If `None`,
            every block attends over the whole image.
        patch_size, merge_size (`int`):
            As in the processor.
        rope_theta (`float`, *optional*, defaults to `1e6`):
            Base of the rotary frequencies. The last axis, the column of an image token, gets the lowest frequencies:
            in heads of 16 numbers the default turns them by less than 1e-3 per column, and 100 by 0.05.
        vocab_size (`int`, *optional*):
            Rows of the embedding. If `None`, one per token. The released models have spare rows.
        tie_word_embeddings (`bool`, *optional*, defaults to `True`):
            Whether the language-model head is the embedding.
        initializer_range (`float`, *optional*, defaults to `0.02`):
            Standard deviation of the random weights. For an untrained model, use 0.1: with 0.02, two layers hardly
            respond to their input.
        attn_implementation (`str`, *optional*, defaults to `"sdpa"`):
            Attention function of both towers.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random weights. The global generator is not changed.
    """
    text_config = _text_config(
        tokenizer, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads
    )
    text_config |= {
        "vocab_size": len(tokenizer) if vocab_size is None else vocab_size,
        "initializer_range": initializer_range,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": rope_theta,
            "mrope_section": _mrope_section(hidden_size // num_attention_heads),
        },
    }
    unit = patch_size * merge_size
    vision_config = _vision_config(vision_hidden_size, vision_depth, vision_heads, patch_size, merge_size, hidden_size)
    vision_config |= {
        "initializer_range": initializer_range,
        "window_size": unit if vision_window_size is None else vision_window_size,
        "fullatt_block_indexes": list(range(vision_depth)) if vision_window_size is None else [vision_depth - 1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        tie_word_embeddings=tie_word_embeddings,
        **_vision_token_ids(tokenizer),
    )
    return _build(Qwen2_5_VLForConditionalGeneration, config, attn_implementation, seed)


def build_qwen3_vl(
    tokenizer: Qwen2Tokenizer,
    *,
    hidden_size: int = 64,
    intermediate_size: int = 128,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 4,
    num_key_value_heads: int | None = None,
    vision_hidden_size: int = 32,
    vision_depth: int = 2,
    vision_heads: int = 2,
    patch_size: int = 8,
    merge_size: int = 2,
    rope_theta: float = 5e6,
    vocab_size: int | None = None,
    tie_word_embeddings: bool = True,
    initializer_range: float = 0.02,
    attn_implementation: str = "sdpa",
    seed: int = 0,
) -> Qwen3VLForConditionalGeneration:
    """
    Builds a tiny Qwen3-VL with random weights, in evaluation mode. Arguments as in [`build_qwen2_5_vl`]; here the
    rotary axes are interleaved, so that rows and columns get high frequencies too, and the first vision block also
    feeds the first layer of the language model.
    """
    head_dim = hidden_size // num_attention_heads
    text_config = _text_config(
        tokenizer, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads
    )
    text_config |= {
        "vocab_size": len(tokenizer) if vocab_size is None else vocab_size,
        "initializer_range": initializer_range,
        "head_dim": head_dim,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": rope_theta,
            "mrope_section": _mrope_section(head_dim),
            "mrope_interleaved": True,
        },
    }
    vision_config = _vision_config(vision_hidden_size, vision_depth, vision_heads, patch_size, merge_size, hidden_size)
    vision_config |= {
        "initializer_range": initializer_range,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        tie_word_embeddings=tie_word_embeddings,
        **_vision_token_ids(tokenizer),
    )
    return _build(Qwen3VLForConditionalGeneration, config, attn_implementation, seed)


def _text_config(
    tokenizer: Qwen2Tokenizer,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int | None,
) -> dict[str, Any]:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_attention_heads if num_key_value_heads is None else num_key_value_heads,
        "max_position_embeddings": 4096,
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }


def _vision_config(
    hidden_size: int, depth: int, num_heads: int, patch_size: int, merge_size: int, out_hidden_size: int
) -> dict[str, Any]:
    return {
        "depth": depth,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_heads": num_heads,
        "patch_size": patch_size,
        "spatial_merge_size": merge_size,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "out_hidden_size": out_hidden_size,
    }


def _mrope_section(head_dim: int) -> list[int]:
    """Frequencies per axis (time, row, column), in the proportion 2:3:3 of the released models."""
    num_spatial = head_dim // 2 * 3 // 8
    return [head_dim // 2 - 2 * num_spatial, num_spatial, num_spatial]


def _vision_token_ids(tokenizer: Qwen2Tokenizer) -> dict[str, int]:
    return {
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    }


def _build(model_class: type[PreTrainedModel], config: PreTrainedConfig, attn_implementation: str, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class._from_config(config, attn_implementation=attn_implementation).eval()
