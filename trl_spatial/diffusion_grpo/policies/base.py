"""The interface of a family of text-to-image models: six methods around its diffusers pipeline."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift  # the same in every family's pipeline
from PIL import Image
from torch import nn


# Prefix of the names of the negative prompt's embeddings, as in diffusers
NEGATIVE_PREFIX = "negative_"


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
            Strength of the guidance, of the kind that the family has: an input of the transformer, or the scale of
            classifier-free guidance, where the family's `unguided_scale` means none.
        negative_prompt (`str`, *optional*):
            What classifier-free guidance leads away from. If `None`, the family's `default_negative_prompt`.
    """

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    negative_prompt: str | None = None


class DiffusionPolicy(ABC):
    """
    A text-to-image model as a policy: the parts of a diffusers pipeline, each callable by itself.

    A policy keeps no state except where its VAE runs. What a method returns depends on its arguments and the weights alone, so
    rollout, training and evaluation see the same model. Only `predict_velocity` runs under the caller's autocast.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Pipeline of the class that `pipeline_class` names.
        max_sequence_length (`int`, *optional*, defaults to `512`):
            The most tokens a prompt may have, and the number to which a family of fixed length pads it.

    Raises:
        `ValueError`: If the scheduler is not flow matching's Euler scheduler, or `max_sequence_length` is out of range.
    """

    # Set by each family:
    pipeline_class: ClassVar[str]  # name of the diffusers class
    prompt_tokenizer: ClassVar[str]  # name of the component that counts a prompt's tokens
    max_prompt_tokens: ClassVar[int]  # the most the pipeline itself accepts as `max_sequence_length`
    has_classifier_free_guidance: ClassVar[bool]  # or else the guidance scale is an input of the transformer
    guidance_argument: ClassVar[str] = "guidance_scale"  # the scale's name in the pipeline's own call
    unguided_scale: ClassVar[float] = 1.0  # the scale that means no classifier-free guidance
    default_negative_prompt: ClassVar[str] = ""  # what classifier-free guidance leads away from
    # Names of linear layers at the end of a block. A gate multiplies their output, which only goes into the block's: unless the
    # gate is trained, no backward pass reads it.
    unread_outputs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, pipeline: Any, *, max_sequence_length: int = 512):
        scheduler = type(pipeline.scheduler).__name__
        if scheduler != "FlowMatchEulerDiscreteScheduler":
            raise ValueError(
                f"The pipeline's scheduler is {scheduler}, but training assumes the steps of the "
                "FlowMatchEulerDiscreteScheduler. Set `pipeline.scheduler = "
                "FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config)`."
            )
        if not 1 <= max_sequence_length <= self.max_prompt_tokens:
            raise ValueError(
                f"`max_sequence_length` must be from 1 to {self.max_prompt_tokens}, the maximum of {self.pipeline_class}, "
                f"got {max_sequence_length}."
            )
        self.pipeline = pipeline
        self.max_sequence_length = max_sequence_length
        self._vae_device: torch.device | None = None  # where the VAE moves to run; `None` means that it stays in place

    @property
    def transformer(self) -> Any:
        """The denoising transformer, a diffusers model, not wrapped."""
        return self.pipeline.transformer

    @property
    def vae(self) -> Any:
        """The autoencoder between latents and images, a diffusers model."""
        return self.pipeline.vae

    def offload_vae(self, device: torch.device) -> None:
        """
        Keeps the VAE on the CPU except while it runs on `device`, just as the text encoders are there except while they encode.
        """
        self.vae.to("cpu")
        self._vae_device = device

    @property
    def encoders(self) -> list[nn.Module]:
        """The text encoders."""
        components = self.pipeline.components.items()
        return [module for name, module in components if name.startswith("text_encoder") and module is not None]

    @property
    def size_multiple(self) -> int:
        """Height and width of an image are multiples of this many pixels: a token is 2 × 2 positions of the latents."""
        return 2 * self.pipeline.vae_scale_factor

    @property
    def idle_modules(self) -> list[str]:
        """
        Names of modules in the transformer whose output is unused. Their weights never get a gradient, which distributed
        training would wait for.
        """
        return []

    def negative_prompt(self, options: SamplingOptions) -> str | None:
        """
        The prompt whose embeddings [`~DiffusionPolicy.predict_velocity`] needs in addition to the prompts' own; `None` if
        the options ask for no classifier-free guidance.
        """
        if not self.has_classifier_free_guidance or options.guidance_scale <= self.unguided_scale:
            return None
        return self.default_negative_prompt if options.negative_prompt is None else options.negative_prompt

    def num_passes(self, options: SamplingOptions) -> int:
        """Passes through the transformer for one velocity: two with classifier-free guidance, else one."""
        return 1 if self.negative_prompt(options) is None else 2

    def pipeline_guidance(self, options: SamplingOptions) -> dict[str, Any]:
        """The guidance as keyword arguments of the pipeline's own call, for users of the trained weights."""
        negative_prompt = self.negative_prompt(options)
        guidance: dict[str, Any] = {self.guidance_argument: options.guidance_scale}
        return guidance if negative_prompt is None else guidance | {"negative_prompt": negative_prompt}

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
            zeros on its right mean padding, and a mask is among the tensors. Names are diffusers'.
        """

    def embed_shapes(self, num_images: int) -> dict[str, tuple[int, ...]]:
        """
        Shapes of what [`~DiffusionPolicy.encode_prompt`] returns for prompts as long as they may be, without encoding
        any.
        """
        config = self.transformer.config
        return {
            "prompt_embeds": (num_images, self.max_sequence_length, config.joint_attention_dim),
            "pooled_prompt_embeds": (num_images, config.pooled_projection_dim),
        }

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
        Predicts the velocity `noise - image`, guidance included.

        Args:
            transformer (`torch.nn.Module`):
                The policy's transformer, or what wraps it in training.
            latents (`torch.Tensor` of shape `(n, image_seq_len, num_channels)`):
                Latents in float32. They are cast to the type of the transformer's weights here and nowhere else.
            sigma (`torch.Tensor` of shape `()` or `(n,)`):
                Noise level, of all images or of each, float32.
            embeds (`dict[str, torch.Tensor]`):
                From [`~DiffusionPolicy.encode_prompt`], a row per image. With classifier-free guidance also those of
                the negative prompt, their names beginning with `negative_`, as [`PromptCache`] gives them.
            options ([`SamplingOptions`]):
                Size and guidance scale.

        Returns:
            `torch.Tensor` of shape `(n, image_seq_len, num_channels)`: float32.

        Raises:
            `ValueError`: If the options ask for classifier-free guidance and there are no embeddings of the negative prompt.
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

    @abstractmethod
    def encode_images(self, images: list[Image.Image]) -> torch.Tensor:
        """
        Encodes images into latents without noise, the inverse of [`~DiffusionPolicy.decode_latents`] up to what the VAE loses: the
        mode of its distribution, in the type of its weights and without gradient.

        Args:
            images (`list[PIL.Image.Image]`):
                RGB images of one size that [`~DiffusionPolicy.check_size`] accepts.

        Returns:
            `torch.Tensor` of shape `(len(images), image_seq_len, num_channels)`: float32, where the VAE works.
        """

    def _draw_latents(self, generators: list[torch.Generator], options: SamplingOptions, num_channels: int) -> Any:
        """Calls the pipeline's own `prepare_latents`."""
        return self.pipeline.prepare_latents(
            len(generators),
            num_channels,
            options.height,
            options.width,
            torch.float32,
            self.transformer.device,
            generators,
        )

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decodes the VAE's latents, on the device where it runs."""
        with self._working_vae() as device:
            return self.vae.decode(latents.to(device, self.vae.dtype), return_dict=False)[0]

    def _encode(self, images: list[Image.Image], *, frames_axis: int | None = None) -> torch.Tensor:
        """Encodes images to the VAE's latents, float32; `frames_axis` is where a video VAE expects its one frame."""
        pixels = self.pipeline.image_processor.preprocess(images)  # (n, 3, height, width)
        if frames_axis is not None:
            pixels = pixels.unsqueeze(frames_axis)
        with self._working_vae() as device:
            return self.vae.encode(pixels.to(device, self.vae.dtype)).latent_dist.mode().float()

    @contextmanager
    def _working_vae(self) -> Iterator[torch.device]:
        """Context with the VAE on the device where it runs, without the caller's autocast, which is for the transformer."""
        home = self.vae.device
        device = home if self._vae_device is None else self._vae_device
        # the meta device, used to estimate memory, has no autocast
        autocast = nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
        is_away = device != home  # `to` walks through all modules also where there is nothing to move
        if is_away:
            self.vae.to(device)
        try:
            with autocast:
                yield device
        finally:
            if is_away:
                self.vae.to(home)

    def check_prompts(self, prompts: Iterable[str]) -> None:
        """Raises an error, with its index, for a prompt that is empty or that the text encoder would cut off."""
        for index, prompt in enumerate(prompts):
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f"Prompt {index} is {prompt!r}, which has no words. Drop it, or replace it.")
            self._check_length(f"Prompt {index}", prompt)

    def count_tokens(self, prompt: str) -> int:
        """Number of tokens that `max_sequence_length` limits."""
        return len(getattr(self.pipeline, self.prompt_tokenizer)(prompt, verbose=False).input_ids)

    def check_size(self, height: int, width: int) -> None:
        """
        Raises an error for an image size, in pixels, that the latents cannot have. The message names the nearest ones.
        """
        multiple = self.size_multiple
        for field, size in (("height", height), ("width", width)):
            if size > 0 and size % multiple == 0:
                continue
            below = size // multiple * multiple
            nearest = f"{multiple}" if below <= 0 else f"{below} and {below + multiple}"
            raise ValueError(
                f"`{field}={size}` is not a size that {self.pipeline_class} can draw: sides must be multiples of {multiple} "
                f"pixels. Nearest: {nearest}."
            )

    def check_num_inference_steps(self, num_inference_steps: int) -> None:
        """Raises an error for a number of denoising steps with which the scheduler's sigmas would be NaN."""
        shift_terminal = self.pipeline.scheduler.config.shift_terminal
        if shift_terminal and num_inference_steps < 2:
            raise ValueError(
                f"`num_inference_steps={num_inference_steps}` is too few for this scheduler. It stretches the sigmas so "
                f"that the last one is `shift_terminal={shift_terminal}`; with one step, the only sigma is 1, which "
                "stretching cannot change. Use at least 2 steps."
            )

    def check_guidance(self, options: SamplingOptions) -> None:
        """Raises an error for guidance that the family does not have, instead of sampling without it."""
        negative_prompt = options.negative_prompt
        if self.has_classifier_free_guidance and options.guidance_scale < self.unguided_scale:
            raise ValueError(
                f"`guidance_scale={options.guidance_scale}` is below {self.unguided_scale:g}, where {self.pipeline_class} "
                f"samples without guidance: it is the scale of classifier-free guidance. Use {self.unguided_scale} for "
                "none, or a number above."
            )
        if negative_prompt is None:
            return
        if not self.has_classifier_free_guidance:
            raise ValueError(
                f"`negative_prompt` is {negative_prompt!r}, but the guidance of {self.pipeline_class} is an input of its "
                "transformer, which takes no negative prompt. Leave it `None`."
            )
        if self.negative_prompt(options) is None:
            raise ValueError(
                f"`negative_prompt` is {negative_prompt!r}, but `guidance_scale={options.guidance_scale}` means no "
                f"guidance. Raise it above {self.unguided_scale:g}, or leave `negative_prompt` `None`."
            )
        self._check_length("`negative_prompt`", negative_prompt)

    def _check_length(self, name: str, prompt: str) -> None:
        num_tokens = self.count_tokens(prompt)
        if num_tokens > self.max_sequence_length:
            short = prompt if len(prompt) <= 60 else f"{prompt[:57]}..."
            raise ValueError(
                f"{name}, {short!r}, has {num_tokens} tokens; the text encoder takes "
                f"`max_sequence_length={self.max_sequence_length}`. Shorten it, or raise `max_sequence_length` (at most "
                f"{self.max_prompt_tokens})."
            )

    def _set_timesteps(self, options: SamplingOptions, **kwargs: Any) -> torch.Tensor:
        """Returns the scheduler's sigmas. `kwargs` are the pipeline's arguments: a number of steps, or sigmas to shift."""
        self.check_num_inference_steps(options.num_inference_steps)
        scheduler = self.pipeline.scheduler
        shift = calculate_shift(
            (options.height // self.size_multiple) * (options.width // self.size_multiple),
            scheduler.config.base_image_seq_len,
            scheduler.config.max_image_seq_len,
            scheduler.config.base_shift,
            scheduler.config.max_shift,
        )  # without dynamic shifting, the scheduler uses its own
        scheduler.set_timesteps(mu=shift, **kwargs)
        return scheduler.sigmas  # (num_inference_steps + 1,)


def to_sequence(image: torch.Tensor) -> torch.Tensor:
    """
    Flattens the VAE's latents, `(n, num_channels, rows, columns)`, to a sequence, `(n, rows * columns, num_channels)`,
    for families whose transformer makes its own tokens.
    """
    return image.flatten(2).transpose(1, 2).contiguous()


def to_image(latents: torch.Tensor, options: SamplingOptions, vae_scale_factor: int) -> torch.Tensor:
    """The inverse of [`to_sequence`]. `vae_scale_factor` is the number of pixels per position along a side."""
    rows, columns = options.height // vae_scale_factor, options.width // vae_scale_factor
    # Contiguous: with another memory layout, convolutions round differently from the pipeline's.
    return latents.transpose(1, 2).unflatten(2, (rows, columns)).contiguous()


@contextmanager
def no_warnings_about_clip(pipeline: Any) -> Iterator[None]:
    """
    Suppresses the warnings of diffusers and transformers that CLIP sees only the first 77 tokens of a prompt. It is not
    meant to see more: T5 reads the whole prompt.
    """
    loggers = [logging.getLogger(name) for name in (type(pipeline).__module__, "transformers.tokenization_utils_base")]

    def is_about_something_else(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        return "CLIP can only handle" not in message and not message.startswith("Token indices sequence length")

    for logger in loggers:
        logger.addFilter(is_about_something_else)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_about_something_else)


def move_embeds(embeds: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Moves prompt embeddings to a device; masks stay on the CPU, where reading them does not wait for the device."""
    return {name: tensor if name.endswith("mask") else tensor.to(device) for name, tensor in embeds.items()}


def negative_embeds(embeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Picks the embeddings of the negative prompt, under the names of a prompt's own."""
    negative = {
        name.removeprefix(NEGATIVE_PREFIX): rows for name, rows in embeds.items() if name.startswith(NEGATIVE_PREFIX)
    }
    if not negative:
        raise ValueError(
            "Classifier-free guidance needs embeddings of the negative prompt, but there are only "
            f"{', '.join(map(repr, embeds))}. `PromptCache(policy, device, negative_prompt=...)` gives both; "
            "`guidance_scale=1.0` needs none."
        )
    return negative
