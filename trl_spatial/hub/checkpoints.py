"""Selects the files of a local folder that are uploaded to the Hub, and fills in the card for the repository."""

import fnmatch
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .cards import SAMPLES_FILE, Card
from .safety import read_settings


ADAPTER_CONFIG = "adapter_config.json"  # PEFT's name
_MODEL_NAMES = ("base_model_name_or_path", "_name_or_path", "name_or_path")
# Written by transformers for a tokenizer or a processor.
PROCESSOR_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


@dataclass(frozen=True)
class Kind:
    """
    A kind of folder that can be uploaded. The room that writes such folders defines it: its name in messages, whether a folder is one,
    and the files that are uploaded, as names or shell patterns where `*` does not match a `/`; everything else stays here, but for
    the card and its picture. `weights` are the forms that its weights have, of which a folder must hold exactly one. A folder
    without a card gets `card`, or else needs a `README.md`.
    """

    name: str
    repo_type: str
    is_one: Callable[[Path], bool]
    files: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    card: Card | None = None


def find_kind(folder: str | Path, kinds: Sequence[Kind]) -> Kind:
    """
    Returns the first of the kinds that fits a folder: output of a training, a merged model, a dataset, a built Space.

    Raises:
        `ValueError`: If none fits. The message names folders in it that fit.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder. Name the folder of a model, a dataset or a Space.")
    for kind in kinds:
        if kind.is_one(folder):
            return kind
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir() and any(kind.is_one(path) for kind in kinds)]
    hint = f" Push a folder in it: {', '.join(map(str, inside))}." if inside else ""
    raise ValueError(f"{folder} is none of: {', '.join(kind.name for kind in kinds)}.{hint}")


def collect_files(
    folder: str | Path,
    repo_id: str,
    *,
    kind: Kind,
    base_model: str | None = None,
    license: str | None = None,
) -> dict[str, Path | bytes]:
    """
    Collects what is uploaded from the folder of a model or a Space: the files that its kind allows, as paths or, where it differs,
    as content, and for a model the card, filled in for `repo_id`, with its picture. A `README.md` that somebody has edited is kept.
    `base_model` is the Hub id of the model that was trained, if a local copy of it was.

    Raises:
        `ValueError`: If the folder has no weights, or those of two models, or a damaged file.
    """
    folder = Path(folder)
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if _is_own_file(path, folder) and _matches(path.relative_to(folder), kind.files)
    }
    forms = [form for form in kind.weights if any(_matches(Path(name), (form,)) for name in files)]
    if kind.weights and len(forms) != 1:
        found = f"the weights of two models, {' and '.join(forms)}" if forms else f"no {' or '.join(kind.weights)}"
        raise ValueError(
            f"{folder} is {kind.name}, but holds {found}. Finish the training, or save into a new folder."
        )
    if kind.repo_type == "space":
        return files
    settings = [name for name in files if name.endswith("config.json") or name == "model_index.json"]
    files |= {name: _without_local_names(folder / name, base_model) for name in settings}
    return files | _card_files(folder, kind, repo_id, base_model, license)


def list_kept(folder: str | Path, files: Iterable[str]) -> list[str]:
    """Lists what is in a folder but not in `files`; folders without any of these files end with a `/`."""
    folder, files = Path(folder), set(files)
    kept = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not any(name.startswith(f"{path.name}/") for name in files):
            kept.append(f"{path.name}/")
        elif path.is_dir():
            inside = (file.relative_to(folder).as_posix() for file in sorted(path.rglob("*")) if not file.is_dir())
            kept += [name for name in inside if name not in files]
        elif path.name not in files:
            kept.append(path.name)
    return kept


def _is_own_file(path: Path, folder: Path) -> bool:
    """Whether a path is a file in the folder that is not hidden and not a link out of it."""
    is_hidden = any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    return not is_hidden and path.is_file() and path.resolve().is_relative_to(folder.resolve())


def _matches(path: Path, patterns: Iterable[str]) -> bool:
    parts = path.parts
    return any(
        len(parts) == len(pattern.split("/")) and all(map(fnmatch.fnmatchcase, parts, pattern.split("/")))
        for pattern in patterns
    )


def _without_local_names(file: Path, base_model: str | None) -> Path | bytes:
    """
    Replaces the local path of the base model in a settings file by its Hub id, or removes it if there is none. Returns
    the new content, or `file` if nothing has changed.
    """
    settings = read_settings(file)
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
    """Whether the files are an adapter that does not name its base model on the Hub."""
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
    pictures: dict[str, Path | bytes] = {SAMPLES_FILE: samples} if _is_own_file(samples, folder) else {}
    if card is None or (readme.is_file() and not (recorded and recorded.has_made(readme))):
        if not readme.is_file():
            raise ValueError(f"{folder} has no README.md. Write one that describes the model and how it was made.")
        return {"README.md": readme, **pictures}
    if base_model is not None:
        card = replace(card, base_model=base_model)
    elif card.base_model is None and (folder / ADAPTER_CONFIG).is_file():
        name = read_settings(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
        card = replace(card, base_model=None if name is None or is_local_name(name) else name)
    if license is not None:
        card = replace(card, front_matter=card.front_matter | {"license": license})
    return {**card.files(repo_id, has_samples=bool(pictures)), **pictures, **card.result_files()}
