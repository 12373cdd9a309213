"""Spatial reward models and spatial reinforcement learning for text-to-image models, on top of TRL.

Importing this package imports neither torch nor transformers: public names are loaded on first use.
"""

import importlib
from typing import Any


__version__ = "0.1.0.dev0"

# public name: module that defines it
_PUBLIC_NAMES = {
    "DiffusionDPOConfig": "diffusion_grpo.dpo.config",
    "DiffusionDPOTrainer": "diffusion_grpo.dpo.trainer",
    "DiffusionGRPOConfig": "diffusion_grpo.config",
    "DiffusionGRPOTrainer": "diffusion_grpo.trainer",
    "DiffusionNFTConfig": "diffusion_grpo.nft.config",
    "DiffusionNFTTrainer": "diffusion_grpo.nft.trainer",
    "GaussianRewardConfig": "gaussian_reward.config",
    "GaussianRewardTrainer": "gaussian_reward.trainer",
    "SpatialScore": "gaussian_reward.scoring",
}

__all__ = ["__version__", *_PUBLIC_NAMES]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC_NAMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
