"""
Builds tiny FLUX pipelines, with tokenizers, from the real diffusers and transformers classes, without a network.

    python recipes/tiny/flux.py tiny-flux

saves one with random weights to the folder `tiny-flux`. The sides of its images are multiples of 8 pixels.
"""

import argparse
import json
import string
from collections.abc import Iterable

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers import trainers
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from trl_spatial.scenes import COLORS, REGIONS, RELATIONS, SHAPES


# Arguments of `build_flux_pipeline` for a transformer with 20 million parameters, the size used in the benchmarks.
FLUX_20M = {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 6, "attention_head_dim": 64}


def build_corpus() -> list[str]:
    """Words of scene captions and their openings, and some nouns of other captions."""
    phrases = [phrase for kind in RELATIONS.values() for phrase in kind.phrases]
    words = {word for text in [*phrases, *REGIONS] for word in text.split() if "{" not in word}
    words |= {*COLORS, *SHAPES, "a", "an", "the", "and", "is", "of", "in", "small", "large", "left", "right"}
    words |= {
        "cube",
        "sphere",
        "cat",
        "dog",
        "lamp",
        "table",
        "window",
        "There",
        "picture",
        "shows",
        "simple",
        "drawing",
    }
    return [spelling for word in sorted(words) for spelling in (word, word.capitalize())]


