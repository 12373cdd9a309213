"""
HPSv3++: Qwen3-VL with HPSv3's head, whose input is scaled and shifted by the estimated capability of the generator.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from .hpsv3 import HPSv3, make_head, rename_weights


_CONDITION_SIZE = 256
_START_NAMES = {
    "model.": "backbone.",
    "rm_head.": "head.",
    **{name: name for name in ("cond_encoder.", "film_gen.", "cap_encoder.")},
}
_ITERATION = 0.0  # step of the reinforcement learning that images come from; the authors recommend 0


class CapabilityEncoder(nn.Module):
    """
    Estimates the capability of an image's generator, 0 to 1, `(batch_size,)`, from states `(batch_size, hidden_size)`.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.proj = nn.Linear(hidden_size, _CONDITION_SIZE)
        self.pool_attn = nn.Linear(_CONDITION_SIZE, 1)  # weighs the images of a group; unused here
        self.out_proj = nn.Linear(_CONDITION_SIZE, 1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.out_proj(self.proj(hidden.to(self.proj.weight.dtype))).sigmoid()[:, 0].float()


class HPSv3PlusModel(nn.Module):
    """
    The network.

    Args:
        config ([`~transformers.Qwen3VLConfig`]):
            Sizes of the backbone.
    """

    precise = ("head", "cond_encoder", "film_gen")  # parts kept in float32

    def __init__(self, config: Qwen3VLConfig):
        super().__init__()
        hidden_size = config.get_text_config().hidden_size
        self.backbone = Qwen3VLModel(config)
        self.head = make_head(hidden_size)
        self.cap_encoder = CapabilityEncoder(hidden_size)
        self.cond_encoder = nn.Sequential(
            nn.Linear(2, _CONDITION_SIZE), nn.GELU(), nn.Linear(_CONDITION_SIZE, _CONDITION_SIZE)
        )
        self.film_gen = nn.Sequential(
            nn.Linear(_CONDITION_SIZE, hidden_size), nn.ReLU(), nn.Linear(hidden_size, 2 * hidden_size)
        )

    def forward(self, places: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """
        Returns the mean and the logarithm of the standard deviation, `(batch_size, 2)`, in float32.

        Args:
            places (`torch.Tensor` of shape `(batch_size,)`):
                Position of the reward token.
            inputs (`input_ids`, `attention_mask`, `mm_token_type_ids`, `pixel_values`, `image_grid_thw`):
                Inputs of the backbone, padded on the right.
        """
        states = self.backbone(**inputs, use_cache=False).last_hidden_state
        hidden = states[torch.arange(len(places), device=places.device), places]
        capability = self.cap_encoder(hidden)
        condition = torch.stack([capability, torch.full_like(capability, _ITERATION)], dim=1)
        scale, shift = self.film_gen(self.cond_encoder(condition)).chunk(2, dim=1)
        return self.head(hidden.float() * (1 + scale) + shift)


class HPSv3Plus(HPSv3):
    """
    HPSv3++ ([papers/2606.14657](https://huggingface.co/papers/2606.14657)): mean and standard deviation of the
    preference.

    Each image is scored separately. The published program estimates one capability for all images of a batch, so that
    its scores depend on the batch; these are its scores for batches of one image.

    The weights are published as a pickle, which is not loaded. Convert them once, where you trust the file:

    ```python
    state_dict = torch.load("hpsv3++.pth", map_location="cpu", weights_only=True)
    save_hpsv3_plus(state_dict.get("model", state_dict), "HPSv3-PlusPlus")
    ```

    Args:
        reference (`str`), device (`str` or `torch.device`, *optional*):
            As of [`HPSv3`], with `HPSv3-PlusPlus.safetensors`, and a Qwen3-VL-8B.

    Raises:
        `ValueError`: If there is no such model, or weights are missing or unknown.
    """

    name = "hpsv3++"
    trained_on = "HPDv3++ and HPDv3: choices between images of many generators, and images of models in training"
    default = None
    hint = "Write a folder with the converted weights after a colon: see save_hpsv3_plus"
    backbone = "Qwen/Qwen3-VL-8B-Instruct"
    file = "HPSv3-PlusPlus.safetensors"
    config_class = Qwen3VLConfig
    network = HPSv3PlusModel
    start_names = _START_NAMES
    inputs = ("input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw")


def save_hpsv3_plus(state_dict: Mapping[str, torch.Tensor], folder: str | Path) -> None:
    """
    Saves the published weights of HPSv3++ as safetensors.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            Name → weight.
        folder (`str` or `Path`):
            Where to; created if missing.

    Raises:
        `ValueError`: If a name is unknown.
    """
    rename_weights(state_dict, _START_NAMES)
    Path(folder).mkdir(parents=True, exist_ok=True)
    kept = {name: weight.contiguous() for name, weight in state_dict.items() if name != "lm_head.weight"}
    save_file(kept, Path(folder) / HPSv3Plus.file)
