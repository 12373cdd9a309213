"""
Builds tiny Stable Diffusion 3.5 pipelines, with tokenizers, from the real diffusers and transformers classes, without a network.

    python recipes/tiny/sd3.py tiny-sd3

saves one with random weights to the folder `tiny-sd3`. The sides of its images are multiples of 8 pixels.
"""

import argparse
from collections.abc import Iterable

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from flux import build_clip_tokenizer, build_corpus, build_t5, build_t5_tokenizer, build_vae, draw_weights
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer


def build_sd3_pipeline(
    *,
    corpus: Iterable[str] | None = None,
    num_layers: int = 2,
    num_dual_attention_layers: int = 1,
    num_attention_heads: int = 2,
    attention_head_dim: int = 16,
    latent_channels: int = 4,
    pos_embed_max_size: int = 16,
    vae_channels: tuple[int, ...] = (8, 8, 8),
    text_hidden_size: int = 32,
    num_text_layers: int = 2,
    num_text_heads: int = 2,
    gain: float = 1.0,
    seed: int = 0,
) -> StableDiffusion3Pipeline:
    """
    Builds a tiny `StableDiffusion3Pipeline` with random weights on the CPU, in evaluation mode. Everything but the sizes is
    as in Stable Diffusion 3.5 Medium: the scheduler, normalized queries and keys, a second attention in the first blocks.

    The defaults make images whose sides are multiples of 8 pixels, up to 128; the latents of one of 32 × 32 are 64
    positions of 4 numbers, which the transformer takes as 16 tokens.

    Args:
        corpus (`Iterable[str]`, *optional*):
            Texts whose words become one token each; other words are split. If `None`, [`build_corpus`].
        num_layers, num_attention_heads, attention_head_dim (`int`):
            Sizes of the transformer.
        num_dual_attention_layers (`int`, *optional*, defaults to `1`):
            Number of first blocks that have a second attention, over image tokens alone.
        latent_channels (`int`, *optional*, defaults to `4`):
            Channels of the VAE's latents.
        pos_embed_max_size (`int`, *optional*, defaults to `16`):
            Maximum number of tokens along a side of an image.
        vae_channels (`tuple[int, ...]`, *optional*, defaults to `(8, 8, 8)`):
            Channels of the VAE at each resolution, multiples of 4. Every entry but the first halves the image.
        text_hidden_size (`int`, *optional*, defaults to `32`):
            Size of T5's embeddings. Each CLIP's are half as wide, so that concatenated they match T5's.
        num_text_layers (`int`, *optional*, defaults to `2`), num_text_heads (`int`, *optional*, defaults to `2`):
            Sizes of the three text encoders. The pipeline takes CLIP's embeddings before its last layer.
        gain (`float`, *optional*, defaults to `1.0`):
            Standard deviation of a random layer's output for inputs of standard deviation 1.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the random weights. The global generator is not changed.
    """
    corpus = build_corpus() if corpus is None else list(corpus)
    tokenizer, t5_tokenizer = build_clip_tokenizer(corpus), build_t5_tokenizer(corpus)
    tokenizer_2 = build_clip_tokenizer(corpus)
    tokenizer_2.pad_token = "!"  # as in the released pipeline
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=pos_embed_max_size,
                in_channels=latent_channels,
                out_channels=latent_channels,
                num_layers=num_layers,
                attention_head_dim=attention_head_dim,
                num_attention_heads=num_attention_heads,
                joint_attention_dim=text_hidden_size,
                caption_projection_dim=num_attention_heads * attention_head_dim,
                pooled_projection_dim=text_hidden_size,
                pos_embed_max_size=pos_embed_max_size,
                dual_attention_layers=tuple(range(num_dual_attention_layers)),
                qk_norm="rms_norm",
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=build_vae(latent_channels, vae_channels, scaling_factor=1.5305, shift_factor=0.0609),
            text_encoder=_build_clip(tokenizer, text_hidden_size // 2, num_text_layers, num_text_heads),
            tokenizer=tokenizer,
            text_encoder_2=_build_clip(tokenizer_2, text_hidden_size // 2, num_text_layers, num_text_heads),
            tokenizer_2=tokenizer_2,
            text_encoder_3=build_t5(t5_tokenizer, text_hidden_size, num_text_layers, num_text_heads),
            tokenizer_3=t5_tokenizer,
        )
        draw_weights(pipeline, gain)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _build_clip(
    tokenizer: CLIPTokenizer, hidden_size: int, num_layers: int, num_heads: int
) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        projection_dim=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where to save the pipeline")
    folder = parser.parse_args(argv).folder
    pipeline = build_sd3_pipeline()
    pipeline.save_pretrained(folder)
    print(
        f"Saved to {folder}: a Stable Diffusion 3.5 transformer of {pipeline.transformer.num_parameters():,} random "
        "parameters"
    )


if __name__ == "__main__":
    main()
