"""The Hugging Face Hub: names, safety checks, uploads and cards.

- A name is a local path, `ORG/NAME`, `ORG/NAME@REVISION`, or `hub/NAME` under the user's own namespace.
- Loading runs no code: weights are read from safetensors, and a repository with a pickle or a script is refused before
  anything is downloaded.
- An upload is one commit, all or nothing. It contains only the files of the model, and is refused if one of them holds
a
  local path or a token.
- A card is filled in from what a run recorded in `card.json`; what was not measured is left out.

`hub_cards/README.md` shows the commands.
"""

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
