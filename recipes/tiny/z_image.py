"""
Builds tiny Z-Image pipelines, with tokenizer, from the real diffusers and transformers classes, without a network.

    python recipes/tiny/z_image.py tiny-z-image

saves one with random weights to the folder `tiny-z-image`. The sides of its images are multiples of 8 pixels.
"""

import argparse
from collections.abc import Iterable

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from flux import build_corpus, build_vae, draw_weights
from qwen_image import OPENERS_AND_CLOSINGS, build_qwen_tokenizer
from torch import nn
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model


# Qwen3's template, as it applies to a single user message, with thinking.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_z_image_pipeline(
    *,
    corpus: Iterable[str] | None = None,
    num_layers: int = 2,
    num_refiner_layers: int = 1,
    num_attention_heads: int = 2,
    attention_head_dim: int = 16,
    latent_channels: int = 4,
    vae_channels: tuple[int, ...] = (8, 8, 8),
    text_hidden_size: int = 32,
    num_text_layers: int = 2,
    num_text_heads: int = 2,
    gain: float = 1.0,
    seed: int = 0,
) -> ZImagePipeline:
    """
    Builds a tiny `ZImagePipeline` with random weights on the CPU, in evaluation mode, with Z-Image's scheduler.

    The defaults make images whose sides are multiples of 8 pixels; the latents of one of 32 × 32 are 64 positions of 4
    numbers, which the transformer takes as 16 tokens. It pads the image's tokens, and the prompt's, to a multiple of 32.

    Args:
        corpus (`Iterable[str]`, *optional*):
            Texts whose words become one token each, at the start of a prompt and after a space; other words are split.
            If `None`, [`build_corpus`] and `OPENERS_AND_CLOSINGS`.
        num_layers, num_attention_heads, attention_head_dim (`int`):
            Sizes of the transformer. `attention_head_dim` must be a multiple of 16.
        num_refiner_layers (`int`, *optional*, defaults to `1`):
            Number of layers for the image's tokens alone, and as many for the prompt's, before those for both.
        latent_channels (`int`, *optional*, defaults to `4`):
            Channels of the VAE's latents.
        vae_channels (`tuple[int, ...]`, *optional*, defaults to `(8, 8, 8)`):
            Channels of the VAE at each resolution, multiples of 4. Every entry but the first halves the image.
        text_hidden_size, num_text_layers, num_text_heads (`int`):
            Sizes of the text encoder. The pipeline takes its embeddings before the last layer.
        gain (`float`, *optional*, defaults to `1.0`):
            Standard deviation of a random layer's output for inputs of standard deviation 1.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random weights. The global generator is not changed.
    """
    tokenizer = build_qwen_tokenizer([*build_corpus(), *OPENERS_AND_CLOSINGS] if corpus is None else corpus)
    tokenizer.chat_template = CHAT_TEMPLATE
    side = attention_head_dim * 3 // 8  # frames, rows and columns split a head 2 : 3 : 3, as in the released model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = ZImageTransformer2DModel(
            in_channels=latent_channels,
            dim=num_attention_heads * attention_head_dim,
            n_layers=num_layers,
            n_refiner_layers=num_refiner_layers,
            n_heads=num_attention_heads,
            n_kv_heads=num_attention_heads,
            cap_feat_dim=text_hidden_size,
            axes_dims=[attention_head_dim - 2 * side, side, side],
            axes_lens=[1536, 512, 512],
        )
        pipeline = ZImagePipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
            vae=build_vae(latent_channels, vae_channels, scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=_build_qwen3(tokenizer, text_hidden_size, num_text_layers, num_text_heads),
            tokenizer=tokenizer,
        )
        draw_weights(pipeline, gain)
        nn.init.normal_(transformer.x_pad_token)
        nn.init.normal_(transformer.cap_pad_token)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _build_qwen3(tokenizer: Qwen2Tokenizer, hidden_size: int, num_layers: int, num_heads: int) -> Qwen3Model:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=1,
        head_dim=hidden_size // num_heads,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3Model(config)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where to save the pipeline")
    folder = parser.parse_args(argv).folder
    pipeline = build_z_image_pipeline()
    pipeline.save_pretrained(folder)
    print(f"Saved to {folder}: a Z-Image transformer of {pipeline.transformer.num_parameters():,} random parameters")


if __name__ == "__main__":
    main()
