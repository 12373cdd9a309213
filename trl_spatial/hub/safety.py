"""Refuses to load files that could run code, and to upload files that hold secrets or local paths."""

import getpass
import json
import os
import re
import struct
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import HTTPError

from .errors import call_with_retries, explain_errors, is_connection_error
from .references import Reference


PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill")
# Pickles that trainers save beside a model; loading the model does not read them.
_TRAINING_STATE = ("training_args.bin", "optimizer", "scheduler", "scaler", "rng_state", "random_states")
_SETTINGS = ("config.json", "model_index.json")  # suffixes of file names
CODE_SUFFIXES = (".py", ".so", ".dll", ".pyd", ".pyc")
_TEXT_SUFFIXES = (".json", ".jsonl", ".md", ".txt", ".yaml", ".yml", ".jinja", ".py", ".toml", ".csv")
# Not searched for paths: a vocabulary may have the token "/root".
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt")
_TOKENS = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16}"
    r"|xox[abp]-[\w-]{10,})|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_PATHS = re.compile(r"(?<![\w./:])/[\w.@+-]+(?:/[\w.@+-]+)+")
_SYSTEM_FOLDERS = ("/bin/", "/dev/", "/etc/", "/proc/", "/sys/", "/usr/")
_TOKEN_VARIABLES = re.compile(r"(TOKEN|API_?KEY|SECRET|PASSWORD)$")
_SHORTEST_SECRET = 8
_LARGEST_HEADER = 100_000_000  # bytes; the limit of safetensors


class UnsafeRepositoryError(ValueError):
    """A repository holds files that run code when they are loaded."""


def check_repository(reference: Reference, *, kind: str) -> None:
    """
    Refuses a repository on the Hub or a model's local folder that could run code when it is loaded: one with pickles, code,
    or settings with `auto_map`, which name classes to load from code. Only settings are downloaded for that.

    Args:
        reference ([`Reference`]):
            The repository or folder. Local datasets are not checked: only data is read from them.
        kind (`str`):
            `"model"` or `"dataset"`.

    Raises:
        [`UnsafeRepositoryError`]: If it is refused; the message names the files and the way out.
        `ValueError`: If a file of settings is damaged.
        `HubError`: If there is no such repository, or it may not be read.
    """
    if reference.is_local:
        if kind == "model":
            files = _files_beside_weights(Path(reference.name))
            _refuse_code(reference, kind, list(files), files)
        return
    # Offline, only cached repositories can be loaded; they were checked when they were downloaded.
    if constants.is_offline_mode():
        return
    with explain_errors(f"Loading {reference}"):
        try:
            # not `list_repo_files`, which waits long for an unreachable Hub
            info: Any = call_with_retries(
                HfApi().repo_info, reference.name, repo_type=kind, revision=reference.revision, has_fallback=True
            )
            names = [file.rfilename for file in info.siblings or []]
            _refuse_code(reference, kind, names, {})
            if kind == "model":
                where: dict[str, Any] = {"repo_id": reference.name, "revision": reference.revision}
                settings = [name for name in names if name.endswith(_SETTINGS)]
                files = {name: Path(call_with_retries(hf_hub_download, filename=name, **where)) for name in settings}
                _refuse_code(reference, kind, [], files)
        except HTTPError as error:
            if not is_connection_error(error):
                raise


def _files_beside_weights(folder: Path) -> dict[str, Path]:
    """
    Lists the files in the folder of a model, or of a pipeline and its components, by relative name. Training state is
    left out, because it is not loaded.
    """
    files = {}
    for part in [folder, *(path for path in folder.glob("*") if path.name[0] != "." and path.is_dir())]:
        if any(part.glob("*.safetensors")) or any(part.glob("*config.json")) or (part / "model_index.json").is_file():
            for path in part.iterdir():
                is_of_training = path.name.startswith(_TRAINING_STATE) and path.suffix in PICKLE_SUFFIXES
                if path.is_file() and not is_of_training:
                    files[path.relative_to(folder).as_posix()] = path
    return files


def _refuse_code(reference: Reference, kind: str, names: list[str], files: Mapping[str, Path]) -> None:
    unsafe = [name for name in names if name.lower().endswith(PICKLE_SUFFIXES + CODE_SUFFIXES)]
    settings = {name: read_settings(file) for name, file in files.items() if name.endswith(_SETTINGS)}
    unsafe += [f"{name} with auto_map" for name, content in settings.items() if _names_code(content)]
    if not unsafe:
        return
    shown = ", ".join(sorted(unsafe)[:5]) + (f" and {len(unsafe) - 5} more" if len(unsafe) > 5 else "")
    if reference.is_local:
        way_out = (
            "If you trust the other files, move these out of the folder, and remove `auto_map` from the settings."
        )
    else:
        repo_type = " --repo-type dataset" if kind == "dataset" else ""
        way_out = (
            f"If you trust the other files, download them without those (`hf download {reference.name}{repo_type} --include "
            "... --local-dir FOLDER`), remove `auto_map` from the settings, and name FOLDER."
        )
    what = "datasets" if kind == "dataset" else "models"
    raise UnsafeRepositoryError(
        f"{reference} is refused: it holds {shown}. Pickles and scripts can run code when they are loaded, so {what} are read "
        f"from safetensors, Parquet and JSON only. {way_out}"
    )


