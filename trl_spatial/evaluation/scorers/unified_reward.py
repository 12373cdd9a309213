"""UnifiedReward-2.0: a vision-language model trained to rate images in words."""

import math
import re

from PIL import Image

from .base import Preference, Score
from .vision import PairwiseVisionScorer, VisionScorer, ask_for_score


# The exact text that the model was trained on, from CodeGoat24/UnifiedReward,
# inference_qwen/UnifiedReward-2.0-inference (models: MIT). A different text would be a different scorer.
_PAIRWISE = """\
You are presented with two generated images (Image 1 and Image 2) along with a shared text caption. Your task is to comparatively \
evaluate the two images across three specific dimensions:

- Alignment Score: How well each image matches the caption in terms of content.
- Coherence Score: How logically consistent and visually coherent each image is (absence of visual glitches, distorted objects, etc.).
- Style Score: How aesthetically appealing each image is, regardless of caption accuracy.

For each dimension, you must assign a relative score to Image 1 and Image 2, such that:
- Each score is a float between 0 and 1 (inclusive).
- The scores for Image 1 and Image 2 must sum to exactly 1.0 for each dimension.
- The higher the score, the better that image is in the corresponding dimension *relative to the other*.

This format emphasizes comparative quality rather than absolute evaluation.

Please provide your evaluation in the format below:

Alignment Score:
 Image 1: X
 Image 2: Y

Coherence Score:
 Image 1: X
 Image 2: Y

Style Score:
 Image 1: X
 Image 2: Y

Your task is provided as follows:
Text Caption: [{prompt}]"""
_POINTWISE = """\
You are presented with a generated image and its associated text caption. Your task is to analyze the image across multiple \
dimensions in relation to the caption. Specifically:
Provide overall assessments for the image along the following axes (each rated from 1 to 5):
- Alignment Score: How well the image matches the caption in terms of content.
- Coherence Score: How logically consistent the image is (absence of visual glitches, object distortions, etc.).
- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy.

Output your evaluation using the format below:

Alignment Score (1-5): X
Coherence Score (1-5): Y
Style Score (1-5): Z

Your task is provided as follows:
Text Caption: [{prompt}]"""
_AXES = ("Alignment", "Coherence", "Style")
_NUMBER = r"(\d+(?:\.\d+)?)(?![\d.]*\d)"
_TRAINED_ON = (
    "preferences and ratings of generated images and videos, among them HPD, EvalMuse and OIP; it is also a common reward of image "
    "models"
)
_DEFAULT = "CodeGoat24/UnifiedReward-2.0-qwen-7b"


class UnifiedReward(PairwiseVisionScorer):
    """
    UnifiedReward-2.0 ([papers/2503.05236](https://huggingface.co/papers/2503.05236)) on two images. It divides a point between them
    for alignment, coherence and style each; the one with more of the three is better. See [`PairwiseVisionScorer`] for the
    arguments.
    """

    name = "unified-reward"
    trained_on = _TRAINED_ON
    default = _DEFAULT

    def question(self, prompt: str) -> str:
        """See [`PairwiseVisionScorer`]."""
        return _PAIRWISE.replace("{prompt}", prompt)

    def read(self, reply: str) -> Preference | None:
        """See [`PairwiseVisionScorer`]."""
        shares = read_shares(reply)
        if shares is None:
            return None
        first, second = (math.fsum(share[side] for share in shares.values()) for side in (0, 1))
        return "tie" if math.isclose(first, second, abs_tol=1e-6) else "first" if first > second else "second"


class UnifiedRewardPointwise(VisionScorer):
    """
    UnifiedReward-2.0 on one image: the mean of its ratings of alignment, coherence and style, from 1 to 5. See [`VisionScorer`] for
    the arguments.
    """

    name = "unified-reward-pointwise"
    trained_on = _TRAINED_ON
    default = _DEFAULT

    def ask(self, prompt: str, image: Image.Image) -> Score:
        """See [`VisionScorer`]."""
        return ask_for_score(self.vision, image, _POINTWISE.replace("{prompt}", prompt), read_mean_rating)


def read_shares(reply: str) -> dict[str, tuple[float, float]] | None:
    """
    Returns axis → shares of the point of image 1 and image 2; `None` unless all six numbers are present, from 0 to 1.
    """
    shares = {}
    for axis in _AXES:
        found = re.search(rf"{axis} Score:\s*Image 1:\s*{_NUMBER}\s*Image 2:\s*{_NUMBER}", reply)
        if found is None:
            return None
        shares[axis] = (float(found[1]), float(found[2]))
    return shares if all(0 <= value <= 1 for share in shares.values() for value in share) else None


def read_ratings(reply: str) -> dict[str, float] | None:
    """Returns axis → rating; `None` unless all three are present, from 1 to 5."""
    ratings = {}
    for axis in _AXES:
        found = re.search(rf"{axis} Score \(1-5\):\s*{_NUMBER}", reply)
        if found is None:
            return None
        ratings[axis] = float(found[1])
    return ratings if all(1 <= rating <= 5 for rating in ratings.values()) else None


def read_mean_rating(reply: str) -> float | None:
    """The mean of [`read_ratings`]."""
    ratings = read_ratings(reply)
    return None if ratings is None else math.fsum(ratings.values()) / len(ratings)
