"""Scorers without a preference model: rules on pixels or on detected boxes, and a control that knows nothing."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from ...judges.geneval import COUNTING_THRESHOLD, THRESHOLD, Requirement, Specification, geneval_name, judge
from ...judges.loading import load_detector
from ...rewards.rules import SceneRules
from .base import PairScorer, Score


_RELATION = re.compile(
    r"(?:a photo of )?(?:an?|the) (?P<subject>[\w -]+?)(?: is)?(?: directly)?(?: to the)? (?P<relation>left of|right of|above|below) "
    r"(?:an?|the) (?P<target>[\w -]+?)\.?",
    re.IGNORECASE,
)


class Rules(PairScorer):
    """The share of a scene's relations that the pixels show, by the rules of the flat world; abstains on other prompts."""

    name = "rules"
    trained_on = "nothing: it reads the pixels of the flat world, whose pairs it decides by construction"
    default = ""

    def __init__(self) -> None:
        self._rules = SceneRules()

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[Score]:
        """See [`PairScorer`]."""
        return [
            Score(None, raw="the prompt describes no scene of the flat world") if share is None else Score(share)
            for share in self._rules(list(prompts), list(images))
        ]


class Pixels(PairScorer):
    """The mean brightness of an image: a control. Pairs that it orders better than a coin give their answer away."""

    name = "pixels"
    trained_on = "nothing: a control that does not read the prompt"
    default = ""

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[Score]:
        """See [`PairScorer`]."""
        return [Score(float(np.asarray(image.convert("L"), np.float64).mean()) / 255) for image in images]


class GenEvalRule(PairScorer):
    """
    GenEval's rule on detected boxes: 1 if both things are found and in the relation of the prompt, else the share of
    this that is met. It abstains if the prompt is not of the form "a A left of a B" (right of, above, below), or names
    a class that the detector does not know.

    Args:
        reference (`str`):
            The detector, as [`~judges.loading.load_detector`] takes it.
        device (`str` or `torch.device`, *optional*):
            Where it runs. If `None`, the accelerator if there is one.
    """

    name = "geneval"
    trained_on = "object detection, as the detector's card says; its rule is GenEval's scorer"

    def __init__(self, reference: str, *, device: Any = None):
        self._detector = load_detector(reference, device, threshold=THRESHOLD)

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[Score]:
        """See [`PairScorer`]."""
        specifications = [read_relation(prompt) for prompt in prompts]
        rows = [row for row, specification in enumerate(specifications) if specification is not None]
        classes = [specification.class_names for specification in specifications if specification is not None]
        found = dict(zip(rows, self._detector([images[row] for row in rows], classes), strict=True))
        labels = getattr(self._detector, "labels", None)
        scores = []
        for row, specification in enumerate(specifications):
            if specification is None:
                scores.append(Score(None, raw="the prompt does not name two objects and their relation"))
            elif labels is not None and (unknown := sorted(set(specification.class_names) - set(labels))):
                scores.append(Score(None, raw=f"the detector does not know {', '.join(unknown)}"))
            else:
                result = judge(specification, found[row], threshold=THRESHOLD, counting_threshold=COUNTING_THRESHOLD)
                scores.append(Score(result.partial, raw=result.reason or None))
        return scores


def read_relation(prompt: str) -> Specification | None:
    """
    Reads GenEval's specification from a prompt about two things in a relation, such as "a photo of a dog left of a
    cat"; `None` for any other prompt.
    """
    match = _RELATION.fullmatch(prompt.strip())
    if match is None:
        return None
    target, subject = geneval_name(match["target"]), geneval_name(match["subject"])
    return Specification((Requirement(target, 1), Requirement(subject, 1, position=(match["relation"].lower(), 0))))
