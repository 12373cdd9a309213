"""Who draws an image: a diffusers pipeline, the renderer of scenes, or any other callable of this form."""

from typing import Any, Protocol

import torch
from PIL import Image

from ..scenes import parse_description, render_scene


class ImageGenerator(Protocol):
    """Draws one image per prompt. Each image takes its random numbers from its own generator, and from nothing else."""

    def __call__(self, prompts: list[str], generators: list[torch.Generator]) -> list[Image.Image]:
        """
        Draws images.

        Args:
            prompts (`list[str]` of length `n`):
                The prompts.
            generators (`list[torch.Generator]` of length `n`):
                On the CPU, one per image, such as [`~generation.seeds.image_generator`] makes.

        Returns:
            `list[Image.Image]` of length `n`: RGB images.
        """
        ...


class PipelineGenerator:
    """
    Draws with a text-to-image pipeline of diffusers.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline. It is used as it is: device, precision, adapters and progress bar are the caller's.
        **settings:
            Other arguments of the pipeline's call, such as `height`, `num_inference_steps` and `guidance_scale`.
    """

    def __init__(self, pipeline: Any, **settings: Any):
        self.pipeline = pipeline
        self.settings = settings

    def __call__(self, prompts: list[str], generators: list[torch.Generator]) -> list[Image.Image]:
        return self.pipeline(prompts, generator=generators, **self.settings).images


class SceneGenerator:
    """
    Draws scenes of coloured shapes exactly as their descriptions say: a generator that makes no mistakes.

    Args:
        image_size (`int`, *optional*, defaults to `64`):
            Width and height in pixels.

    Raises:
        `ValueError`: When called, if a prompt does not describe a scene in the words of [`~scenes.describe_scene`].
        [`~scenes.LayoutError`]: When called, if no arrangement satisfies a scene.
    """

    def __init__(self, image_size: int = 64):
        self.image_size = image_size

    def __call__(self, prompts: list[str], generators: list[torch.Generator]) -> list[Image.Image]:
        return [
            render_scene(
                parse_description(prompt),
                seed=int(torch.randint(2**63 - 1, (), generator=generator)),
                image_size=self.image_size,
            )
            for prompt, generator in zip(prompts, generators, strict=True)
        ]
