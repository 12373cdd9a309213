"""A user's function as a scorer."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from ...hub.functions import errors_of
from ...rewards.loading import load_reward
from .base import PairScorer, Score


class FunctionScorer(PairScorer):
    """
    Scores with a function `(prompts, images) -> list[float | None]`.

    Args:
        reference (`str`):
            `module:function`, of a module that Python finds, the current folder included.

    Raises:
        `ValueError`: If there is no such function.
    """

    name = "function"
    trained_on = "unknown: your own function"

    def __init__(self, reference: str, *, device: Any = None):
        self.reference = reference
        self._function = errors_of(f"The scorer {reference} raised this error.")(load_reward(reference, device=device))

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[Score]:
        """
        See [`PairScorer`].

        Raises:
            `ValueError`: If the function does not return a number or `None` for each image.
        """
        values = list(self._function(list(prompts), list(images)))
        if len(values) != len(images):
            raise ValueError(f"{self.reference} returned {len(values)} scores for {len(images)} images.")
        return [
            Score(None, raw="the function returned None") if value is None else Score(float(value)) for value in values
        ]
