"""The SpatialScore reward model: processor, model, loss, trainer, scorer. Names are imported when they are used."""

from importlib import import_module
from typing import Any


_MODULES = {
    "config": ["GaussianRewardConfig"],
    "data": ["DataCollatorForSpatialPreference", "prepare_pairs"],
    "losses": ["gaussian_bradley_terry_loss", "preference_probability"],
    "modeling": [
        "GaussianRewardModel",
        "GaussianRewardModelConfig",
        "GaussianRewardOutput",
        "spatial_score_lora_config",
    ],
    "processing": ["SpatialScoreProcessor", "load_processor"],
    "scoring": ["SpatialScore", "SpatialScores"],
    "trainer": ["GaussianRewardTrainer"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
