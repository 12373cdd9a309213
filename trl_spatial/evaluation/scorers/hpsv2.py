"""HPSv2.1, a CLIP ViT-H-14 trained on preferences, and the conversion of its published weights to transformers."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from .clip import CLIPScorer
from .preparing import prepare_by_torch


# open_clip's ViT-H-14
VIT_H_14 = {
    "projection_dim": 1024,
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 1024,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    },
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "hidden_act": "gelu",
        "projection_dim": 1024,
    },
}
_RENAMED = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "logit_scale": "logit_scale",
}
_IN_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_LAYER = re.compile(
    r"(?P<tower>visual\.)?transformer\.resblocks\.(?P<number>\d+)\.(?P<part>.+?)(?P<kind>[._](?:weight|bias))"
)


class HPSv2(CLIPScorer):
    """
    HPSv2.1, the cosine ([papers/2306.09341](https://huggingface.co/papers/2306.09341)).

    It is published as a pickle, which is not loaded. Turn it into a model of transformers once:

    ```python
    >>> import torch
    >>> from trl_spatial.evaluation.scorers.hpsv2 import save_hpsv2
    >>> save_hpsv2(torch.load("HPS_v2.1_compressed.pt", weights_only=True)["state_dict"], "hpsv2")
    ```

    and add the tokenizer: `hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K --include "tokenizer*" "vocab.json" "merges.txt"
    --local-dir hpsv2`. Images are resized in floating point with antialiasing, as the official program does with torchvision
    0.17 or later. Unlike there, prompts are not repaired by ftfy, which only matters for broken Unicode.

    Args:
        reference (`str`):
            That folder, or such a model on the Hub.
        device (`str` or `torch.device`, *optional*):
            Where it runs. If `None`, the accelerator if there is one.

    Raises:
        `ValueError`: As [`CLIPScorer`].
    """

    name = "hpsv2"
    trained_on = "HPD v2: choices between images of many generators; it is also a common reward of image models"
    hint = (
        "HPSv2.1 is published as a pickle, HPS_v2.1_compressed.pt, which is not loaded. Save it as safetensors once with "
        "trl_spatial.evaluation.scorers.hpsv2.save_hpsv2, and write hpsv2:FOLDER"
    )

    def prepare_images(self, images: list[Image.Image]) -> torch.Tensor:
        """See [`CLIPScorer`]."""
        side = self.model.config.vision_config.image_size
        return torch.stack([prepare_by_torch(image, side) for image in images])

    def finish(self, cosines: torch.Tensor) -> torch.Tensor:
        """See [`CLIPScorer`]."""
        return cosines


def save_hpsv2(state_dict: Mapping[str, torch.Tensor], folder: str | Path, config: CLIPConfig | None = None) -> None:
    """
    Saves weights of open_clip as a model of transformers.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            Name in open_clip → weight.
        folder (`str` or `Path`):
            Where to; created if missing.
        config ([`~transformers.CLIPConfig`], *optional*):
            Sizes. If not set, those of ViT-H-14.

    Raises:
        `ValueError`: If a weight is unknown or missing.
    """
    model = CLIPModel(config or CLIPConfig(**VIT_H_14))
    converted = convert_open_clip(state_dict)
    expected = {name for name, _ in model.named_parameters()}
    if expected != set(converted):
        wrong = sorted(expected ^ set(converted))
        raise ValueError(
            f"These are not the weights of such a CLIP: {len(wrong)} names are missing or unknown, {wrong[:5]}."
        )
    model.load_state_dict(converted, strict=False)  # not strict: buffers are computed
    model.save_pretrained(folder)


def convert_open_clip(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Renames the weights of a CLIP of open_clip to transformers' names; splits queries, keys and values into three
    matrices, and transposes projections.

    Raises:
        `ValueError`: If a name is unknown.
    """
    converted = {}
    for name, weight in state_dict.items():
        if name in ("text_projection", "visual.proj"):
            converted[f"{'visual' if name[0] == 'v' else 'text'}_projection.weight"] = weight.T.contiguous()
        elif match := _LAYER.fullmatch(name):
            tower = "vision_model" if match["tower"] else "text_model"
            prefix, part, kind = f"{tower}.encoder.layers.{match['number']}", match["part"], match["kind"][1:]
            if part == "attn.in_proj":
                for letter, block in zip("qkv", weight.chunk(3), strict=True):
                    converted[f"{prefix}.self_attn.{letter}_proj.{kind}"] = block.contiguous()
            elif part in _IN_LAYER:
                converted[f"{prefix}.{_IN_LAYER[part]}.{kind}"] = weight
            else:
                raise ValueError(f"{name} is no weight of a CLIP of open_clip.")
        elif name in _RENAMED:
            converted[_RENAMED[name]] = weight
        elif name.rpartition(".")[0] in _RENAMED:
            start, _, kind = name.rpartition(".")
            converted[f"{_RENAMED[start]}.{kind}"] = weight
        else:
            raise ValueError(f"{name} is no weight of a CLIP of open_clip.")
    return converted
