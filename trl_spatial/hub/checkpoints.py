"""What of a local folder goes to the Hub: the files of a model, never its training's, and a card for where it goes."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .cards import CARD_FILE, SAMPLES_FILE, Card


_WEIGHTS = (".safetensors",)
_SETTINGS = (".json", ".jinja", ".txt", ".model")  # .model: the vocabulary of a SentencePiece tokenizer
# What a training writes for itself.
_PRIVATE = (
    "trainer_state.json",
    "checkpoint.json",
    "run.json",
    "arguments.json",
    "results.json",
    "dataset_info.json",
    "state.json",
)
_PRIVATE_WEIGHTS = ("trained_weights.safetensors", "ema.safetensors")
ADAPTER_CONFIG = "adapter_config.json"
_MODEL_NAMES = ("base_model_name_or_path", "_name_or_path", "name_or_path")
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
REWARD_MODEL_TYPE = "gaussian_reward"


@dataclass(frozen=True)
class Kind:
    """
    A kind of folder that can be pushed.

    Args:
        name (`str`):
            What it is called in messages.
        repo_type (`str`):
            `"model"`, `"dataset"` or `"space"`.
        is_one (`Callable`):
            Whether a folder is of this kind.
        folders (`tuple[str, ...]`, *optional*):
            Folders within it that belong to it; `"*"` for all.
        card (`Card`, *optional*):
            What is said of one that has recorded nothing of itself.
    """

    name: str
    repo_type: str
    is_one: Callable[[Path], bool]
    folders: tuple[str, ...] = ()
    card: Card | None = None


def _model_type(folder: Path) -> str | None:
    file = folder / "config.json"
    return json.loads(file.read_text(encoding="utf-8")).get("model_type") if file.is_file() else None


_SPATIAL_SCORE_CARD = Card(
    "spatial_score.md",
    {"library_name": "trl_spatial", "pipeline_tag": "image-text-to-text", "tags": ["reward-model", "spatial-score"]},
)
_LORA_CARD = Card(
    "diffusion_lora.md",
    {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": ["lora", "diffusers", "spatial-rl"]},
)
# The first one that fits.
KINDS = (
    Kind(
        "a SpatialScore reward model",
        "model",
        lambda folder: _model_type(folder) == REWARD_MODEL_TYPE,
        card=_SPATIAL_SCORE_CARD,
    ),
    Kind(
        "LoRA weights of a diffusion model",
        "model",
        lambda folder: (folder / LORA_WEIGHTS).is_file(),
        card=_LORA_CARD,
    ),
    Kind("a diffusion pipeline", "model", lambda folder: (folder / "model_index.json").is_file(), folders=("*",)),
    Kind(
        "a fully trained transformer of a diffusion model",
        "model",
        lambda folder: (folder / "transformer" / "config.json").is_file(),
        folders=("transformer",),
        card=replace(_LORA_CARD, template="diffusion_transformer.md"),
    ),
    Kind("a Space", "space", lambda folder: (folder / "app.py").is_file() and (folder / "README.md").is_file()),
    Kind(
        "a dataset",
        "dataset",
        lambda folder: (
            any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))
            or any(folder.glob("*.parquet"))
            or any(folder.glob("data/*.parquet"))
        ),
    ),
    Kind("a model", "model", lambda folder: any(folder.glob("*.safetensors")) and _model_type(folder) is not None),
)


def find_kind(folder: str | Path) -> Kind:
    """
    Says what a folder holds.

    Args:
        folder (`str` or `Path`):
            Output of a training, a merged model, a dataset, a built Space.

    Raises:
        `ValueError`: If it is none of these; the message lists what can be pushed in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder. Name the folder of a model, a dataset or a Space.")
    kind = _kind_of(folder)
    if kind is not None:
        return kind
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir() and _kind_of(path) is not None]
    hint = f" Push what is in it: {', '.join(map(str, inside))}." if inside else ""
    raise ValueError(
        f"{folder} holds no model, dataset or Space: no config.json with weights as safetensors, {LORA_WEIGHTS}, "
        f"model_index.json, dataset or app.py.{hint}"
    )


def _kind_of(folder: Path) -> Kind | None:
    return next((kind for kind in KINDS if kind.is_one(folder)), None)


