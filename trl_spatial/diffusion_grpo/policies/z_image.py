"""Z-Image as a policy."""

import torch
from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from .base import DiffusionPolicy, SamplingOptions, negative_embeds, to_image, to_sequence


class ZImagePolicy(DiffusionPolicy):
    """
    Z-Image and Z-Image-Turbo: `ZImagePipeline` ([Z-Image: An Efficient Image Generation Foundation Model with Single-Stream
    Diffusion Transformer](https://huggingface.co/papers/2511.22699)).

    Its guidance is classifier-free, with a scale that is 1 lower than elsewhere: the velocity is the prompt's plus `guidance_scale`
    times its difference from the negative prompt's. `0.0` means no guidance, as Turbo is used. It matches the pipeline's call with
    its defaults: guidance at every step, without renormalization. Prompts are not padded to a fixed length; a mask separates them
    from padding. Latents are a sequence of the positions of the VAE's latents: `image_seq_len` is
    `height * width / vae_scale_factor**2`.
    """

    pipeline_class = "ZImagePipeline"
    prompt_tokenizer = "tokenizer"
    # The pipeline sets no limit. In the released models, the image follows the prompt on an axis of 1536 positions, and the
    # prompt is padded to a multiple of 32.
    max_prompt_tokens = 1504
    has_classifier_free_guidance = True
    unguided_scale = 0.0

    def count_tokens(self, prompt: str) -> int:
        # The pipeline counts its template's tokens, too.
        message = {"role": "user", "content": prompt}
        text = self.pipeline.tokenizer.apply_chat_template(
            [message], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )
        return super().count_tokens(text)

    @torch.no_grad()
    def encode_prompt(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        device = self.pipeline.text_encoder.device
        with torch.autocast(device.type, enabled=False):
            rows, _ = self.pipeline.encode_prompt(
                list(prompts),  # a copy: the pipeline writes its template into the list
                device=device,
                do_classifier_free_guidance=False,
                max_sequence_length=self.max_sequence_length,
            )  # per prompt (num_tokens, cap_feat_dim)
        ones = [torch.ones(len(row), dtype=torch.long, device=device) for row in rows]
        return {
            "prompt_embeds": pad_sequence(rows, batch_first=True),  # (n, text_seq_len, cap_feat_dim)
            "prompt_embeds_mask": pad_sequence(ones, batch_first=True),  # (n, text_seq_len)
        }

    def embed_shapes(self, num_images: int) -> dict[str, tuple[int, ...]]:
        shape = (num_images, self.max_sequence_length)
        return {"prompt_embeds": (*shape, self.transformer.config.cap_feat_dim), "prompt_embeds_mask": shape}

    def prepare_latents(self, generators: list[torch.Generator], options: SamplingOptions) -> torch.Tensor:
        return to_sequence(self._draw_latents(generators, options, self.transformer.config.in_channels))

    def prepare_sigmas(self, options: SamplingOptions) -> torch.Tensor:
        return self._set_timesteps(options, sigmas=get_default_z_image_sigmas(options.num_inference_steps))

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
        # As in the pipeline, one pass for both prompts: the negative one comes last.
        parts = [embeds, negative_embeds(embeds)] if is_guided else [embeds]
        captions = [
            row[:num_tokens].to(dtype)
            for part in parts
            for row, num_tokens in zip(part["prompt_embeds"], part["prompt_embeds_mask"].sum(1).tolist(), strict=True)
        ]
        images = to_image(latents, options, self.pipeline.vae_scale_factor).to(dtype)
        images = images.unsqueeze(2).repeat(len(parts), 1, 1, 1, 1)  # (len(captions), in_channels, 1, rows, columns)
        # The model's time goes up to 1 at the image, and it predicts `image - noise`.
        time = (1000 - sigma.to(latents.device) * 1000) / 1000
        (outputs,) = transformer(
            list(images), time.expand(len(latents)).repeat(len(parts)), captions, return_dict=False
        )
        output = torch.stack(outputs).squeeze(2).float()  # (len(captions), in_channels, rows, columns)
        if is_guided:
            output, unguided = output.chunk(2)
            output = output + options.guidance_scale * (output - unguided)
        return to_sequence(-output)

    @torch.no_grad()
    def decode_latents(self, latents: torch.Tensor, options: SamplingOptions) -> list[Image.Image]:
        config = self.vae.config
        latents = to_image(latents, options, self.pipeline.vae_scale_factor).to(self.vae.dtype)
        images = self._decode(latents / config.scaling_factor + config.shift_factor)  # (n, 3, height, width)
        return self.pipeline.image_processor.postprocess(images, output_type="pil")

    @torch.no_grad()
    def encode_images(self, images: list[Image.Image]) -> torch.Tensor:
        config = self.vae.config
        return to_sequence((self._encode(images) - config.shift_factor) * config.scaling_factor)
