"""Short tests of judges before an evaluation: one that ignores the image makes a table that looks like any other."""

import re
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..endpoints import BadAnswer
from ..preferences.images import load_image
from ..scenes import Entity, Relation, SceneGraph, render_scene
from .checked_detector import SELF_TEST_IMAGE, CheckedDetector, SilentDetectorError
from .flat import SELF_TEST_SIZE, draw_pair
from .geneval import THRESHOLD
from .loading import ClassDetector
from .vision import VisionModel


SPELLINGS = ("Yes", " Yes", "yes", " yes", "No", " No", "no", " no")
# Objects of the two pictures, from left to right; no object is in both.
_PICTURES = (
    (Entity("red", "circle"), Entity("blue", "diamond")),
    (Entity("green", "diamond"), Entity("yellow", "circle")),
)
_YES_NO = " Left and right are as you see them. Answer with one word, Yes or No."
_CHOICE = " Left and right are as you see them.\nA. {}\nB. {}\nC. {}\nD. {}\nAnswer with the letter of the right answer alone."
_SHAPES = _CHOICE.format("a circle", "a square", "a triangle", "a diamond")
# Question → correct answers for the first and the second picture.
_QUESTIONS = {
    f"Is there a red circle in the picture?{_YES_NO}": ("yes", "no"),
    f"Is there a yellow circle in the picture?{_YES_NO}": ("no", "yes"),
    f"Is the circle to the left of the diamond?{_YES_NO}": ("yes", "no"),
    f"Is the diamond to the left of the circle?{_YES_NO}": ("no", "yes"),
    "Which of these is in the picture?"
    + _CHOICE.format("a red circle", "a pink square", "an orange triangle", "a yellow circle"): ("A", "D"),
    f"Which shape is on the left side of the picture?{_SHAPES}": ("A", "D"),
    f"Which shape is on the right side of the picture?{_SHAPES}": ("D", "A"),
}
_LETTERS = ("A", "D")  # the correct answers that are letters
_CONCLUSION = 100  # characters at the end of the last line in which to look for an answer
_ENOUGH = 0.75  # share of correct answers; below it there is a warning
_FEWEST = 4  # as many equal answers, and no other, show that the judge ignores the question
_LEAST_MOVE = 0.01  # change of the chance of "Yes" between a picture without a thing and one with it
_LEAST_MASS = 0.01  # chance of "Yes" plus that of "No"
# Regions of the photograph of a person, as shares of its sides: left, top, right, bottom.
_CHEST, _CORNER = (0.35, 0.7, 0.65, 1.0), (0.8, 0.0, 1.0, 0.25)


class JudgeError(ValueError):
    """A judge answers the same whatever it is shown, or in no readable form."""


@dataclass(frozen=True)
class _Reply:
    question: str
    right: str
    said: str | None  # "yes", "no", a letter, or `None` if unreadable
    raw: str

    @property
    def is_choice(self) -> bool:
        return self.right in _LETTERS


def check_vision(model: VisionModel, *, kinds: Collection[str] = ("text",)) -> None:
    """
    Asks a vision-language model about two drawn pictures; an answer that is correct for one is wrong for the other.
    Warns with the share of correct answers if it is below three quarters.

    Args:
        model ([`~judges.vision.VisionModel`]):
            The model.
        kinds (`Collection[str]`, *optional*, defaults to `("text",)`):
            What it will be asked for: `"text"`, which takes 14 calls, and `"probabilities"`, which takes 4.

    Raises:
        [`JudgeError`]: If fewer than half of its answers can be read, all yes/no answers are the same, all letters are, or the answers to
            every question are the same for both pictures; or if the chances of "Yes" and "No" are next to 0, or do not differ
            between the pictures.
        [`~endpoints.ServerError`], [`~endpoints.BudgetReached`]: If its server cannot be asked.
    """
    pictures = [draw_pair(*entities) for entities in _PICTURES]
    if "text" in kinds:
        replies = [
            _ask(model, picture, question, answers[number])
            for question, answers in _QUESTIONS.items()
            for number, picture in enumerate(pictures)
        ]
        _check_replies(model.name, replies)
    if "probabilities" in kinds:
        _check_chances(model, pictures)


