"""The Hugging Face Hub: names of repositories, safe downloads, uploads and cards."""

from .cards import Card, Result, card_template
from .checkpoints import Kind, collect_files, find_kind
from .errors import HubError, explain_errors
from .references import Reference, find_reference
from .safety import UnsafeRepositoryError, check_repository
from .upload import push_files


__all__ = [
    "Card",
    "HubError",
    "Kind",
    "Reference",
    "Result",
    "UnsafeRepositoryError",
    "card_template",
    "check_repository",
    "collect_files",
    "explain_errors",
    "find_kind",
    "find_reference",
    "push_files",
]
