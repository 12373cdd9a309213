"""Post-training of diffusion models: policies, rollout, losses, trainers. Names are imported when used."""

from importlib import import_module
from typing import Any


_MODULES = {
    "advantages": ["combine_rewards", "group_advantages", "select_top_k"],
    "config": ["DiffusionGRPOConfig"],
    "dpo.config": ["DiffusionDPOConfig"],
    "dpo.losses": ["DPOLossOutput", "diffusion_dpo_loss"],
    "dpo.trainer": ["DiffusionDPOTrainer"],
    "policies.lora": ["attention_lora_config"],
    "losses": [
        "PolicyLossOutput",
        "clipped_policy_loss",
        "gaussian_kl",
        "kl_mask",
        "normalized_log_ratio",
        "velocity_kl",
    ],
    "policies": ["DiffusionPolicy", "SamplingOptions", "make_policy"],
    "rollout": ["Rollout", "sample_rollout"],
    ".generation.seeds": ["image_generator"],
    "sde": ["DYNAMICS", "SDEStepOutput", "sde_step", "sde_window"],
    "trainer": ["DiffusionGRPOTrainer"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