def check_detector(
    detector: ClassDetector, *, threshold: float = THRESHOLD, counting_threshold: float | None = None
) -> None:
    """
    Tests a detector on a photograph of a person, or the flat world's on a drawing, as
    [`~judges.checked_detector.CheckedDetector`] does. Warns if it fails to count.

    Args:
        detector ([`~judges.loading.ClassDetector`]):
            The detector.
        threshold (`float`, *optional*, defaults to `0.3`), counting_threshold (`float`, *optional*):
            Scores above which a detection counts, and counts in prompts about numbers. By default the latter is the detector's
            own, or else `threshold`.

    Raises:
        [`JudgeError`]: If it does not find the object, or does not know its class.
        `TypeError`: If it does not return a list of [`~judges.geneval.Detection`] for each image.
    """
    if counting_threshold is None:
        counting_threshold = float(getattr(detector, "counting_threshold", threshold))
    try:
        CheckedDetector(detector, threshold=threshold, counting_threshold=counting_threshold)
    except (SilentDetectorError, ValueError) as error:
        raise JudgeError(f"{detector.name} fails the self-test of detectors. {error}") from error


def check_depth(depth: Callable[[Image.Image], np.ndarray], name: str = "The depth estimator") -> None:
    """
    Tests an estimator of depth on a photograph of a person and on a drawing in which a circle hides a part of a
    square. Warns if the person is farther than the corner behind them.

    Args:
        depth (`Callable`):
            The estimator, see [`~judges.loading.load_depth`].
        name (`str`, *optional*):
            Its name, for errors.

    Raises:
        [`JudgeError`]: If a map has another shape than its image, values that are not numbers from 0 to 255, or if
            both maps are constant.
    """
    photograph = load_image(SELF_TEST_IMAGE)
    front, behind = Entity("red", "circle"), Entity("blue", "square")
    drawing = render_scene(
        SceneGraph((front, behind), (Relation("front_of", (front, behind)),)), seed=0, image_size=SELF_TEST_SIZE
    )
    maps = []
    for image in (photograph, drawing):
        values = np.asarray(depth(image))
        if values.shape != (image.height, image.width) or not np.issubdtype(values.dtype, np.number):
            raise JudgeError(
                f"{name} returns an array of shape {values.shape} and type {values.dtype} for an image of {image.width}x"
                f"{image.height} pixels. It should return a number for each pixel, {(image.height, image.width)}."
            )
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 255):
            raise JudgeError(
                f"{name} returns values from {values.min()} to {values.max()}. They should be numbers from 0, far, to 255, "
                "near."
            )
        maps.append(values)
    if all(values.min() == values.max() for values in maps):
        raise JudgeError(
            f"{name} returns the same depth everywhere, for a photograph and for a drawing: with it nothing is in front of "
            "anything. Check its weights and its image processor."
        )
    chest, corner = (_mean_within(maps[0], part) for part in (_CHEST, _CORNER))
    if chest < corner:
        warnings.warn(
            f"{name} sees the person in the self-test's photograph ({chest:.0f} of 255) as farther away than the corner behind "
            f"({corner:.0f}). Near should be large: the values may be inverted, or it is a weak judge."
        )


def _mean_within(values: np.ndarray, part: tuple[float, float, float, float]) -> float:
    height, width = values.shape
    left, top, right, bottom = part
    return float(values[int(top * height) : int(bottom * height), int(left * width) : int(right * width)].mean())


def _ask(model: VisionModel, picture: Image.Image, question: str, right: str) -> _Reply:
    try:
        raw = model.answer(picture, question, temperature=0.0).text
    except BadAnswer as error:
        raw = error.raw
    return _Reply(question, right, _read(raw, right), raw)


