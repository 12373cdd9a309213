"""
Builds tiny Qwen-Image pipelines, with tokenizer, from the real diffusers and transformers classes, without a network.

    python recipes/tiny/qwen_image.py tiny-qwen-image

saves one with random weights to the folder `tiny-qwen-image`. The sides of its images are multiples of 8 pixels.
"""

import argparse
from collections.abc import Iterable

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from flux import build_corpus, draw_weights, share_head
from models import build_qwen2_5_vl, build_tokenizer
from transformers import Qwen2Tokenizer


# The pipeline's template around a prompt. The pipeline drops the first 34 embeddings, which are those up to "user\n" if every word
# is one token, as in the released tokenizer.
TEMPLATE = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of "
    "the objects and background:",
    "user\n",
    "assistant\n",
)
# Further phrases of long scene captions.
OPENERS_AND_CLOSINGS = (
    "Seen from the viewer's side, also, in addition, at the same time, in this picture, Also, In, At",
    "Nothing else is in the picture. The background is plain.",
)


def build_qwen_tokenizer(corpus: Iterable[str]) -> Qwen2Tokenizer:
    """Trains a Qwen tokenizer in which every word of the corpus and of the template is one token."""
    words = sorted({word for text in corpus for word in text.split()})
    spellings = [spelling for word in words for spelling in (word, f" {word}")]
    return build_tokenizer([*TEMPLATE, *spellings], vocab_size=10**6)


def build_qwen_image_pipeline(
    *,
    corpus: Iterable[str] | None = None,
    num_layers: int = 2,
    num_attention_heads: int = 2,
    attention_head_dim: int = 16,
    latent_channels: int = 4,
    vae_channels: int = 8,
    vae_multipliers: tuple[int, ...] = (1, 1, 1),
    text_hidden_size: int = 32,
    num_text_layers: int = 2,
    num_text_heads: int = 2,
    gain: float = 1.5,
    seed: int = 0,
) -> QwenImagePipeline:
    """
    Builds a tiny `QwenImagePipeline` with random weights on the CPU, in evaluation mode, with Qwen-Image's scheduler.

    The defaults make images whose sides are multiples of 8 pixels; one of 32 × 32 is 16 tokens of 16 numbers. This
    scheduler needs at least two steps: a single one gives NaN.

    Args:
        corpus (`Iterable[str]`, *optional*):
            Texts whose words become one token each, at the start of a prompt and after a space; other words are split.
            If `None`, [`build_corpus`] and `OPENERS_AND_CLOSINGS`.
        num_layers, num_attention_heads, attention_head_dim (`int`):
            Sizes of the transformer. `attention_head_dim` must be a multiple of 8.
        latent_channels (`int`, *optional*, defaults to `4`):
            Channels of the VAE's latents; a token of the transformer has four times as many.
        vae_channels (`int`, *optional*, defaults to `8`), vae_multipliers (`tuple[int, ...]`):
            The VAE has `vae_channels` channels times a multiplier at each resolution, an even number. Every multiplier
            but the first halves the image; the released VAE has 96 channels times (1, 2, 4, 4).
        text_hidden_size, num_text_layers, num_text_heads (`int`):
            Sizes of the text encoder. `text_hidden_size // num_text_heads` must be a multiple of 4.
        gain (`float`, *optional*, defaults to `1.5`):
            Standard deviation of a random layer's output for inputs of standard deviation 1. Words reach the image only
            through attention: with 1, swapping two of them changes the pixels by about half a gray level.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random weights. The global generator is not changed.
    """
    tokenizer = build_qwen_tokenizer([*build_corpus(), *OPENERS_AND_CLOSINGS] if corpus is None else corpus)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = QwenImagePipeline(
            transformer=QwenImageTransformer2DModel(
                in_channels=4 * latent_channels,
                out_channels=latent_channels,
                num_layers=num_layers,
                attention_head_dim=attention_head_dim,
                num_attention_heads=num_attention_heads,
                joint_attention_dim=text_hidden_size,
                axes_dims_rope=share_head(attention_head_dim),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=1.0,
                use_dynamic_shifting=True,
                base_shift=0.5,
                max_shift=0.9,
                base_image_seq_len=256,
                max_image_seq_len=8192,
                shift_terminal=0.02,
            ),
            vae=_build_vae(latent_channels, vae_channels, vae_multipliers),
            text_encoder=build_qwen2_5_vl(
                tokenizer,
                hidden_size=text_hidden_size,
                intermediate_size=2 * text_hidden_size,
                num_hidden_layers=num_text_layers,
                num_attention_heads=num_text_heads,
                vision_hidden_size=16,  # the class has a vision tower, which text does not use
                vision_depth=1,
                tie_word_embeddings=False,  # as in the released 7B
            ),
            tokenizer=tokenizer,
        )
        draw_weights(pipeline, gain)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _build_vae(latent_channels: int, channels: int, multipliers: tuple[int, ...]) -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=channels,
        z_dim=latent_channels,
        dim_mult=list(multipliers),
        num_res_blocks=1,
        temperal_downsample=[step > 0 for step in range(len(multipliers) - 1)],
        # A different one per channel, as in the released VAE, and of the same magnitude.
        latents_mean=torch.linspace(-1.0, 1.0, latent_channels).tolist(),
        latents_std=torch.linspace(1.0, 3.0, latent_channels).tolist(),
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where to save the pipeline")
    folder = parser.parse_args(argv).folder
    pipeline = build_qwen_image_pipeline()
    pipeline.save_pretrained(folder)
    print(
        f"Saved to {folder}: a Qwen-Image transformer of {pipeline.transformer.num_parameters():,} random parameters"
    )


if __name__ == "__main__":
    main()
