"""SpatialScore as a scorer of pairs."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from ...gaussian_reward.scoring import SpatialScore
from .base import PairScorer, Score


class SpatialScorer(PairScorer):
    """
    Mean and standard deviation of a [`SpatialScore`].

    Args:
        reference (`str`):
            Its checkpoint.
        device (`str` or `torch.device`, *optional*):
            Where it runs. If `None`, the accelerator if there is one.
    """

    name = "spatialscore"
    trained_on = "pairs of a scene and a perturbed one, as its model card says: the pairs of this project's benchmark are like them"

    def __init__(self, reference: str, *, device: Any = None):
        self._scorer = SpatialScore.from_pretrained(reference, device=device)

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[Score]:
        """See [`PairScorer`]."""
        mean, std = self._scorer.score(list(prompts), list(images), batch_size=len(images), show_progress=False)
        return [Score(float(m), float(s)) for m, s in zip(mean, std, strict=True)]
