"""FLUX.1 as a policy."""

import numpy as np
import torch
from PIL import Image
from torch import nn

from .base import DiffusionPolicy, SamplingOptions, no_warnings_about_clip


class FluxPolicy(DiffusionPolicy):
    """
    FLUX.1: `FluxPipeline` with text guidance as an input (dev) or without guidance (schnell).

    CLIP's pooled embedding sees the first 77 tokens of a prompt; all of it goes through T5.
    """

    pipeline_class = "FluxPipeline"
    prompt_tokenizer = "tokenizer_2"
    max_prompt_tokens = 512
    has_classifier_free_guidance = False
    unread_outputs = ("ff.net.2", "ff_context.net.2", "proj_out")

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        device = self.pipeline.text_encoder.device
        # A caller's autocast is for the transformer. Here as below, encoders and VAE compute as in the pipeline.
        with torch.autocast(device.type, enabled=False), no_warnings_about_clip(self.pipeline):
            prompt_embeds, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
                prompts, device=device, max_sequence_length=self.max_sequence_length
            )  # (n, max_sequence_length, joint_attention_dim), (n, pooled_projection_dim)
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    def prepare_latents(self, generators: list[torch.Generator], options: SamplingOptions) -> torch.Tensor:
        latents, _ = self._draw_latents(generators, options, self.transformer.config.in_channels // 4)
        return latents  # (n, image_seq_len, in_channels)

    def prepare_sigmas(self, options: SamplingOptions) -> torch.Tensor:
        num_steps = options.num_inference_steps
        return self._set_timesteps(options, sigmas=np.linspace(1.0, 1 / num_steps, num_steps))

    def predict_velocity(
        self,
        transformer: nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        embeds: dict[str, torch.Tensor],
        options: SamplingOptions,
    ) -> torch.Tensor:
        num_images, device, dtype = len(latents), latents.device, self.transformer.dtype
        # Rounded as a timestep, as in the pipeline: in bfloat16, a rounded sigma is off by up to 4 of 1000 timesteps.
        timestep = (sigma.to(device) * 1000).to(dtype) / 1000
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full((num_images,), options.guidance_scale, device=device)
        prompt_embeds = embeds["prompt_embeds"].to(dtype)
        rows, columns = options.height // self.size_multiple, options.width // self.size_multiple
        with device:  # the pipeline makes positions on the default device, and would move them at every step
            img_ids = self.pipeline._prepare_latent_image_ids(num_images, rows, columns, device, torch.float32)
        (velocity,) = transformer(
            hidden_states=latents.to(dtype),
            timestep=timestep.expand(num_images),
            guidance=guidance,
            pooled_projections=embeds["pooled_prompt_embeds"].to(dtype),
            encoder_hidden_states=prompt_embeds,
            txt_ids=torch.zeros(prompt_embeds.shape[1], 3, device=device),
            img_ids=img_ids,
            return_dict=False,
        )
        return velocity.float()  # (n, image_seq_len, in_channels)

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor, options: SamplingOptions) -> list[Image.Image]:
        latents = self.pipeline._unpack_latents(latents, options.height, options.width, self.pipeline.vae_scale_factor)
        config = self.vae.config
        latents = latents / config.scaling_factor + config.shift_factor  # (n, latent_channels, rows, columns)
        images = self._decode(latents)  # (n, 3, height, width)
        return self.pipeline.image_processor.postprocess(images, output_type="pil")

    @torch.no_grad()
    def encode_images(self, images: list[Image.Image]) -> torch.Tensor:
        config = self.vae.config
        latents = (self._encode(images) - config.shift_factor) * config.scaling_factor
        return self.pipeline._pack_latents(latents, *latents.shape)  # (n, image_seq_len, in_channels)
