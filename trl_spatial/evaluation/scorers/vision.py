"""Scorers that ask a vision-language model, local or on a server."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from ...endpoints import BadAnswer, ServerError
from ...judges.loading import ModelSettings
from ...judges.vision import VisionModel, load_vision
from .base import Comparison, PairScorer, PairwiseScorer, Score, in_batches


# a tiny Qwen2.5-VL, trained only on the flat world
BUNDLED_MODEL = Path(__file__).parents[2] / "tiny_models" / "qwen2_5_vl"
_MAX_TOKENS = 1024


class VisionScorer(PairScorer):
    """
    Scores with a vision-language model.

    Args:
        vision ([`~judges.vision.VisionModel`]):
            The model.
    """

    hint: ClassVar[str] = (
        "Write it after a colon: a folder, ORG/NAME or ORG/NAME@REVISION on the Hub, hub/NAME, or http://HOST:PORT/v1#MODEL"
    )

    def __init__(self, vision: VisionModel):
        self.vision = vision

    @classmethod
    def make(cls, reference: str, settings: ModelSettings) -> "VisionScorer":
        """See [`PairScorer`]."""
        return cls(load_vision(reference, settings))

    def ask(self, prompt: str, image: Image.Image) -> Score:
        """Scores one image."""
        raise NotImplementedError

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[Score]:
        """
        See [`PairScorer`]. Where a server does not answer, there is no score.

        Raises:
            [`~endpoints.BudgetReached`], [`~endpoints.ServerError`]: If the limit is reached, or every other call would fail too.
        """
        scores: dict[int, Score] = {}
        rows = [(texts[0], pictures[0]) for texts, pictures in in_batches(prompts, images, 1)]
        for number, result in self.vision.map(lambda row: self.ask(*row), rows):
            scores[number] = _score_of(result) if isinstance(result, Exception) else result
        return [scores[number] for number in range(len(rows))]


class PairwiseVisionScorer(PairwiseScorer):
    """
    Compares with a vision-language model, which sees both images, then a question.

    Args:
        vision ([`~judges.vision.VisionModel`]):
            The model.
    """

    hint: ClassVar[str] = VisionScorer.hint

    def __init__(self, vision: VisionModel):
        self.vision = vision

    @classmethod
    def make(cls, reference: str, settings: ModelSettings) -> "PairwiseVisionScorer":
        """See [`PairScorer`]."""
        return cls(load_vision(reference, settings))

    def question(self, prompt: str) -> str:
        """Returns the question about both images."""
        raise NotImplementedError

    def read(self, reply: str) -> Any:
        """Reads which image a reply prefers: `"first"`, `"second"`, `"tie"`, or `None` if it cannot be read."""
        raise NotImplementedError

    def compare(self, prompt: str, first: Image.Image, second: Image.Image) -> Comparison:
        """
        See [`PairwiseScorer`].

        Raises:
            [`~endpoints.BudgetReached`], [`~endpoints.ServerError`]: If the limit is reached, or every other call would fail too.
        """
        try:
            answer = self.vision.answer(
                [first, second], self.question(prompt), max_tokens=_MAX_TOKENS, temperature=0.0
            )
        except BadAnswer as error:
            return Comparison(None, error.raw, error.cost, error.served_model)
        except ServerError as error:
            if error.is_final:
                raise
            return Comparison(None, str(error))
        return Comparison(self.read(answer.text), answer.text, answer.cost, answer.served_model)


def ask_for_score(
    vision: VisionModel, image: Image.Image, question: str, read: Callable[[str], float | None]
) -> Score:
    """Asks about an image, and reads the score in the reply, which is `None` if there is none."""
    answer = vision.answer(image, question, max_tokens=_MAX_TOKENS, temperature=0.0)
    return Score(read(answer.text), raw=answer.text, cost=answer.cost, served_model=answer.served_model)


def _score_of(failure: Exception) -> Score:
    if isinstance(failure, BadAnswer):
        return Score(None, raw=failure.raw, cost=failure.cost, served_model=failure.served_model)
    if isinstance(failure, ServerError) and not failure.is_final:
        return Score(None, raw=str(failure))
    raise failure
