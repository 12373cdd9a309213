"""
Post-training of diffusion models: policies, rollout, losses, trainers. Names are imported when used.

What the trainers log, over all processes:

- `reward`, `reward_std`, `frac_reward_zero_std`, `rewards/<name>/mean`, `.../std`, `.../frac_none`: rewards of the images of
  a rollout that were drawn in full; the share of prompts whose images all have the same reward.
- `group_diversity`: root mean square difference of the pixels, from 0 to 1, of the images of one prompt.
- `kl`: distance from the reference policy. `velocity_ratio`: size of the velocity relative to the reference's. Both are logged if
  the reference is evaluated (`beta` above 0).
- `ratio/mean`, `ratio/std`, `clip_ratio/low`, `clip_ratio/high`: GRPO's probability ratio, and the share of it that was clipped.
- `num_images`, `num_trained_images`, `num_scout_images`: images drawn in full, trained on, and drawn as scouts, since the start.
- `old_policy_distance`: mean squared difference of the velocity from the old policy's, in DiffusionNFT.
- `num_policy_passes`, `num_reference_passes`, `num_old_log_prob_passes`, `num_old_policy_passes`: passes of one image through the transformer since the
  start; a backward pass counts as one, too. `passes_per_update`: all of them since the last log, per update.
  `passes_per_trained_image`: all of them since the start, per image that was trained on.
- `scout_rank_correlation`: Spearman's correlation of the rewards of an image and of its scout, within the group of those that
  were drawn in full. These are the best and the worst, so it is higher than it would be over all scouts.
- `images_per_second`, and `time/<phase>`: seconds per update.
"""

from importlib import import_module
from typing import Any


_MODULES = {
    "advantages": ["combine_rewards", "group_advantages", "select_top_k"],
    "config": ["DiffusionGRPOConfig"],
    "dpo.config": ["DiffusionDPOConfig"],
    "dpo.losses": ["DPOLossOutput", "diffusion_dpo_loss"],
    "dpo.trainer": ["DiffusionDPOTrainer"],
    "policies.lora": ["attention_lora_config"],
    "nft.config": ["DiffusionNFTConfig"],
    "nft.losses": ["NFTLossOutput", "nft_loss"],
    "nft.trainer": ["DiffusionNFTTrainer"],
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
