"""Tiny pipelines of every family in the settings table, of the real classes."""

import torch
from diffusers import (
    AutoencoderKLHunyuanImage,
    FlowMatchEulerDiscreteScheduler,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
)
from flux import build_corpus, build_flux_pipeline, draw_weights
from models import build_qwen2_5_vl
from qwen_image import build_qwen_image_pipeline, build_qwen_tokenizer
from sd3 import build_sd3_pipeline
from transformers import ByT5Tokenizer, T5Config, T5EncoderModel
from z_image import build_z_image_pipeline


def build_hunyuan_image_pipeline():
    tokenizer = build_qwen_tokenizer(build_corpus())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = HunyuanImagePipeline(
            transformer=HunyuanImageTransformer2DModel(
                in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
                num_single_layers=1, num_refiner_layers=1, guidance_embeds=True, text_embed_dim=32, text_embed_2_dim=16,
                rope_axes_dim=(8, 8),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            vae=AutoencoderKLHunyuanImage(
                in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 64, 64, 64), layers_per_block=1,
                scaling_factor=0.5, sample_size=32, spatial_compression_ratio=8,
            ),
            text_encoder=build_qwen2_5_vl(
                tokenizer, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, vision_hidden_size=16,
                vision_depth=1, tie_word_embeddings=False,
            ),
            tokenizer=tokenizer,
            text_encoder_2=T5EncoderModel(T5Config(vocab_size=384, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)),
            tokenizer_2=ByT5Tokenizer(),
        )  # fmt: skip
        draw_weights(pipeline, 1.5)
    return pipeline


# pipeline class → how a tiny pipeline of it is built
BUILDERS = {
    "FluxPipeline": build_flux_pipeline,
    "QwenImagePipeline": build_qwen_image_pipeline,
    "HunyuanImagePipeline": build_hunyuan_image_pipeline,
    "ZImagePipeline": build_z_image_pipeline,
    "StableDiffusion3Pipeline": build_sd3_pipeline,
}
