"""What the recipe of the reward model takes at true size: a micro-batch of training and one of scoring."""

import copy
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLModel

from tests.true_size.fakes import Counts, like_cuda, make_fake
from trl_spatial.diffusion_grpo.runtime.architectures import load_architecture
from trl_spatial.gaussian_reward.losses import gaussian_bradley_terry_loss
from trl_spatial.gaussian_reward.modeling import (
    GaussianRewardModel,
    GaussianRewardModelConfig,
    spatial_score_lora_config,
)


# Of the 3B backbone, what differs from the 7B one
_3B: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "max_window_layers": 36,
    "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
REWARDS = {"reward_spatialscore": {}, "reward_spatialscore, 3B": _3B}
NUM_PAIRS = 4  # the default `per_device_train_batch_size`
NUM_TEXT_TOKENS = 160  # instruction, template and a prompt
# Pixels on a side and patches: the smallest and the largest images of the recipe
SIDES = {512: 36, 1024: 74}
REWARD_TOKEN = 151665


def build_reward_model(changes: dict[str, Any]) -> GaussianRewardModel:
    """The model on the meta device, with its backbone in bfloat16 on fake tensors."""
    _, _, config = load_architecture("Qwen/Qwen-Image")["text_encoder"]  # Qwen2.5-VL-7B
    config = copy.deepcopy(config)
    config["text_config"].update(changes)
    config["vision_config"]["out_hidden_size"] = config["text_config"]["hidden_size"]
    backbone_config = Qwen2_5_VLConfig.from_dict(config)
    with torch.device("meta"):
        backbone = Qwen2_5_VLModel._from_config(backbone_config, attn_implementation="sdpa")
        model = GaussianRewardModel(
            GaussianRewardModelConfig(backbone_config=backbone_config, reward_token_id=REWARD_TOKEN), backbone
        )
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    make_fake(model.backbone.get_input_embeddings().reward_token, mode, torch.float32)
    make_fake(model.head, mode, torch.float32)
    make_fake(model, mode)
    return model


def make_batch(config: Any, num_images: int, num_patches: int, mode: FakeTensorMode) -> dict[str, torch.Tensor]:
    """Square images of so many patches on a side. Tokens are real: where they are decides what is computed."""
    num_tokens = (num_patches // config.vision_config.spatial_merge_size) ** 2
    ids = torch.full((num_images, num_tokens + NUM_TEXT_TOKENS), 100)
    ids[:, 20] = config.vision_start_token_id
    ids[:, 21 : 21 + num_tokens] = config.image_token_id
    ids[:, 21 + num_tokens] = config.vision_end_token_id
    ids[:, -1] = REWARD_TOKEN
    vision = config.vision_config
    with mode:
        pixels = torch.empty(
            num_images * num_patches**2, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        )
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config.image_token_id).long(),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, num_patches, num_patches]] * num_images),
    }


def train(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, int]:
    """Counts of the loss of a micro-batch and its gradient."""
    with Counts(model) as counts:
        with torch.autocast("cpu", torch.bfloat16):
            output = model(**batch)
        (chosen_mean, rejected_mean), (chosen_log_std, rejected_log_std) = (
            output.mean.chunk(2),
            output.log_std.chunk(2),
        )
        losses = gaussian_bradley_terry_loss(
            chosen_mean, chosen_log_std, rejected_mean, rejected_log_std, estimator="monte_carlo", num_samples=1000
        )
        losses.mean().backward()
    return counts.take() | {"images": len(batch["input_ids"])}


@torch.no_grad()
def score(model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, int]:
    """Counts of a merged model."""
    with Counts(model) as counts:
        model(**batch)
    return counts.take() | {"images": len(batch["input_ids"])}


def measure_reward(changes: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Counts of training and of scoring, for each size of the images."""
    phases = {}
    with like_cuda():
        model: Any = build_reward_model(changes).eval()
        mode = next(model.backbone.parameters()).fake_mode
        batches = {
            side: make_batch(model.config.backbone_config, 2 * NUM_PAIRS, num_patches, mode)
            for side, num_patches in SIDES.items()
        }
        for side, batch in batches.items():
            phases[f"score: {side}"] = score(model, batch)
        with mode:
            adapted = get_peft_model(model, spatial_score_lora_config()).train()
        adapted.gradient_checkpointing_enable()
        adapted.enable_input_require_grads()
        for side, batch in batches.items():
            phases[f"train: {side}"] = train(adapted, batch)
        for name, weight in adapted.named_parameters():
            assert (weight.grad is not None) == weight.requires_grad, name
            assert weight.requires_grad == ("lora_" in name or "modules_to_save" in name), name
    return phases
