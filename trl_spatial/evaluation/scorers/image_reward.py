"""ImageReward: BLIP's text encoder attends to the image, and a linear head reads its first token."""

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer, BlipConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from ...hub.errors import explain_errors
from ...hub.references import find_reference
from ...hub.safety import check_repository
from .base import PairScorer, Score, in_batches
from .preparing import prepare_by_pillow
from .weights import fill, find_file, pick_device, read_weights


# BLIP with the large vision transformer and BERT base
BLIP_LARGE = {
    "text_config": {
        "vocab_size": 30524,
        "hidden_size": 768,
        "encoder_hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
    },
}
_HEAD_SIZES = (1024, 128, 64, 16, 1)
_HEAD_LAYERS = {"0": 0, "2": 1, "4": 2, "6": 3, "7": 4}  # the published weights also number dropout layers
# mean and standard deviation of the raw reward on the training data
_SHIFT, _SCALE = 0.16717362830052426, 1.0333394966054072
_NUM_TOKENS = 35
_BATCH_SIZE = 16
_NOT_USED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm": "post_layernorm",
}
_IN_BLOCK = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


class ImageRewardModel(nn.Module):
    """
    The network: vision transformer, text encoder with cross-attention, and five linear layers without activations in
    between.

    Args:
        config ([`~transformers.BlipConfig`]):
            Sizes.
    """

    def __init__(self, config: BlipConfig):
        super().__init__()
        self.vision = BlipVisionModel(config.vision_config)
        self.text = BlipTextModel(config.text_config, add_pooling_layer=False)
        sizes = pairwise((config.text_config.hidden_size, *_HEAD_SIZES))
        self.head = nn.Sequential(*(nn.Linear(before, after) for before, after in sizes))

    def forward(self, pixels: torch.Tensor, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Rewards of shape `(batch_size,)` for pixels `(batch_size, 3, side, side)` and tokens `(batch_size, num_tokens)`."""
        seen = self.vision(pixels).last_hidden_state
        hidden = self.text(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=seen
        ).last_hidden_state
        return (self.head(hidden[:, 0]).squeeze(-1) - _SHIFT) / _SCALE


class ImageReward(PairScorer):
    """
    ImageReward ([papers/2304.05977](https://huggingface.co/papers/2304.05977)). Prompts are truncated to 35 tokens.

    It is published as a pickle, which is not loaded. Save its weights as safetensors once:

    ```python
    >>> import torch
    >>> from trl_spatial.evaluation.scorers.image_reward import save_image_reward
    >>> save_image_reward(torch.load("ImageReward.pt", weights_only=True), "image-reward")
    ```

    and add BERT's tokenizer: `hf download google-bert/bert-base-uncased --include "tokenizer*" "vocab.txt" --local-dir
    image-reward`.

    Args:
        reference (`str`):
            That folder, or such a repository on the Hub.
        device (`str` or `torch.device`, *optional*):
            Where it runs. If `None`, the accelerator if there is one.

    Raises:
        `ValueError`: If there is no such model, or weights are missing or unknown.
    """

    name = "image-reward"
    trained_on = (
        "ImageRewardDB: rankings of images of DiffusionDB's prompts; it is also a common reward of image models"
    )
    hint = (
        "ImageReward is published as a pickle, ImageReward.pt, which is not loaded. Save it as safetensors once with "
        "trl_spatial.evaluation.scorers.image_reward.save_image_reward, and write image-reward:FOLDER"
    )

    def __init__(self, reference: str, *, device: Any = None):
        place = find_reference(reference, kind="model")
        check_repository(place, kind="model")
        with explain_errors(f"Loading {place}"):
            config = AutoConfig.from_pretrained(place.name, revision=place.revision, trust_remote_code=False)
            if not isinstance(config, BlipConfig):
                raise ValueError(f"{place} is a {config.model_type} model, not ImageReward's BLIP.")
            self.tokenizer = AutoTokenizer.from_pretrained(
                place.name, revision=place.revision, trust_remote_code=False
            )
        model = ImageRewardModel(config)
        fill(model, read_weights(find_file(place, "model.safetensors")), place)
        self.device = pick_device(device)
        self.model = model.float().eval().to(self.device)
        self.side = config.vision_config.image_size

    @torch.inference_mode()
    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[Score]:
        """See [`PairScorer`]."""
        scores: list[Score] = []
        for texts, pictures in in_batches(prompts, images, _BATCH_SIZE):
            tokens = self.tokenizer(
                texts, padding="max_length", truncation=True, max_length=_NUM_TOKENS, return_tensors="pt"
            )
            pixels = torch.stack([prepare_by_pillow(picture, self.side) for picture in pictures])
            values = self.model(
                pixels.to(self.device),
                tokens["input_ids"].to(self.device),
                tokens["attention_mask"].to(self.device),
            )
            scores += [Score(value) for value in values.tolist()]
        return scores


def save_image_reward(
    state_dict: Mapping[str, torch.Tensor], folder: str | Path, config: BlipConfig | None = None
) -> None:
    """
    Saves ImageReward's published weights in a folder that [`ImageReward`] loads; its tokenizer has to be added.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            Published name → weight.
        folder (`str` or `Path`):
            Where to; created if missing.
        config ([`~transformers.BlipConfig`], *optional*):
            Sizes. If not set, the published ones.

    Raises:
        `ValueError`: If a weight is unknown or missing.
    """
    config = config or BlipConfig(**BLIP_LARGE)
    weights = convert_image_reward(state_dict)
    fill(ImageRewardModel(config), weights, "ImageReward")
    config.save_pretrained(folder)
    save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})


def convert_image_reward(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Renames ImageReward's weights for [`ImageRewardModel`]. The two projections of BLIP's contrastive loss are left
    out, because they are not used.

    Raises:
        `ValueError`: If a name is unknown.
    """
    converted = {}
    for name, weight in state_dict.items():
        if name.startswith(_NOT_USED):
            continue
        if name.startswith("blip.text_encoder."):
            converted["text." + name.removeprefix("blip.text_encoder.")] = weight.contiguous()
        elif name.startswith("blip.visual_encoder."):
            converted["vision." + _vision_name(name.removeprefix("blip.visual_encoder."))] = weight.contiguous()
        elif match := re.fullmatch(r"mlp\.layers\.([02467])\.(weight|bias)", name):
            converted[f"head.{_HEAD_LAYERS[match[1]]}.{match[2]}"] = weight.contiguous()
        else:
            raise ValueError(f"{name} is no weight of ImageReward.")
    return converted


def _vision_name(name: str) -> str:
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name):
        if match[2] in _IN_BLOCK:
            return f"encoder.layers.{match[1]}.{_IN_BLOCK[match[2]]}.{match[3]}"
    elif name in _VISION:
        return _VISION[name]
    elif name.rpartition(".")[0] in _VISION:
        start, _, kind = name.rpartition(".")
        return f"{_VISION[start]}.{kind}"
    raise ValueError(f"{name} is no weight of ImageReward's vision transformer.")
