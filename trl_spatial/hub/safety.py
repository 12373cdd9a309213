"""What is never loaded, and what is never uploaded."""

import getpass
import json
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import DatasetInfo, HfApi, ModelInfo, constants, get_token
from huggingface_hub.errors import HTTPError

from .errors import call_with_retries, explain_errors, is_connection_error
from .references import Reference


PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".dill")
CODE_SUFFIXES = (".py", ".so", ".dll", ".pyd", ".pyc")
_TEXT_SUFFIXES = (".json", ".jsonl", ".md", ".txt", ".yaml", ".yml", ".jinja", ".py", ".toml", ".csv")
# Their words are not the user's: a vocabulary may well have the token "/root".
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt")
_TOKENS = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|AKIA[0-9A-Z]{16}"
    r"|xox[abp]-[\w-]{10,})"
)
_PATHS = re.compile(r"(?<![\w./:])/[\w.@+-]+(?:/[\w.@+-]+)+")
_SYSTEM_FOLDERS = ("/bin/", "/dev/", "/etc/", "/proc/", "/sys/", "/usr/")
_TOKEN_VARIABLES = re.compile(r"(TOKEN|API_?KEY|SECRET|PASSWORD)$")
_SHORTEST_SECRET = 8


class UnsafeRepositoryError(ValueError):
    """A repository holds files that run code when they are loaded."""


def check_repository(reference: Reference, *, kind: str) -> None:
    """
    Refuses a repository on the Hub that carries pickles or code. Nothing of it has been downloaded then.

    Args:
        reference ([`Reference`]):
            The repository. A local folder is the user's own and not looked at.
        kind (`str`):
            `"model"` or `"dataset"`.

    Raises:
        [`UnsafeRepositoryError`]: If it does; the message names the files and the way out.
        `HubError`: If there is no such repository, or it may not be read.
    """
    # Offline only what was loaded before can be loaded, and it was looked at then.
    if reference.is_local or constants.is_offline_mode():
        return
    with explain_errors(f"Loading {reference}"):
        try:
            files = call_with_retries(_list_files, reference, kind, has_fallback=True)
        except HTTPError as error:
            if is_connection_error(error):
                return
            raise
    unsafe = [name for name in files if name.lower().endswith(PICKLE_SUFFIXES + CODE_SUFFIXES)]
    if unsafe:
        shown = ", ".join(unsafe[:5]) + (f" and {len(unsafe) - 5} more" if len(unsafe) > 5 else "")
        what = "datasets" if kind == "dataset" else "models"
        raise UnsafeRepositoryError(
            f"{reference} is refused: it holds {shown}. Pickles and scripts can run code when they are loaded, so {what} are "
            "taken from safetensors, Parquet and JSON only. If you trust the other files, download them without those ("
            f"`hf download {reference.name}{' --repo-type dataset' if kind == 'dataset' else ''} --include ... --local-dir "
            "FOLDER`) and name FOLDER."
        )


def _list_files(reference: Reference, kind: str) -> list[str]:
    # not `list_repo_files`, which waits long for a Hub that cannot be reached
    api = HfApi()
    info: ModelInfo | DatasetInfo
    if kind == "dataset":
        info = api.dataset_info(reference.name, revision=reference.revision)
    else:
        info = api.model_info(reference.name, revision=reference.revision)
    return [file.rfilename for file in info.siblings or []]


def check_public(files: Mapping[str, Path | bytes], *, private: tuple[Path, ...] = ()) -> None:
    """
    Refuses to upload what should stay here: pickles, tokens, and paths of this machine.

    Args:
        files (`Mapping[str, Path | bytes]`):
            Name in the repository → local file, or its content.
        private (`tuple[Path, ...]`, *optional*):
            Further folders whose paths must not be found.

    Raises:
        `ValueError`: If something is found; the message says in which file. A secret itself is not shown.
    """
    findings = []
    secrets, paths = _own_secrets(), _own_paths(private)
    for name, source in files.items():
        if name.lower().endswith(PICKLE_SUFFIXES):
            findings.append(f"{name} is a pickle")
            continue
        text = _readable_part(name, source)
        if _TOKENS.search(text) or any(secret in text for secret in secrets):
            findings.append(f"{name} holds a secret token")
        if Path(name).name not in _VOCABULARIES and (found := _find_path(text, paths)):
            findings.append(f"{name} holds the path {found} of this machine")
    if findings:
        raise ValueError(
            f"Nothing was uploaded: {'; '.join(findings[:5])}. Take it out of the file, or say what stands in its place: "
            "--base_model ORG/NAME for a model that was trained on a local one."
        )


def _own_secrets() -> list[str]:
    values = [value for name, value in os.environ.items() if _TOKEN_VARIABLES.search(name.upper())]
    return [value for value in {*values, get_token() or ""} if len(value) >= _SHORTEST_SECRET]


def _own_paths(private: tuple[Path, ...]) -> list[str]:
    folders = {Path.cwd(), Path.home(), Path(constants.HF_HOME), *private}
    paths = {str(form) for folder in folders for form in (folder, folder.absolute(), folder.resolve())}
    user = getpass.getuser()
    paths |= {f"/home/{user}", f"/Users/{user}", f"C:\\Users\\{user}"}
    # `/` and relative names are found everywhere and say nothing
    return sorted(path for path in paths if len(path) > 1 and Path(path).is_absolute())


def _find_path(text: str, paths: list[str]) -> str | None:
    """A folder of the user that the text names, or any other path in it that is there on this machine."""
    if found := next((path for path in paths if path in text), None):
        return found
    named = (match[0] for match in _PATHS.finditer(text))
    return next((path for path in named if not path.startswith(_SYSTEM_FOLDERS) and Path(path).exists()), None)


def _readable_part(name: str, source: Path | bytes) -> str:
    """The text of a file: all of a text file, and of safetensors the header, where names and metadata are."""
    if name.endswith(".safetensors"):
        return _safetensors_metadata(source)
    if not name.endswith(_TEXT_SUFFIXES):
        return ""
    data = source if isinstance(source, bytes) else source.read_bytes()
    return data.decode("utf-8", errors="replace").replace("\\/", "/")


def _safetensors_metadata(source: Path | bytes) -> str:
    if isinstance(source, bytes):
        head = source
    else:
        with source.open("rb") as file:
            head = file.read(8)
            head += file.read(struct.unpack("<Q", head)[0])
    size = struct.unpack("<Q", head[:8])[0]
    return json.dumps(json.loads(head[8 : 8 + size]).get("__metadata__", {})).replace("\\/", "/")