def _read(raw: str, right: str) -> str | None:
    """
    Reads an answer of the same kind as `right`: the one that the reply begins with or, if it explains itself first,
    the only one at its end; `None` if there is neither.
    """
    word = re.compile(r"\b[A-D]\b(?!\s+[a-z])" if right in _LETTERS else r"\b(?i:yes|no)\b")  # not "A circle"
    if start := re.match(rf"\W*({word.pattern})", raw):
        return _spell(start[1])
    found = {_spell(each) for each in word.findall(raw.strip().rpartition("\n")[2][-_CONCLUSION:])}
    return found.pop() if len(found) == 1 else None


def _spell(word: str) -> str:
    return word if len(word) == 1 else word.lower()


def _check_replies(name: str, replies: list[_Reply]) -> None:
    readable = [reply for reply in replies if reply.said is not None]
    if len(readable) < len(replies) / 2:
        other = next(reply for reply in replies if reply.said is None)
        raise JudgeError(
            f"{name} fails the self-test: of its {len(replies)} answers about two pictures, {len(readable)} can be read. To "
            f"{other.question!r} it said {other.raw[:200]!r}. It may not be trained to follow instructions, or its chat template "
            "may belong to another model."
        )
    for is_choice in (False, True):
        said = {reply.said for reply in readable if reply.is_choice == is_choice}
        number = sum(reply.is_choice == is_choice for reply in readable)
        if len(said) == 1 and number >= _FEWEST:
            asked = "to choose among A to D" if is_choice else "for yes or no"
            raise JudgeError(
                f"{name} fails the self-test: asked {asked} {number} times, it always said {said.pop()}, although the correct "
                "answers differ. Every table would only measure that habit."
            )
    pairs = list(zip(replies[::2], replies[1::2], strict=True))
    if all(first.said == second.said for first, second in pairs):
        raise JudgeError(
            f"{name} fails the self-test: it gave the same answers about two different pictures, so it does not look at "
            "them. Check that it accepts images and that its server passes them on."
        )
    share = sum(reply.said == reply.right for reply in replies) / len(replies)
    if share < _ENOUGH:
        warnings.warn(
            f"{name} is a weak judge: it answers {share:.0%} of {len(replies)} easy questions about two drawn pictures correctly."
        )


def _check_chances(model: VisionModel, pictures: list[Image.Image]) -> None:
    """Checks that the chance of "Yes" depends on whether the thing is shown; warns if it is not higher then."""
    moves = []
    for question, (first, _) in list(_QUESTIONS.items())[:2]:
        chances = [_chance_of_yes(model, picture, question) for picture in pictures]
        moves.append(chances[0] - chances[1] if first == "yes" else chances[1] - chances[0])
    if max(map(abs, moves)) < _LEAST_MOVE:
        raise JudgeError(
            f"{model.name} fails the self-test: its chance of Yes changes by at most {max(map(abs, moves)):.4f} between a picture "
            "that shows a thing and one that does not, so it does not look at them."
        )
    if min(moves) <= 0:
        warnings.warn(
            f"{model.name} is a weak judge: its chance of Yes changes by {', '.join(f'{move:+.2f}' for move in moves)} from a "
            "picture without a thing to one with it."
        )


def _chance_of_yes(model: VisionModel, picture: Image.Image, question: str) -> float:
    data = model.probabilities(picture, question, SPELLINGS).data
    masses = {}
    for word in ("yes", "no"):
        spelled = [data["tokens"][spelling] for spelling in SPELLINGS if spelling.strip().lower() == word]
        tokens = {tokens[0] for tokens in spelled if len(tokens) == 1}
        masses[word] = sum(data["probabilities"].get(token, 0.0) for token in tokens)
    total = masses["yes"] + masses["no"]
    if total < _LEAST_MASS:
        raise JudgeError(
            f"{model.name} fails the self-test: asked for Yes or No, the chances of the two together are {total:.4f}. It "
            "may not be trained to follow instructions, or has no tokens for these words."
        )
    return masses["yes"] / total
