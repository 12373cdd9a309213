"""What a family of text-to-image models must give: five methods around its diffusers pipeline."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import nn


@dataclass(frozen=True)
class SamplingOptions:
    """
    How an image is sampled.

    Args:
        height, width (`int`):
            Size of the image in pixels.
        num_inference_steps (`int`):
            Number of denoising steps.
        guidance_scale (`float`):
            Strength of the guidance, as the family's pipeline understands it.
    """

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float


class DiffusionPolicy(ABC):
    """
    A text-to-image model as a policy: the parts of a diffusers pipeline, each callable by itself.

    A policy keeps no state. What a method returns depends on its arguments and the weights alone, so rollout,
    training and evaluation see the same model. Only `predict_velocity` takes part in the caller's autocast.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Pipeline of the class that `pipeline_class` names.
        max_sequence_length (`int`, *optional*, defaults to `512`):
            Number of tokens a prompt is padded to, and the most it may have.

    Raises:
        `ValueError`: If the scheduler is not flow matching's Euler scheduler, or `max_sequence_length` is out of range.
    """

    # Given by a family:
    pipeline_class: ClassVar[str]  # name of the diffusers class
    prompt_tokenizer: ClassVar[str]  # name of the component that counts a prompt's tokens
    max_prompt_tokens: ClassVar[int]  # the most the pipeline itself accepts as `max_sequence_length`

    def __init__(self, pipeline: Any, *, max_sequence_length: int = 512):
        scheduler = type(pipeline.scheduler).__name__
        if scheduler != "FlowMatchEulerDiscreteScheduler":
            raise ValueError(
                f"The pipeline's scheduler is {scheduler}, but its steps are trained as those of the "
                "FlowMatchEulerDiscreteScheduler. Set `pipeline.scheduler = "
                "FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)`."
            )
        if not 1 <= max_sequence_length <= self.max_prompt_tokens:
            raise ValueError(
                f"`max_sequence_length` must be from 1 to {self.max_prompt_tokens}, the most {self.pipeline_class} "
                f"takes, got {max_sequence_length}."
            )
        self.pipeline = pipeline
        self.max_sequence_length = max_sequence_length

    @property
    def transformer(self) -> Any:
        """The denoising transformer, a diffusers model, not wrapped."""
        return self.pipeline.transformer

    @property
    def vae(self) -> Any:
        """The autoencoder between latents and images, a diffusers model."""
        return self.pipeline.vae

    @property
    def encoders(self) -> list[nn.Module]:
        """The text encoders."""
        components = self.pipeline.components.items()
        return [module for name, module in components if name.startswith("text_encoder") and module is not None]

    @property
    def size_multiple(self) -> int:
        """Height and width of an image are multiples of this many pixels: a latent's, times two for packing."""
        return 2 * self.pipeline.vae_scale_factor

    @abstractmethod
    def encode_prompt(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """
        Encodes prompts on the device of the text encoders, in the type of their weights and without gradient.

        Args:
            prompts (`list[str]`):
                Prompts that [`~DiffusionPolicy.check_prompts`] accepts.

        Returns:
            `dict[str, torch.Tensor]`: What [`~DiffusionPolicy.predict_velocity`] needs of the prompts: tensors of
            shape `(len(prompts), ...)`. Where the number of tokens differs between calls, it is the second dimension,
            zeros on its right mean padding, and a mask is among the tensors.
        """

    @abstractmethod
    def prepare_latents(self, generators: list[torch.Generator], options: SamplingOptions) -> torch.Tensor:
        """
        Draws the latents that sampling starts from, as the pipeline does.

        Args:
            generators (`list[torch.Generator]`):
                One per image.
            options ([`SamplingOptions`]):
                Size of the images.

        Returns:
            `torch.Tensor` of shape `(len(generators), image_seq_len, num_channels)`: float32, drawn on the generators'
            device and moved to the transformer's.
        """

    @abstractmethod
    def prepare_sigmas(self, options: SamplingOptions) -> torch.Tensor:
        """
        Gives the noise levels that the pipeline's own scheduler visits.

        Returns:
            `torch.Tensor` of shape `(num_inference_steps + 1,)`: float32 on the CPU, from 1 at most down to 0.
        """

    @abstractmethod
    def predict_velocity(
        self,
        transformer: nn.Module,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        embeds: dict[str, torch.Tensor],
        options: SamplingOptions,
    ) -> torch.Tensor:
        """
        Predicts the velocity `noise - image` at one noise level, guidance included.

        Args:
            transformer (`torch.nn.Module`):
                The policy's transformer, or what wraps it in training.
            latents (`torch.Tensor` of shape `(n, image_seq_len, num_channels)`):
                Latents in float32. They are cast to the type of the transformer's weights here and nowhere else.
            sigma (`torch.Tensor` of shape `()`):
                Noise level, float32.
            embeds (`dict[str, torch.Tensor]`):
                From [`~DiffusionPolicy.encode_prompt`], a row per image.
            options ([`SamplingOptions`]):
                Size and guidance scale.

        Returns:
            `torch.Tensor` of shape `(n, image_seq_len, num_channels)`: float32.
        """

    @abstractmethod
    def decode_latents(self, latents: torch.Tensor, options: SamplingOptions) -> list[Image.Image]:
        """
        Decodes the latents at the end of sampling into images, in the type of the VAE's weights and without gradient.

        Args:
            latents (`torch.Tensor` of shape `(n, image_seq_len, num_channels)`):
                Latents without noise.
            options ([`SamplingOptions`]):
                Size of the images.
        """

    def check_prompts(self, prompts: list[str]) -> None:
        """
        Raises an error for a prompt that is empty or that the text encoder would cut off.

        Args:
            prompts (`list[str]`):
                The prompts; errors name a prompt by its index.
        """
        tokenizer = getattr(self.pipeline, self.prompt_tokenizer)
        for index, prompt in enumerate(prompts):
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f"Prompt {index} is {prompt!r}, which says nothing. Drop it, or give it a text.")
            num_tokens = len(tokenizer(prompt, verbose=False).input_ids)
            if num_tokens > self.max_sequence_length:
                short = prompt if len(prompt) <= 60 else f"{prompt[:57]}..."
                raise ValueError(
                    f"Prompt {index}, {short!r}, has {num_tokens} tokens; the text encoder takes "
                    f"`max_sequence_length={self.max_sequence_length}`. Shorten it, or raise `max_sequence_length` "
                    f"(at most {self.max_prompt_tokens})."
                )

    def check_size(self, height: int, width: int) -> None:
        """
        Raises an error for an image size that the latents cannot have. The message names the nearest ones.

        Args:
            height, width (`int`):
                Size of the image in pixels.
        """
        multiple = self.size_multiple
        for field, size in (("height", height), ("width", width)):
            if size > 0 and size % multiple == 0:
                continue
            below = size // multiple * multiple
            nearest = f"{multiple}" if below <= 0 else f"{below} and {below + multiple}"
            raise ValueError(
                f"`{field}={size}` is not a size that {self.pipeline_class} can make: sides are multiples of {multiple} "
                f"pixels. Nearest: {nearest}."
            )
