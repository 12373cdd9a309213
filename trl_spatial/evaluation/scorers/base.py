"""The interface of a scorer: rates how well an image shows its prompt, or picks the better of two images."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from PIL import Image

from ...judges.loading import ModelSettings


Preference = Literal["first", "second", "tie"]


@dataclass(frozen=True)
class Score:
    """
    A scorer's rating of an image.

    Args:
        mean (`float`, *optional*):
            The score; higher is better. `None` if the scorer abstains or its answer cannot be read: `raw` says why.
        std (`float`, *optional*):
            Standard deviation, of scorers that have one.
        raw (`str`, *optional*):
            The answer in words, or the reason why there is no score.
        cost (`float`, *optional*, defaults to `0.0`):
            Price in US dollars.
        served_model (`str`, *optional*):
            The model that answered, as a server names it.
    """

    mean: float | None
    std: float | None = None
    raw: str | None = None
    cost: float = 0.0
    served_model: str | None = None


@dataclass(frozen=True)
class Comparison:
    """
    A scorer's comparison of two images.

    Args:
        preferred (`str`, *optional*):
            `"first"`, `"second"` or `"tie"`; `None` if the answer cannot be read.
        raw (`str`):
            The answer in words.
        cost (`float`, *optional*, defaults to `0.0`):
            Price in US dollars.
        served_model (`str`, *optional*):
            The model that answered, as a server names it.
    """

    preferred: Preference | None
    raw: str
    cost: float = 0.0
    served_model: str | None = None


class PairScorer(ABC):
    """
    Scores images by themselves. The better image of a pair is the one with the higher score.

    Attributes:
        name (`str`):
            Its name on the command line, before the colon.
        trained_on (`str`):
            The data and benchmark it was trained on, in one line.
        default (`str`, *optional*):
            The model, if none is named. `""` if it has none; `None` if one must be named.
        hint (`str`):
            How to name one, for the error.
        is_pairwise (`bool`):
            Whether it compares two images in place of scoring each.
    """

    name: ClassVar[str]
    trained_on: ClassVar[str]
    default: ClassVar[str | None] = None
    hint: ClassVar[str] = "Write it after a colon: a folder, ORG/NAME or ORG/NAME@REVISION on the Hub, or hub/NAME"
    is_pairwise: ClassVar[bool] = False

    @classmethod
    def make(cls, reference: str, settings: ModelSettings) -> "PairScorer":
        """
        Makes a scorer for the command line.

        Args:
            reference (`str`):
                The part of the name after the colon, or `default`.
            settings ([`~judges.loading.ModelSettings`]):
                Settings of its model.
        """
        if cls.default == "":  # the scorer needs no model
            return cls()
        return cls(reference, device=settings.device)  # type: ignore[call-arg]

    @abstractmethod
    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[Score]:
        """Scores each of several RGB images for its prompt."""


class PairwiseScorer(PairScorer):
    """Compares two images of a prompt. As its answer may depend on their order, callers ask in both."""

    is_pairwise = True

    @abstractmethod
    def compare(self, prompt: str, first: Image.Image, second: Image.Image) -> Comparison:
        """Says which of two RGB images shows the prompt better. It may be called by several threads at once."""

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[Score]:
        """Raises a `TypeError`: it has no score of one image."""
        raise TypeError(f"{self.name} compares two images and cannot score a single one: call `compare`.")


def in_batches(
    prompts: Sequence[str], images: Sequence[Image.Image], size: int
) -> Iterator[tuple[list[str], list[Image.Image]]]:
    """Splits rows of prompts and images, in their order."""
    if len(prompts) != len(images):
        raise ValueError(f"Got {len(prompts)} prompts and {len(images)} images. Give a prompt for each image.")
    for start in range(0, len(prompts), size):
        yield list(prompts[start : start + size]), list(images[start : start + size])
