"""Qwen-Image as a policy."""

import numpy as np
import torch
from PIL import Image
from torch import nn

from .base import DiffusionPolicy, SamplingOptions, negative_embeds


class QwenImagePolicy(DiffusionPolicy):
    """
    Qwen-Image: `QwenImagePipeline` ([Qwen-Image Technical Report](https://huggingface.co/papers/2508.02324)).

    Its guidance is classifier-free: our `guidance_scale` is what the pipeline calls `true_cfg_scale`. Prompts are not padded
    to a fixed length; a mask separates them from padding.
    """

    pipeline_class = "QwenImagePipeline"
    prompt_tokenizer = "tokenizer"
    max_prompt_tokens = 1024
    has_classifier_free_guidance = True
    unread_outputs = ("img_mlp.net.2", "txt_mlp.net.2")
    default_negative_prompt = " "  # as its authors do
    guidance_argument = "true_cfg_scale"  # its `guidance_scale` is for distilled models, none of which was released

    @property
    def idle_modules(self) -> list[str]:
        last = len(self.transformer.transformer_blocks) - 1  # its output for the text tokens is not used
        return [f"transformer_blocks.{last}.attn.to_add_out", f"transformer_blocks.{last}.txt_mlp"]

    def count_tokens(self, prompt: str) -> int:
        # The pipeline also counts the part of its template after the prompt.
        template, start = self.pipeline.prompt_template_encode, self.pipeline.prompt_template_encode_start_idx
        return super().count_tokens(template.format(prompt)) - start

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        device = self.pipeline.text_encoder.device
        with torch.autocast(device.type, enabled=False):
            prompt_embeds, mask = self.pipeline.encode_prompt(
                prompts, device=device, max_sequence_length=self.max_sequence_length
            )  # (n, text_seq_len, joint_attention_dim), (n, text_seq_len) or None
        if mask is None:  # there is no padding
            mask = torch.ones(prompt_embeds.shape[:2], dtype=torch.long, device=device)
        return {"prompt_embeds": prompt_embeds, "prompt_embeds_mask": mask}

    def embed_shapes(self, num_images: int) -> dict[str, tuple[int, ...]]:
        shape = (num_images, self.max_sequence_length)
        return {"prompt_embeds": (*shape, self.transformer.config.joint_attention_dim), "prompt_embeds_mask": shape}

    def prepare_latents(self, generators: list[torch.Generator], options: SamplingOptions) -> torch.Tensor:
        return self._draw_latents(
            generators, options, self.transformer.config.in_channels // 4
        )  # (n, image_seq_len, in_channels)

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
        velocity = self._evaluate(transformer, latents, sigma, embeds, options)
        if self.negative_prompt(options) is not None:
            unguided = self._evaluate(transformer, latents, sigma, negative_embeds(embeds), options)
            guided = unguided + options.guidance_scale * (velocity - unguided)
            # Each token keeps the norm that it has without guidance.
            norm, guided_norm = (torch.norm(tokens, dim=-1, keepdim=True) for tokens in (velocity, guided))
            velocity = guided * (norm / guided_norm)
        return velocity.float()  # (n, image_seq_len, in_channels)

    def _evaluate(
        self,
        transformer: nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        embeds: dict[str, torch.Tensor],
        options: SamplingOptions,
    ) -> torch.Tensor:
        """Predicts the velocity for the prompts, without guidance, in the weights' dtype."""
        dtype = self.transformer.dtype
        # Drop padding left by a longer prompt elsewhere, and the mask if no row needs one, so that images of one prompt
        # are computed the same way whatever they are batched with.
        mask = embeds["prompt_embeds_mask"]  # on the CPU, where reading it does not wait for the device
        mask = mask[:, : int(mask.sum(dim=1).max())]  # (n, text_seq_len)
        # Rounded as a timestep, as in the pipeline: in bfloat16, a rounded sigma is off by up to 4 of 1000 timesteps.
        timestep = (sigma.to(latents.device) * 1000).to(dtype) / 1000
        size = (1, options.height // self.size_multiple, options.width // self.size_multiple)
        (velocity,) = transformer(
            hidden_states=latents.to(dtype),
            timestep=timestep.expand(len(latents)),
            encoder_hidden_states=embeds["prompt_embeds"][:, : mask.shape[1]].to(dtype),
            encoder_hidden_states_mask=None if mask.all() else mask.to(latents.device),
            img_shapes=[[size]] * len(latents),
            return_dict=False,
        )
        return velocity.to(dtype)  # guided in the weights' dtype as in the pipeline: accelerate returns float32

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor, options: SamplingOptions) -> list[Image.Image]:
        latents = self.pipeline._unpack_latents(latents, options.height, options.width, self.pipeline.vae_scale_factor)
        config = self.vae.config
        latents = latents.to(self.vae.dtype)  # (n, latent_channels, 1, rows, columns)
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1).to(latents)
            for values in (config.latents_mean, config.latents_std)
        )
        images = self._decode(latents / (1 / std) + mean)[:, :, 0]  # (n, 3, height, width)
        return self.pipeline.image_processor.postprocess(images, output_type="pil")

    @torch.no_grad()
    def encode_images(self, images: list[Image.Image]) -> torch.Tensor:
        latents = self._encode(images, frames_axis=2)[:, :, 0]  # (n, latent_channels, rows, columns)
        config = self.vae.config
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (config.latents_mean, config.latents_std)
        )
        return self.pipeline._pack_latents((latents - mean) / std, *latents.shape)  # (n, image_seq_len, in_channels)
