"""Images as jobs: what to draw, the result, and the interface of the painters that draw it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from io import BytesIO
from typing import Any

import torch
from PIL import Image


@dataclass(frozen=True)
class ImageJob:
    """
    An image to draw.

    Args:
        id (`str`):
            Names the image among all jobs.
        prompt (`str`):
            What to draw.
        seed (`int`):
            Seed of its noise, from 0 to 2⁶³ - 1. Jobs of one seed start from the same noise, whatever the prompt.

    Raises:
        `ValueError`: If the seed is out of range.
    """

    id: str
    prompt: str
    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"The seed of the image {self.id!r} is {self.seed}. Use one from 0 to 2**63 - 1.")


@dataclass(frozen=True)
class DrawnImage:
    """
    The result of a job.

    Args:
        id (`str`):
            The job's id.
        png (`bytes`, *optional*):
            The image, an RGB file in PNG format; `None` if it was refused.
        refusal (`str`, *optional*):
            Why there is no image: a server objected, the image was marked as not safe for work, or no arrangement satisfies
            the scene. It should be recorded and not retried.
        recipe (`dict`):
            Everything that the image depends on besides its prompt, as JSON: model and commit, settings, seed and the device of
            the noise, scheduler, dtype, size, versions of libraries.
        seconds (`float`):
            How long it took.
        cost (`float`):
            Price of the call in US dollars; 0 for images drawn here.
    """

    id: str
    png: bytes | None
    refusal: str | None
    recipe: dict[str, Any]
    seconds: float
    cost: float


class DrawingError(RuntimeError):
    """An image could not be drawn. The message names the job and the generator."""


class Painter(ABC):
    """
    Draws the images of jobs. An image depends on its job and on the painter's settings, not on the other jobs.

    Attributes:
        name (`str`):
            Name of the generator in errors.
        batch_size (`int`):
            Best number of jobs to give at once: as many as are drawn together, or as take a moment.
        uses_gpu (`bool`):
            Whether it needs its own GPU, if there is one.
    """

    name: str
    batch_size: int
    uses_gpu: bool = False

    @abstractmethod
    def stream(self, jobs: Iterable[ImageJob]) -> Iterator[DrawnImage]:
        """
        Draws images and yields each as soon as it is ready, in any order.

        Raises:
            [`DrawingError`]: If an image could not be drawn.
        """

    def draw(self, jobs: Sequence[ImageJob]) -> list[DrawnImage]:
        """
        Draws images.

        Returns:
            `list[DrawnImage]`: As many as jobs, in any order.

        Raises:
            [`DrawingError`]: If an image could not be drawn.
        """
        return list(self.stream(jobs))

    def error(self, jobs: Sequence[ImageJob], cause: Exception) -> DrawingError:
        """Makes the error to raise when the image of a job, or one of several drawn together, has failed."""
        names = ", ".join(job.id for job in jobs)
        return DrawingError(f"{self.name} could not draw the image {names}: {type(cause).__name__}: {cause}")


def describe_noise(job: ImageJob, noise: torch.Generator) -> dict[str, Any]:
    """
    Describes the noise of an image for its recipe. `torch.Generator().manual_seed(torch_seed)` makes it without this package.

    Args:
        job ([`ImageJob`]):
            The image.
        noise (`torch.Generator`):
            Its generator, from [`~generation.seeds.image_generator`].
    """
    return {"seed": job.seed, "torch_seed": noise.initial_seed(), "generator_device": noise.device.type}


@cache
def _version(name: str) -> str:
    return version(name)


def versions(*names: str) -> dict[str, str]:
    """Versions of installed packages, by name."""
    return {name: _version(name) for name in names}


def encode_png(image: Image.Image) -> bytes:
    """Encodes an image as an RGB file in PNG format."""
    buffer = BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()
