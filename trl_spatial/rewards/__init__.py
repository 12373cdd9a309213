"""Reward functions of GRPO training: what an image is worth for its prompt. A [`SpatialScore`] is one itself."""

from ..judges.checked_detector import SilentDetectorError
from ..judges.geneval import Detection, GenEvalResult, Specification, judge, read_specification, relative_positions
from .geneval_reward import GenEvalReward
from .loading import load_reward
from .remote import RemoteReward
from .rules import SceneRules


__all__ = [
    "Detection",
    "GenEvalResult",
    "GenEvalReward",
    "RemoteReward",
    "SceneRules",
    "SilentDetectorError",
    "Specification",
    "judge",
    "load_reward",
    "read_specification",
    "relative_positions",
]