def build_clip_tokenizer(corpus: Iterable[str]) -> CLIPTokenizer:
    """Trains a CLIP tokenizer in which every word of the corpus is one token. Its limit is 77 tokens, like CLIP's."""
    tokenizer = CLIPTokenizer().backend_tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    # Add every byte at the end of a word: the trainer would add only those it sees, in an order that changes from run to
    # run, and an unseen one would be read as the end of the text.
    trainer = trainers.BpeTrainer(
        vocab_size=10**6,
        min_frequency=0,
        special_tokens=["<|startoftext|>", "<|endoftext|>", *(f"{byte}</w>" for byte in alphabet)],
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    return CLIPTokenizer(vocab=trained["vocab"], merges=merges, model_max_length=77)


def build_t5_tokenizer(corpus: Iterable[str]) -> T5TokenizerFast:
    """Builds a T5 tokenizer in which every word of the corpus is one token; others are split into characters."""
    words = sorted({f"▁{word}" for text in corpus for word in text.split()})
    characters = sorted({*string.ascii_letters, *string.digits, *string.punctuation, "▁"} - set(words))
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    vocabulary = [*special, *((word, -1.0) for word in words), *((character, -10.0) for character in characters)]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


def share_head(attention_head_dim: int) -> tuple[int, int, int]:
    """Splits a head into frames, rows and columns, 16 : 56 : 56 as in the released models, rounded to even sizes."""
    side = attention_head_dim * 7 // 32 * 2
    return attention_head_dim - 2 * side, side, side


def draw_weights(pipeline: DiffusionPipeline, gain: float) -> None:
    """Puts the models of a pipeline into evaluation mode and draws their weights from the global generator."""
    models = [model for model in pipeline.components.values() if isinstance(model, nn.Module)]
    for module in [module for model in models for module in model.eval().modules()]:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            nn.init.normal_(module.weight, std=gain / module.weight[0].numel() ** 0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1 * gain)


def build_vae(
    latent_channels: int, channels: tuple[int, ...], *, scaling_factor: float, shift_factor: float
) -> AutoencoderKL:
    """Builds the autoencoder: every entry of `channels` but the first halves the image."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=4,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_t5(tokenizer: T5TokenizerFast, hidden_size: int, num_layers: int, num_heads: int) -> T5EncoderModel:
    """Builds the text encoder that reads the whole prompt."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=hidden_size,
        d_kv=hidden_size // num_heads,
        d_ff=2 * hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    return T5EncoderModel(config)


def build_flux_pipeline(
    *,
    corpus: Iterable[str] | None = None,
    num_layers: int = 1,
    num_single_layers: int = 1,
    num_attention_heads: int = 2,
    attention_head_dim: int = 16,
    guidance_embeds: bool = True,
    latent_channels: int = 4,
    vae_channels: tuple[int, ...] = (8, 8, 8),
    text_hidden_size: int = 32,
    num_text_layers: int = 1,
    num_text_heads: int = 2,
    gain: float = 1.0,
    seed: int = 0,
) -> FluxPipeline:
    """
    Builds a tiny `FluxPipeline` with random weights on the CPU, in evaluation mode. The scheduler is FLUX.1-dev's.

    The defaults make images whose sides are multiples of 8 pixels; one of 32 × 32 is 16 tokens of 16 numbers.

    Args:
        corpus (`Iterable[str]`, *optional*):
            Texts whose words become one token each; other words are split. If `None`, [`build_corpus`].
        num_layers, num_single_layers, num_attention_heads, attention_head_dim (`int`):
            Sizes of the transformer. `attention_head_dim` must be a multiple of 8.
        guidance_embeds (`bool`, *optional*, defaults to `True`):
            Whether the transformer takes the guidance scale as an input, like FLUX.1-dev but not FLUX.1-schnell.
        latent_channels (`int`, *optional*, defaults to `4`):
            Channels of the VAE's latents; a token of the transformer has four times as many.
        vae_channels (`tuple[int, ...]`, *optional*, defaults to `(8, 8, 8)`):
            Channels of the VAE at each resolution, multiples of 4. Every entry but the first halves the image.
        text_hidden_size (`int`, *optional*, defaults to `32`):
            Size of the embeddings of both text encoders.
        num_text_layers (`int`, *optional*, defaults to `1`), num_text_heads (`int`, *optional*, defaults to `2`):
            Sizes of T5, from which alone the transformer learns the order of the words.
        gain (`float`, *optional*, defaults to `1.0`):
            Standard deviation of a random layer's output for inputs of standard deviation 1. With the classes' own
            initialization, the images of such small models hardly depend on the prompt.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random weights. The global generator is not changed.
    """
    corpus = build_corpus() if corpus is None else list(corpus)
    clip_tokenizer, t5_tokenizer = build_clip_tokenizer(corpus), build_t5_tokenizer(corpus)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = FluxPipeline(
            transformer=_build_transformer(
                num_layers=num_layers,
                num_single_layers=num_single_layers,
                num_attention_heads=num_attention_heads,
                attention_head_dim=attention_head_dim,
                in_channels=4 * latent_channels,
                text_hidden_size=text_hidden_size,
                guidance_embeds=guidance_embeds,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=3.0,
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=1.15,
                base_image_seq_len=256,
                max_image_seq_len=4096,
            ),
            vae=build_vae(latent_channels, vae_channels, scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=_build_clip(clip_tokenizer, text_hidden_size),
            tokenizer=clip_tokenizer,
            text_encoder_2=build_t5(t5_tokenizer, text_hidden_size, num_text_layers, num_text_heads),
            tokenizer_2=t5_tokenizer,
        )
        draw_weights(pipeline, gain)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _build_transformer(
    *,
    num_layers: int,
    num_single_layers: int,
    num_attention_heads: int,
    attention_head_dim: int,
    in_channels: int,
    text_hidden_size: int,
    guidance_embeds: bool,
) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=in_channels,
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        attention_head_dim=attention_head_dim,
        num_attention_heads=num_attention_heads,
        joint_attention_dim=text_hidden_size,
        pooled_projection_dim=text_hidden_size,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=share_head(attention_head_dim),
    )


def _build_clip(tokenizer: CLIPTokenizer, hidden_size: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where to save the pipeline")
    folder = parser.parse_args(argv).folder
    pipeline = build_flux_pipeline()
    pipeline.save_pretrained(folder)
    print(f"Saved to {folder}: a FLUX transformer of {pipeline.transformer.num_parameters():,} random parameters")


if __name__ == "__main__":
    main()