def collect_files(
    folder: str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
) -> dict[str, Path | bytes]:
    """
    Collects what of a model's or a Space's folder goes to the Hub: weights, settings, the card filled for `repo_id` with its
    picture, and results. A README.md that somebody has edited stays as it is.

    Args:
        folder (`str` or `Path`):
            The folder.
        repo_id (`str`):
            Where it goes, `"org/name"`.
        base_model (`str`, *optional*):
            Hub id of the model it was trained on, if it was trained on a local copy.
        license (`str`, *optional*):
            License for the card, as the Hub abbreviates it.

    Returns:
        `dict[str, Path | bytes]`: name in the repository → local file, or its content where that differs from the file's.

    Raises:
        `ValueError`: If there is nothing to push in the folder.
    """
    folder = Path(folder)
    kind = find_kind(folder)
    if kind.repo_type == "space":
        names = ("app.py", "requirements.txt", "README.md")
        return {name: folder / name for name in names if (folder / name).is_file()}
    files: dict[str, Path | bytes] = {path.relative_to(folder).as_posix(): path for path in _model_files(folder, kind)}
    settings = [name for name in files if name.endswith("config.json") or name == "model_index.json"]
    files |= {name: _without_local_names(folder / name, base_model) for name in settings}
    return files | _card_files(folder, kind, repo_id, base_model, license)


def _model_files(folder: Path, kind: Kind) -> Iterator[Path]:
    is_lora = (folder / LORA_WEIGHTS).is_file() and kind.card is _LORA_CARD
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith((".", "_", "checkpoint-")):
            if "*" in kind.folders or path.name in kind.folders:
                yield from (file for file in sorted(path.rglob("*")) if _is_public(file))
        elif _is_public(path) and (not is_lora or path.name == LORA_WEIGHTS):
            yield path


def _is_public(path: Path) -> bool:
    is_private = path.name in _PRIVATE + _PRIVATE_WEIGHTS or path.name.startswith((".", "_", "buffer_"))
    return path.is_file() and path.suffix in _WEIGHTS + _SETTINGS and path.name != CARD_FILE and not is_private


def _without_local_names(file: Path, base_model: str | None) -> Path | bytes:
    """A file of settings in which the local path of the model that was trained gives way to its Hub id, or to nothing."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    is_changed = _replace_local_names(settings, base_model)
    return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode() if is_changed else file


def _replace_local_names(settings: Any, base_model: str | None) -> bool:
    if isinstance(settings, list):
        changed = [_replace_local_names(item, base_model) for item in settings]
        return any(changed)
    if not isinstance(settings, dict):
        return False
    is_changed = False
    for key, value in settings.items():
        if key in _MODEL_NAMES and isinstance(value, str) and value and is_local_name(value):
            settings[key] = base_model
            is_changed = True
        elif _replace_local_names(value, base_model):
            is_changed = True
    return is_changed


def is_local_name(name: str) -> bool:
    """Whether a recorded model name is a path rather than the id of a repository."""
    return Path(name).exists() or name.count("/") != 1 or name.startswith((".", "~", "/"))


def lacks_base_model(files: dict[str, Path | bytes]) -> bool:
    """Whether the files are an adapter that does not say on the Hub which model it belongs to."""
    config = files.get(ADAPTER_CONFIG)
    if config is None:
        return False
    text = config if isinstance(config, bytes) else config.read_bytes()
    return json.loads(text).get("base_model_name_or_path") is None


def _card_files(
    folder: Path, kind: Kind, repo_id: str, base_model: str | None, license: str | None
) -> dict[str, Path | bytes]:
    recorded = Card.load(folder)
    card = recorded or kind.card
    samples, readme = folder / SAMPLES_FILE, folder / "README.md"
    pictures: dict[str, Path | bytes] = {SAMPLES_FILE: samples} if samples.is_file() else {}
    if card is None or (readme.is_file() and not (recorded and recorded.has_made(readme))):
        if not readme.is_file():
            raise ValueError(f"{folder} has no README.md. Write one: people trust what tells what it is.")
        return {"README.md": readme, **pictures}
    if base_model is not None:
        card = replace(card, base_model=base_model)
    elif card.base_model is None:
        card = replace(card, base_model=_recorded_base_model(folder))
    if license is not None:
        card = replace(card, front_matter=card.front_matter | {"license": license})
    return {**card.files(repo_id, has_samples=samples.is_file()), **pictures, **card.result_files()}


def _recorded_base_model(folder: Path) -> str | None:
    """The Hub id of the model that an adapter says it was trained on."""
    file = folder / ADAPTER_CONFIG
    name = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path") if file.is_file() else None
    return None if name is None or is_local_name(name) else name
