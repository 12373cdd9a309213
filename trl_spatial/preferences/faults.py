"""What can be wrong with a preference dataset, and where."""

from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
from PIL import Image as PILImage


# Kind of finding → its severity and its heading in the report. An error makes the dataset unfit for training.
KINDS: dict[str, tuple[str, str]] = {
    "missing_column": ("error", "required columns that are missing"),
    "wrong_type": ("error", "columns of the wrong type"),
    "empty_split": ("error", "splits without rows"),
    "bad_prompt": ("error", "prompts that are missing or cannot be used"),
    "bad_margin": ("error", "margins that are not finite numbers"),
    "too_long": ("error", "rows with too many tokens"),
    "bad_image": ("error", "images that are missing or damaged"),
    "same_images": ("error", "pairs of the same image"),
    "same_prompts": ("error", "perturbed prompts that equal the prompt"),
    "wrong_level": ("error", "levels that are not the number of operations"),
    "no_relations": ("error", "empty lists of relations"),
    "shared_image": ("error", "images that are in two splits"),
    "duplicate_row": ("warning", "rows that occur twice"),
    "shared_prompt": ("warning", "prompts that are in two splits"),
    "absent_column": ("note", "optional columns that are missing"),
    "unknown_column": ("note", "columns that are not checked"),
}


@dataclass(frozen=True)
class Place:
    """A place in a dataset: all of a split, a row, counted from 0, or a column of it."""

    split: str
    row: int | None = None
    column: str | None = None

    def __str__(self) -> str:
        parts = [self.split]
        if self.row is not None:
            parts.append(f"row {self.row}")
        if self.column is not None:
            parts.append(f"`{self.column}`")
        return ", ".join(parts)


@dataclass(frozen=True)
class Finding:
    """
    One thing that is wrong, or worth knowing: its kind, a key of `KINDS`; where it is; what is there, shortened; what is wrong with it,
    as a sentence whose subject is the value; and the other place, of what is in two.
    """

    kind: str
    place: Place
    value: str
    reason: str
    other: Place | None = None

    @property
    def severity(self) -> str:
        """`"error"`, `"warning"` or `"note"`."""
        return KINDS[self.kind][0]

    def __str__(self) -> str:
        return f"{self.place}: {self.value} {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        """The finding as a flat mapping for JSON."""
        flat = {"kind": self.kind, **asdict(self.place), "value": self.value, "reason": self.reason}
        other = asdict(self.other) if self.other is not None else {}
        return flat | {f"other_{name}": value for name, value in other.items()}


def shorten(value: Any) -> str:
    """A value as a message shows it: bytes by their number, images by their size or name, long texts by both ends."""
    if isinstance(value, dict) and value and {"bytes", "path"} >= set(value):
        value = value.get("path") or value.get("bytes")
    elif isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {shorten(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (bytes, bytearray, pa.Buffer)):
        return f"<{len(value)} bytes>"
    if isinstance(value, PILImage.Image):
        return f"<image of {value.width}x{value.height} pixels>"
    return clip(repr(value), 99)


def clip(text: str, length: int) -> str:
    """A text of at most `length` characters, the middle left out."""
    half = (length - 3) // 2
    return text if len(text) <= length else f"{text[:half]}...{text[-half:]}"
