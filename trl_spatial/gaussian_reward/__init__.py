"""SpatialScore: a reward model that reads a prompt and an image and says how well the image matches the prompt's relations.

The backbone is an image-text model, such as Qwen2.5-VL, without its language model head. The instruction ends with a reward
token; a small head turns the last hidden state at that token into two numbers, the mean and the log standard deviation of a
Gaussian score. The loss is a Bradley-Terry loss on such scores, for pairs of a chosen and a rejected image
(https://huggingface.co/papers/2602.24233).

- [`GaussianRewardTrainer`] trains it, with LoRA, QLoRA or in full. It is a [`~trl.RewardTrainer`].
- [`SpatialScore`] loads a trained model from a folder or the Hub and scores images. It is also a reward function for GRPO.

Scores compare images of one prompt, and the mean ranks them. The standard deviation is learned from the training pairs; it
says nothing about images unlike them. Names are imported when they are first used.
"""

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
