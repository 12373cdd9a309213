"""Names of datasets and models: local paths, and repositories on the Hub."""

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from huggingface_hub import constants, get_token, whoami
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import logging

from .errors import HubError, call_with_retries, is_connection_error, status_of


logger = logging.get_logger(__name__)

NAMESPACE_VARIABLE = "TRL_SPATIAL_NAMESPACE"
OWN_NAMESPACE = "hub"  # `hub/NAME` is NAME under the user's namespace
SHIPPED_MODELS = Path(__file__).parents[1] / "tiny_models"
FORMS = "a local path, ORG/NAME or ORG/NAME@REVISION on the Hub, or hub/NAME for NAME under your own namespace"
_PART = r"[A-Za-z0-9_-][\w.-]*"
_REFERENCE = re.compile(rf"(?P<namespace>{_PART})/(?P<name>{_PART})(?:@(?P<revision>\S+))?")
_NAMESPACE_HELP = (
    f"`hub/NAME` stands for NAME under your namespace on the Hub. Set it with --namespace ORG or "
    f"{NAMESPACE_VARIABLE}=ORG in the environment, log in with `hf auth login`, or write ORG/NAME."
)


class UnknownReferenceError(ValueError, FileNotFoundError):
    """A name is neither an existing path nor a valid name on the Hub."""


@dataclass(frozen=True)
class Reference:
    """
    The place of a dataset or a model.

    Args:
        name (`str`):
            Absolute local path, or the id of a repository, `"org/name"`.
        revision (`str`, *optional*):
            Branch, tag or commit of the repository.
        is_local (`bool`):
            Whether it is a local path.
    """

    name: str
    revision: str | None
    is_local: bool

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


def find_reference(name: str | Path, *, kind: str, revision: str | None = None) -> Reference:
    """
    Resolves the name of a dataset or a model. An existing file or folder takes precedence over a repository of that name,
    and needs no network. A model that ships with this package is found wherever the package is installed: an adapter that was
    trained on it records the path of another installation, `.../trl_spatial/tiny_models/NAME`.

    Args:
        name (`str` or `Path`):
            A local path, `org/name`, `org/name@revision`, or `hub/NAME`, which is NAME under the namespace of
            [`find_namespace`].
        kind (`str`):
            `"model"`, `"dataset"` or `"space"`.
        revision (`str`, *optional*):
            Branch, tag or commit, if it was given beside the name.

    Raises:
        [`UnknownReferenceError`]: If the name has none of these forms.
        `ValueError`: If two revisions were given.
        `HubError`: If `hub/NAME` is asked for and there is no namespace.
    """
    if str(name) and Path(name).exists():
        # absolute, because a model trained on this one records the path and may be loaded from another folder
        return Reference(str(Path(name).absolute()), None, is_local=True)
    shipped = SHIPPED_MODELS / Path(name).name
    if kind == "model" and Path(name).parts[-3:-1] == SHIPPED_MODELS.parts[-2:] and shipped.is_dir():
        logger.warning(f"{name} is not there. Using {shipped}, the model of this name in this installation.")
        return Reference(str(shipped), None, is_local=True)
    match = _REFERENCE.fullmatch(str(name))
    if match is None:
        raise UnknownReferenceError(
            f"There is no file or folder {str(name) or 'with an empty name'}. Name a {kind} by {FORMS}."
        )
    if revision is not None and match["revision"] not in (None, revision):
        raise ValueError(f"{name} asks for the revision {match['revision']!r}, but {revision!r} was given too.")
    return Reference(_repository_id(match, kind), match["revision"] or revision, is_local=False)


def find_repository(name: str, *, kind: str, token: str | None = None) -> str:
    """
    Returns the id of the repository to upload to, which `name` says as `org/name`, `hub/NAME`, or `NAME` alone, which means
    `hub/NAME`. `kind` is `"model"`, `"dataset"` or `"space"`; `token` says whose namespace `hub/` is, by default the logged-in
    user's.

    Raises:
        `ValueError`: If the name has none of these forms.
        `HubError`: If there is no namespace.
    """
    match = _REFERENCE.fullmatch(name if "/" in name else f"{OWN_NAMESPACE}/{name}")
    if match is None or match["revision"] is not None:
        raise ValueError(
            f"{name!r} is not the name of a repository. Write ORG/NAME, or hub/NAME for NAME under your own namespace; names "
            "consist of letters, digits, `-`, `_` and `.`."
        )
    return _repository_id(match, kind, token)


def _repository_id(match: re.Match, kind: str, token: str | None = None) -> str:
    namespace, name = match["namespace"], match["name"]
    return f"{find_namespace(name, kind=kind, token=token) if namespace == OWN_NAMESPACE else namespace}/{name}"


def find_namespace(name: str, *, kind: str, token: str | None = None) -> str:
    """
    Returns the namespace that `hub/` stands for: `TRL_SPATIAL_NAMESPACE`, which `--namespace` sets, or the user of the token.
    Without a connection it is the namespace under which the repository `name` is in the cache. If there is none, the message of
    the `HubError` says how to set it.
    """
    if namespace := os.environ.get(NAMESPACE_VARIABLE, "").strip():
        if not re.fullmatch(_PART, namespace):
            raise ValueError(f"The namespace {namespace!r} is not the name of a user or an organization on the Hub.")
        return namespace
    try:
        return _logged_in_user(token or get_token())
    except LocalTokenNotFoundError as error:
        raise HubError(f"You are not logged in, and no namespace is set. {_NAMESPACE_HELP}") from error
    except (HTTPError, ConnectionError) as error:
        if is_connection_error(error):
            return _cached_namespace(name, kind, error)
        if status_of(error) in (401, 403):
            raise HubError(f"The Hub does not know your token, and no namespace is set. {_NAMESPACE_HELP}") from error
        raise HubError(f"Asking the Hub for the logged-in user failed: {error}. {_NAMESPACE_HELP}") from error


@lru_cache
def _logged_in_user(token: str | None) -> str:
    if constants.is_offline_mode():
        raise ConnectionError("HF_HUB_OFFLINE is set")
    return call_with_retries(whoami, token=token, has_fallback=True)["name"]


def _cached_namespace(name: str, kind: str, error: Exception) -> str:
    prefix = f"{kind}s--"
    found = sorted(
        folder.name.removeprefix(prefix).removesuffix(f"--{name}")
        for folder in Path(constants.HF_HUB_CACHE).glob(f"{prefix}*--{name}")
        if any((folder / "snapshots").glob("*"))
    )
    if len(found) != 1:
        state = f"the cache has it from {', '.join(found)}" if found else "the cache has nothing of that name"
        raise HubError(
            f"The Hub cannot be reached for the name of the logged-in user ({error}), and {state}. {_NAMESPACE_HELP}"
        ) from error
    logger.warning(f"The Hub cannot be reached. hub/{name} is read as {found[0]}/{name}, which is in the cache.")
    return found[0]
