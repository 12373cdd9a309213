"""Stable Diffusion 3 as a policy."""

from typing import Any

import torch
from PIL import Image
from torch import nn

from .base import DiffusionPolicy, SamplingOptions, negative_embeds, no_warnings_about_clip, to_image, to_sequence


class StableDiffusion3Policy(DiffusionPolicy):
    """
    Stable Diffusion 3 and 3.5: `StableDiffusion3Pipeline` ([Scaling Rectified Flow Transformers for High-Resolution Image
    Synthesis](https://huggingface.co/papers/2403.03206)).

    Its guidance is classifier-free. Both CLIPs see the first 77 tokens of a prompt; all of it goes through T5, padded to
    `max_sequence_length`, and the transformer sees the padding. Latents are a sequence of the positions of the VAE's
    latents: `image_seq_len` is `height * width / vae_scale_factor**2`.

    Raises:
        `ValueError`: If the pipeline was loaded without T5.
    """

    pipeline_class = "StableDiffusion3Pipeline"
    prompt_tokenizer = "tokenizer_3"
    max_prompt_tokens = 512
    has_classifier_free_guidance = True
    unread_outputs = ("ff.net.2", "ff_context.net.2")

    def __init__(self, pipeline: Any, *, max_sequence_length: int = 512):
        super().__init__(pipeline, max_sequence_length=max_sequence_length)
        if pipeline.text_encoder_3 is None or pipeline.tokenizer_3 is None:
            raise ValueError(
                "The pipeline has no `text_encoder_3` or no `tokenizer_3`: without T5, prompts are cut off after 77 tokens. "
                "Load them too: the text encoders are on the accelerator only while they encode."
            )

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        device = self.pipeline.text_encoder.device
        with torch.autocast(device.type, enabled=False), no_warnings_about_clip(self.pipeline):
            prompt_embeds, _, pooled_prompt_embeds, _ = self.pipeline.encode_prompt(
                prompts,
                prompt_2=None,
                prompt_3=None,
                device=device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )  # (n, 77 + max_sequence_length, joint_attention_dim), (n, pooled_projection_dim)
        return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled_prompt_embeds}

    def embed_shapes(self, num_images: int) -> dict[str, tuple[int, ...]]:
        shapes = super().embed_shapes(num_images)
        num_images, num_tokens, num_channels = shapes["prompt_embeds"]
        num_clip_tokens = self.pipeline.text_encoder.config.max_position_embeddings  # before T5's
        return shapes | {"prompt_embeds": (num_images, num_clip_tokens + num_tokens, num_channels)}

    def prepare_latents(self, generators: list[torch.Generator], options: SamplingOptions) -> torch.Tensor:
        return to_sequence(self._draw_latents(generators, options, self.transformer.config.in_channels))

    def prepare_sigmas(self, options: SamplingOptions) -> torch.Tensor:
        return self._set_timesteps(options, num_inference_steps=options.num_inference_steps)

    def predict_velocity(
        self,
        transformer: nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        embeds: dict[str, torch.Tensor],
        options: SamplingOptions,
    ) -> torch.Tensor:
        dtype = self.transformer.dtype
        is_guided = self.negative_prompt(options) is not None
        # As in the pipeline, one pass for both prompts: the negative one comes first.
        parts = [negative_embeds(embeds), embeds] if is_guided else [embeds]
        image = to_image(latents, options, self.pipeline.vae_scale_factor)  # (n, in_channels, rows, columns)
        hidden_states = torch.cat([image.to(dtype)] * len(parts))
        (velocity,) = transformer(
            hidden_states=hidden_states,
            timestep=(sigma.to(latents.device) * 1000).expand(len(latents)).repeat(len(parts)),
            encoder_hidden_states=torch.cat([part["prompt_embeds"] for part in parts]).to(dtype),
            pooled_projections=torch.cat([part["pooled_prompt_embeds"] for part in parts]).to(dtype),
            return_dict=False,
        )  # (n or 2 * n, in_channels, rows, columns)
        velocity = velocity.to(dtype)  # guided in the weights' dtype as in the pipeline: accelerate returns float32
        if is_guided:
            unguided, velocity = velocity.chunk(2)
            velocity = unguided + options.guidance_scale * (velocity - unguided)
        return to_sequence(velocity).float()

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor, options: SamplingOptions) -> list[Image.Image]:
        config = self.vae.config
        latents = to_image(latents, options, self.pipeline.vae_scale_factor)
        latents = latents / config.scaling_factor + config.shift_factor  # (n, in_channels, rows, columns)
        images = self._decode(latents)  # (n, 3, height, width)
        return self.pipeline.image_processor.postprocess(images, output_type="pil")

    @torch.no_grad()
    def encode_images(self, images: list[Image.Image]) -> torch.Tensor:
        config = self.vae.config
        return to_sequence((self._encode(images) - config.shift_factor) * config.scaling_factor)
