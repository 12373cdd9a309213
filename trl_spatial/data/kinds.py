"""How a folder with a dataset is recognized. Its rows are uploaded as Parquet, and none of its files."""

from ..hub.checkpoints import Kind


# What `trl_spatial data export` writes beside the rows: a part of the card, and configurations of the same rows.
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
