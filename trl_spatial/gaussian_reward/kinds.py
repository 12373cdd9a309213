"""Files of a reward model and of its backbone that may be uploaded."""

from pathlib import Path

from ..hub.cards import Card
from ..hub.checkpoints import ADAPTER_CONFIG, PROCESSOR_FILES, Kind
from ..hub.safety import read_settings


MODEL_TYPE = "gaussian_reward"
TEMPLATE = "spatial_score.md"
_WEIGHTS = ("model*.safetensors",)
_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json", *_WEIGHTS, *PROCESSOR_FILES)


def _model_type(folder: Path) -> str | None:
    file = folder / "config.json"
    return read_settings(file).get("model_type") if file.is_file() else None


SPATIAL_SCORE = Kind(
    "a SpatialScore reward model",
    "model",
    lambda folder: _model_type(folder) == MODEL_TYPE,
    files=(*_FILES, ADAPTER_CONFIG, "adapter_model.safetensors"),
    weights=("adapter_model.safetensors", *_WEIGHTS),
    card=Card(
        TEMPLATE,
        {
            "library_name": "trl_spatial",
            "pipeline_tag": "image-text-to-text",
            "tags": ["reward-model", "spatial-score"],
        },
    ),
)
BACKBONE = Kind(
    "a model of transformers",
    "model",
    lambda folder: any(folder.glob("*.safetensors")) and _model_type(folder) is not None,
    files=_FILES,
    weights=_WEIGHTS,
)