def _names_code(settings: Any) -> bool:
    """Whether settings have an `auto_map` entry, at any depth."""
    if isinstance(settings, list):
        return any(map(_names_code, settings))
    return isinstance(settings, dict) and ("auto_map" in settings or any(map(_names_code, settings.values())))


def read_settings(file: Path) -> dict[str, Any]:
    """Reads a JSON file of settings; a `ValueError` if it is not a JSON object."""
    try:
        settings = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:  # invalid JSON or UTF-8, or nested too deeply
        raise ValueError(f"{file} is damaged: {error}. Save or download the folder again.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} is damaged: it is not a JSON object. Save or download the folder again.")
    return settings


def check_public(files: Mapping[str, Path | bytes], *, private: tuple[Path, ...] = ()) -> None:
    """
    Refuses to upload pickles, links to files elsewhere, tokens and keys, and paths of this machine or in the `private` folders.

    `files` maps a name in the repository to the local file, or to its content. The message of the `ValueError` names the file; a
    secret itself is not shown.
    """
    findings = []
    values = [value for name, value in os.environ.items() if _TOKEN_VARIABLES.search(name.upper())]
    secrets = [value for value in {*values, get_token() or ""} if len(value) >= _SHORTEST_SECRET]
    paths = _own_paths(private)
    for name, source in files.items():
        if name.lower().endswith(PICKLE_SUFFIXES):
            findings.append(f"{name} is a pickle")
            continue
        if isinstance(source, Path) and not source.resolve().is_relative_to(source.parent.resolve()):
            findings.append(f"{name} is a link to a file elsewhere")
            continue
        text = _readable_part(name, source)
        if _TOKENS.search(text) or any(secret in text for secret in secrets):
            findings.append(f"{name} holds a secret token")
        if Path(name).name not in _VOCABULARIES and (found := _find_path(text, paths)):
            findings.append(f"{name} holds the path {found} of this machine")
    if findings:
        raise ValueError(
            f"Nothing was uploaded: {'; '.join(findings[:5])}. Remove it from the file; for a model that was trained on a "
            "local one, name that model on the Hub with --base_model ORG/NAME."
        )


def _own_paths(private: tuple[Path, ...]) -> list[str]:
    folders = {Path.cwd(), Path.home(), Path(constants.HF_HOME), *private}
    paths = {str(form) for folder in folders for form in (folder, folder.absolute(), folder.resolve())}
    user = getpass.getuser()
    paths |= {f"/home/{user}", f"/Users/{user}", f"C:\\Users\\{user}"}
    # `/` and relative paths would match almost any text
    return sorted(path for path in paths if len(path) > 1 and Path(path).is_absolute())


def _find_path(text: str, paths: list[str]) -> str | None:
    """Returns the first of `paths` that occurs in the text, or any other path in it that exists on this machine."""
    if found := next((path for path in paths if path in text), None):
        return found
    named = (match[0] for match in _PATHS.finditer(text))
    return next((path for path in named if not path.startswith(_SYSTEM_FOLDERS) and Path(path).exists()), None)


def _readable_part(name: str, source: Path | bytes) -> str:
    """Returns the text of a text file, the metadata of a safetensors file, and `""` for any other file."""
    if name.endswith(".safetensors"):
        return _safetensors_metadata(name, source)
    if not name.endswith(_TEXT_SUFFIXES):
        return ""
    data = source if isinstance(source, bytes) else source.read_bytes()
    return data.decode("utf-8", errors="replace").replace("\\/", "/")


def _safetensors_metadata(name: str, source: Path | bytes) -> str:
    length = len(source) if isinstance(source, bytes) else source.stat().st_size
    try:
        with BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            size = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(min(size, _LARGEST_HEADER)))
        metadata = header.pop("__metadata__", {})
        expected = 8 + size + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if expected != length:
            raise ValueError(f"{length} bytes, where its header names {expected}")
    except (ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        raise ValueError(f"{name} is damaged: it is not a whole safetensors file ({error}). Save it again.") from error
    return json.dumps(metadata).replace("\\/", "/")
