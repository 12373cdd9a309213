"""The columns of a preference dataset and the types they may have."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Features, Image, LargeList, List, Value

from .faults import Finding, Place


IMAGE_COLUMNS = ("chosen", "rejected")
PROMPT_COLUMNS = ("prompt", "perturbed_prompt")


@dataclass(frozen=True)
class Column:
    """
    One column of a preference dataset.

    Args:
        name (`str`):
            Its name.
        holds (`str`):
            What it holds, in words.
        accepts (`Callable[[Any], bool]`):
            Whether a feature of a [`~datasets.Dataset`] can hold that.
        purpose (`str`):
            What it is good for.
        is_required (`bool`, *optional*, defaults to `False`):
            Whether a preference dataset must have it.
    """

    name: str
    holds: str
    accepts: Callable[[Any], bool]
    purpose: str
    is_required: bool = False


def _dtype(feature: Any) -> str:
    return feature.dtype if isinstance(feature, Value) else ""


def _is_text(feature: Any) -> bool:
    return _dtype(feature) in ("string", "large_string")


def _is_integer(feature: Any) -> bool:
    return _dtype(feature).startswith(("int", "uint"))


def _is_image(feature: Any) -> bool:
    is_file = isinstance(feature, dict) and bool(feature) and {"bytes", "path"}.issuperset(feature)
    return isinstance(feature, Image) or is_file or _is_text(feature) or _dtype(feature) in ("binary", "large_binary")


def _is_list_of(key: str) -> Callable[[Any], bool]:
    def accepts(feature: Any) -> bool:
        if isinstance(feature, (List, LargeList)):
            item = feature.feature
            # a list that is empty in every row has items of type null
            return _is_text(item) or _dtype(item) == "null" or (isinstance(item, dict) and key in item)
        # datasets before 4.0 wrote a list of mappings as a mapping of lists
        return isinstance(feature, dict) and isinstance(feature.get(key), (List, LargeList))

    return accepts


_IMAGES = "images (`Image`, paths, bytes or {'bytes', 'path'} mappings)"
_COLUMNS = (
    Column("prompt", "strings", _is_text, "what the images were made from", is_required=True),
    Column("chosen", _IMAGES, _is_image, "the preferred image", is_required=True),
    Column("rejected", _IMAGES, _is_image, "the other image", is_required=True),
    Column("perturbed_prompt", "strings", _is_text, "it gives every pair's reverse pair"),
    Column("level", "integers", _is_integer, "it tells accuracies apart by the number of changed relations"),
    Column(
        "operations",
        "lists of {'operation', 'before', 'after'}",
        _is_list_of("operation"),
        "it tells what was changed",
    ),
    Column(
        "relations", "lists of {'relation', 'arguments'}", _is_list_of("relation"), "it tells what the prompt asks for"
    ),
    Column("scene", "strings", _is_text, "it tells what scene the chosen image shows"),
    Column("generator", "strings", _is_text, "it tells what drew the images"),
    Column("seed", "integers", _is_integer, "it tells from which seed the pair can be made again"),
)
COLUMNS = {column.name: column for column in _COLUMNS}


def check_columns(features: Features, split: str) -> tuple[list[str], list[Finding]]:
    """
    Compare the columns of a split with those of a preference dataset.

    Args:
        features ([`~datasets.Features`]):
            Columns of the split and their types.
        split (`str`):
            Name of the split.

    Returns:
        `tuple[list[str], list[Finding]]`: the columns that are there and of the right type, in the order of `COLUMNS`,
        and an error for each required column that is missing and each column of a wrong type, a note for each optional
        column that is not there (or null in every row) and each column that is none of these.
    """
    usable, findings = [], []
    for column in COLUMNS.values():
        feature = features.get(column.name)
        is_absent = feature is None or (_dtype(feature) == "null" and not column.is_required)
        if not is_absent and column.accepts(feature):
            usable.append(column.name)
        else:
            findings.append(_absent(column, split, features) if is_absent else _wrong(column, split, feature))
    for name in features:
        if name not in COLUMNS:
            reason = "is not a column of preference datasets; it is not checked."
            findings.append(Finding("unknown_column", Place(split, column=name), "the column", reason))
    return usable, findings


def _absent(column: Column, split: str, features: Features) -> Finding:
    place = Place(split, column=column.name)
    if not column.is_required:
        return Finding("absent_column", place, "the column", f"is not there; {column.purpose}.")
    reason = (
        f"is missing: it must hold {column.holds}, {column.purpose}. There are {', '.join(features)}; rename yours with "
        f"`dataset.rename_column(..., {column.name!r})`."
    )
    return Finding("missing_column", place, "the column", reason)


def _wrong(column: Column, split: str, feature: Any) -> Finding:
    reason = f"holds {feature}, not {column.holds}. Convert it with `dataset.map` or `dataset.cast_column`."
    return Finding("wrong_type", Place(split, column=column.name), "the column", reason)
