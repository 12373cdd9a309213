"""The columns of a preference dataset and the types they may have."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Image, LargeList, List, Value

from .faults import Finding, Place


IMAGE_COLUMNS = ("chosen", "rejected")
PROMPT_COLUMNS = ("prompt", "perturbed_prompt")


@dataclass(frozen=True)
class Column:
    """
    One column of a preference dataset: what it holds, in words; whether a feature of a [`~datasets.Dataset`] can hold that; what its
    values are for; whether it must be there, and whether its absence is worth a note.
    """

    name: str
    holds: str
    accepts: Callable[[Any], bool]
    purpose: str
    is_required: bool = False
    is_usual: bool = True


def _dtype(feature: Any) -> str:
    return feature.dtype if isinstance(feature, Value) else ""


def _is_text(feature: Any) -> bool:
    return _dtype(feature) in ("string", "large_string")


def _is_integer(feature: Any) -> bool:
    return _dtype(feature).startswith(("int", "uint"))


def _is_number(feature: Any) -> bool:
    return _dtype(feature).startswith(("int", "uint", "float"))


def _is_image(feature: Any) -> bool:
    is_file = isinstance(feature, dict) and bool(feature) and {"bytes", "path"}.issuperset(feature)
    return isinstance(feature, Image) or is_file or _is_text(feature) or _dtype(feature) in ("binary", "large_binary")


def _is_list_of(key: str) -> Callable[[Any], bool]:
    def accepts(feature: Any) -> bool:
        if isinstance(feature, (List, LargeList)):
            item = feature.feature
            # if the list is empty in every row, its items have type null
            return _is_text(item) or _dtype(item) == "null" or (isinstance(item, dict) and key in item)
        # datasets before 4.0 wrote a list of mappings as a mapping of lists
        return isinstance(feature, dict) and isinstance(feature.get(key), (List, LargeList))

    return accepts


_IMAGES = "images (`Image`, paths, bytes or {'bytes', 'path'} mappings)"
_COLUMNS = (
    Column("prompt", "strings", _is_text, "what the images were made from", is_required=True),
    Column("chosen", _IMAGES, _is_image, "the preferred image", is_required=True),
    Column("rejected", _IMAGES, _is_image, "the other image", is_required=True),
    Column("perturbed_prompt", "strings", _is_text, "the prompt that the rejected image shows, for the reverse pair"),
    Column("margin", "numbers", _is_number, "by how much the chosen image is better", is_usual=False),
    Column("level", "integers", _is_integer, "the number of changed relations; accuracy is reported for each"),
    Column(
        "operations",
        "lists of {'operation', 'before', 'after'}, the last two as `relations`",
        _is_list_of("operation"),
        "what was changed",
    ),
    Column("relations", "lists of {'relation', 'arguments'}", _is_list_of("relation"), "what the prompt asks for"),
    Column("scene", "strings", _is_text, "the scene that the chosen image shows"),
    Column("generator", "strings", _is_text, "what drew the images"),
    Column("seed", "integers", _is_integer, "the seed that makes the same pair again"),
)
COLUMNS = {column.name: column for column in _COLUMNS}


def check_columns(features: Mapping[str, Any], split: str) -> tuple[list[str], list[Finding]]:
    """
    Compares the columns of a split with those of a preference dataset. A type of `None` is unknown, and not checked.

    Returns:
        `tuple[list[str], list[Finding]]`: the columns that are there and of the right type, in the order of `COLUMNS`,
        and an error for each required column that is missing and each column of a wrong type, a note for each optional
        column that is not there (or null in every row) and each column that is none of these.
    """
    usable, findings = [], []
    for column in COLUMNS.values():
        feature = features.get(column.name)
        is_absent = column.name not in features or (_dtype(feature) == "null" and not column.is_required)
        if is_absent:
            if column.is_required or column.is_usual:
                findings.append(_absent_column(column.name, split, features))
        elif feature is None or column.accepts(feature):
            usable.append(column.name)
        else:
            reason = f"holds {feature}, not {column.holds}. Convert it with `dataset.map` or `dataset.cast_column`."
            findings.append(Finding("wrong_type", Place(split, column=column.name), "the column", reason))
    for name in features:
        if name not in COLUMNS:
            reason = "is not a column of preference datasets; it is not checked."
            findings.append(Finding("unknown_column", Place(split, column=name), "the column", reason))
    return usable, findings


def pick_columns(features: Mapping[str, Any], use_reverse_pairs: bool | None, split: str) -> list[str]:
    """
    The columns that training uses, of those that are there: `perturbed_prompt` unless `use_reverse_pairs` is false.

    Raises:
        `ValueError`: If a needed column is missing or one that is used is of a wrong type.
    """
    used = ["prompt", *IMAGE_COLUMNS, "margin"] + (["perturbed_prompt"] if use_reverse_pairs is not False else [])
    usable, findings = check_columns(features, split)
    if use_reverse_pairs and "perturbed_prompt" not in usable:
        findings.append(_absent_column("perturbed_prompt", split, features, is_required=True))
    for finding in findings:
        if finding.severity == "error" and finding.place.column in used:
            raise ValueError(str(finding))
    return [column for column in used if column in usable]


def _absent_column(name: str, split: str, features: Mapping[str, Any], *, is_required: bool = False) -> Finding:
    """Returns the finding for a missing column: an error if it is required, otherwise a note."""
    column, place = COLUMNS[name], Place(split, column=name)
    if not column.is_required and not is_required:
        return Finding("absent_column", place, "the column", f"is not there; {column.purpose}.")
    reason = (
        f"is missing: it must hold {column.holds}, {column.purpose}. There are {', '.join(features)}; rename yours with "
        f"`dataset.rename_column(..., {name!r})`"
        + (", or set `use_reverse_pairs` to False." if name == "perturbed_prompt" else ".")
    )
    return Finding("missing_column", place, "the column", reason)
