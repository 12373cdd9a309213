"""Reward functions for GRPO training; a [`SpatialScore`] is one, too. Names are imported when first used."""

from importlib import import_module
from typing import Any


TOKEN_VARIABLE = "TRL_SPATIAL_SERVER_TOKEN"  # environment variable: the token of a reward server
_MODULES = {
    ".judges.checked_detector": ["SilentDetectorError"],
    ".judges.geneval": [
        "Detection",
        "GenEvalResult",
        "Specification",
        "judge",
        "read_specification",
        "relative_positions",
    ],
    "geneval_reward": ["GenEvalReward"],
    "loading": ["load_reward"],
    "remote": ["RemoteReward"],
    "rules": ["SceneRules"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
