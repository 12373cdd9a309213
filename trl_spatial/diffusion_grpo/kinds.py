"""Files of trained diffusion weights and of pipelines that may be uploaded."""

from dataclasses import replace

from ..hub.cards import Card
from ..hub.checkpoints import PROCESSOR_FILES, Kind


_LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
_LORA_CARD = Card(
    "diffusion.md",
    {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["lora", "diffusers", "spatial-rl"]},
    {"is_lora": True},
)
LORA = Kind(
    "LoRA weights of a diffusion model",
    "model",
    lambda folder: (folder / _LORA_WEIGHTS).is_file(),
    files=(_LORA_WEIGHTS,),
    weights=(_LORA_WEIGHTS,),
    card=_LORA_CARD,
)
PIPELINE = Kind(
    "a diffusion pipeline",
    "model",
    lambda folder: (folder / "model_index.json").is_file(),
    files=(
        "model_index.json",
        "*/config.json",
        "*/generation_config.json",
        "*/scheduler_config.json",
        "*/model*.safetensors",
        "*/model.safetensors.index.json",
        "*/diffusion_pytorch_model*.safetensors",
        "*/diffusion_pytorch_model.safetensors.index.json",
        *(f"*/{name}" for name in PROCESSOR_FILES),
    ),
    weights=("*/diffusion_pytorch_model*.safetensors",),
)
TRANSFORMER = Kind(
    "a fully trained transformer of a diffusion model",
    "model",
    lambda folder: (folder / "transformer" / "config.json").is_file(),
    files=(
        "transformer/config.json",
        "transformer/diffusion_pytorch_model*.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
    ),
    weights=("transformer/*.safetensors",),
    card=replace(_LORA_CARD, values={}),
)
