"""Vision-language models as judges of pairs, asked about both images at once or about each separately."""

import re

from PIL import Image

from .base import Preference, Score
from .vision import PairwiseVisionScorer, VisionScorer, ask_for_score


_PAIRWISE = """\
These are two images, image 1 and image 2, that were made from the same text. Which of them shows better what the text says? Look \
at the things in it, at their number, colors and attributes, and above all at where each thing is in relation to the others. Left \
and right are the viewer's; in front means nearer to the viewer. Beauty and style do not count.

Text: {prompt}

Compare the images in a few sentences. Then write a last line of this form, with 1, 2, or tie if both show it equally well:
Verdict: 1"""
_POINTWISE = """\
How well does this image show what the text says? Look at the things in it, at their number, colors and attributes, and above all \
at where each thing is in relation to the others. Left and right are the viewer's; in front means nearer to the viewer. Beauty and \
style do not count.

Text: {prompt}

Say in a few sentences what is right and what is wrong. Then write a last line of this form, with a number from 0, nothing is \
right, to 10, everything is:
Score: 5"""
_VERDICTS: dict[str, Preference] = {"1": "first", "2": "second", "tie": "tie"}
_VERDICT = re.compile(r"verdict[\s*_]*:[\s*_]*(?:image\s*)?(1|2|tie)\b", re.IGNORECASE)
_SCORE = re.compile(r"score[\s*_]*:[\s*_]*(-?\d+(?:\.\d+)?)(?:\s*/\s*10)?(?![\d.]*\d|\s*/)", re.IGNORECASE)


class PairwiseJudge(PairwiseVisionScorer):
    """
    Asks which of two images shows the prompt better. What it cannot read has no preference. See [`PairwiseVisionScorer`] for the
    arguments.
    """

    name = "judge-pairwise"
    trained_on = "images and instructions, as the model's card says"

    def question(self, prompt: str) -> str:
        """See [`PairwiseVisionScorer`]."""
        return _PAIRWISE.format(prompt=prompt)

    def read(self, reply: str) -> Preference | None:
        """See [`PairwiseVisionScorer`]; the last line of the form counts."""
        found = _VERDICT.findall(reply)
        return _VERDICTS[found[-1].lower()] if found else None


class PointwiseJudge(VisionScorer):
    """
    Asks how well an image shows its prompt, from 0 to 10. What it cannot read has no score. See [`VisionScorer`] for the
    arguments.
    """

    name = "judge-pointwise"
    trained_on = PairwiseJudge.trained_on

    def ask(self, prompt: str, image: Image.Image) -> Score:
        """See [`VisionScorer`]."""
        return ask_for_score(self.vision, image, _POINTWISE.format(prompt=prompt), read_score)


def read_score(reply: str) -> float | None:
    """The score in the last line of the form `Score: 7`; `None` if there is none from 0 to 10."""
    found = _SCORE.findall(reply)
    return float(found[-1]) if found and 0 <= float(found[-1]) <= 10 else None
