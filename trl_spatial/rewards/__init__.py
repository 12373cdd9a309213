"""Reward functions of GRPO training: what an image is worth for its prompt. A [`SpatialScore`] is one as it stands."""

from .loading import load_reward
from .remote import RemoteReward
from .rules import SceneRules


__all__ = ["RemoteReward", "SceneRules", "load_reward"]
