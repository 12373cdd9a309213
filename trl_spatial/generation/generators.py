"""Image generators: a diffusers pipeline, the renderers of scenes, or any other callable of this form."""

from typing import Any, Protocol

import torch
from PIL import Image

from ..scenes import parse_description, render_scene
from ..scenes.tabletop import MIN_IMAGE_SIZE, Rendering, parse_tabletop, render_tabletop, scene_of


class ImageGenerator(Protocol):
    """Draws one image per prompt. Each image takes its random numbers from its own generator, and from nothing else."""

    def __call__(self, prompts: list[str], generators: list[torch.Generator]) -> list[Image.Image]:
        """
        Draws an RGB image for each prompt. The generators are on the CPU, such as those from
        [`~generation.seeds.image_generator`].
        """
        ...


class PipelineGenerator:
    """
    Draws with a text-to-image pipeline of diffusers as it is: device, precision, adapters and progress bar are up to the
    caller. `settings` are further arguments of its call, such as `height`, `num_inference_steps` and `guidance_scale`.
    """

    def __init__(self, pipeline: Any, **settings: Any):
        self.pipeline = pipeline
        self.settings = settings

    def __call__(self, prompts: list[str], generators: list[torch.Generator]) -> list[Image.Image]:
        return self.pipeline(prompts, generator=generators, **self.settings).images


class SceneGenerator:
    """
    Draws scenes of colored shapes exactly as their descriptions say, on `image_size` by `image_size` pixels: a
    generator that makes no mistakes. Raises `ValueError` if a prompt does not describe a scene in the words of
    [`~scenes.describe_scene`], and [`~scenes.LayoutError`] if no arrangement satisfies it.
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


class TabletopGenerator:
    """
    Draws things on a table exactly as their descriptions say: a generator that makes no mistakes.

    Args:
        image_size (`int`, *optional*, defaults to `128`):
            Width and height in pixels.

    Raises:
        `ValueError`: When called, if a prompt does not describe a scene in the words of
        [`~scenes.tabletop.describe_tabletop`].
        [`~scenes.LayoutError`]: When called, if no arrangement satisfies a scene.
    """

    def __init__(self, image_size: int = 128):
        if image_size < MIN_IMAGE_SIZE:
            raise ValueError(f"image_size is {image_size}. It should be at least {MIN_IMAGE_SIZE}.")
        self.image_size = image_size

    def __call__(self, prompts: list[str], generators: list[torch.Generator]) -> list[Image.Image]:
        return [self.render(prompt, generator).image for prompt, generator in zip(prompts, generators, strict=True)]

    def render(self, prompt: str, generator: torch.Generator) -> Rendering:
        """Draws one image, and returns it with what is where in it."""
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
        return render_tabletop(parse_tabletop(prompt), seed=seed, scene=scene_of(prompt), image_size=self.image_size)
