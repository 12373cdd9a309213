"""Uploads in a single commit, so that an interruption leaves the repository unchanged."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from .errors import call_with_retries, explain_errors, status_of
from .safety import check_public


# Created by the Hub, or replaced by every upload.
_HUB_FILES = (".gitattributes", "README.md")


def create_repository(
    repo_id: str, *, repo_type: str = "model", private: bool | None = None, token: str | None = None
) -> str:
    """Creates a repository, unless it exists, and returns its address. `private` is whether a new one is visible to its owners only."""
    with explain_errors(f"Creating the {repo_type} repository {repo_id}"):
        url = call_with_retries(
            HfApi(token=token).create_repo,
            repo_id,
            repo_type=repo_type,
            private=private,
            exist_ok=True,
            space_sdk="gradio" if repo_type == "space" else None,
        )
    return str(url)


def push_files(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    repo_type: str = "model",
    message: str,
    path_in_repo: str = "",
    private: tuple[Path, ...] = (),
    replace: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> str:
    """
    Uploads files, a path or the content for each name in the repository, to an existing repository in a single commit, and returns
    its address. Files that an interrupted upload had finished are not sent again.

    Paths of the folders `private` must not be in the files, see [`~hub.safety.check_public`]. Other files in the repository are
    deleted if `replace` is true, an error if it is false, so that two models are not mixed, and kept if it is `None`.

    Raises:
        `ValueError`: If a file holds something private, or the repository has other files.
        `HubError`: If the Hub cannot be reached or refuses; the message says why.
    """
    check_public(files, private=private)
    api = HfApi(token=token)
    names = {f"{path_in_repo}/{name}" if path_in_repo else name: source for name, source in files.items()}
    with explain_errors(f"Uploading to {repo_id}"):
        others = [] if replace is None else _other_files(api, repo_id, repo_type, revision, set(names))
        if others and not replace:
            raise ValueError(
                f"{repo_id} has files that this upload does not have: {', '.join(others[:5])}"
                f"{f' and {len(others) - 5} more' if len(others) > 5 else ''}. Choose another name, or delete them in the "
                "same commit with --replace (the repository's history keeps them)."
            )

        def commit() -> str:
            # the client refuses operations that it has used before, so each try needs new ones
            operations: list[Any] = [
                CommitOperationAdd(name, source if isinstance(source, bytes) else str(source))
                for name, source in names.items()
            ]
            operations += [CommitOperationDelete(name) for name in others]
            info = api.create_commit(
                repo_id, operations, commit_message=message, repo_type=repo_type, revision=revision
            )
            return str(info.commit_url)

        return call_with_retries(commit)


def _other_files(api: HfApi, repo_id: str, repo_type: str, revision: str | None, names: set[str]) -> list[str]:
    try:
        there = call_with_retries(api.list_repo_files, repo_id, repo_type=repo_type, revision=revision)
    except HfHubHTTPError as error:
        if status_of(error) == 404:  # just created, no commit yet
            return []
        raise
    return [name for name in there if name not in names and name not in _HUB_FILES]
