"""How `push` recognizes the folder of a dataset. Its rows are uploaded as Parquet; its files are not."""

from ..hub.checkpoints import Kind


# Written by `trl_spatial data export` beside the rows: a section of the card, and configurations of the same rows.
NOTES_FILE = "notes.md"
FURTHER_CONFIGURATIONS = ("text", "preview")

DATASET = Kind(
    "a dataset",
    "dataset",
    lambda folder: (
        any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))
        or any(folder.glob("*.parquet"))
        or any(folder.glob("data/*.parquet"))
    ),
)
