"""A good preference dataset, and copies of it in which something is wrong."""

from io import BytesIO

import pytest
from datasets import Dataset, DatasetDict, Image

from trl_spatial.scenes import make_preference_dataset


@pytest.fixture(scope="session")
def good():
    """Train and test pairs that have no fault; more rows than are read at a time."""
    splits = {"train": 40, "test": 10}
    return DatasetDict({name: make_preference_dataset(n, split=name, image_size=32) for name, n in splits.items()})


@pytest.fixture(scope="session")
def rows_of():
    """Function that gives the rows of a split, images as files."""

    def read(dataset):
        for column in ("chosen", "rejected"):
            dataset = dataset.cast_column(column, Image(decode=False))
        return dataset.to_list()

    return read


@pytest.fixture(scope="session")
def plant(rows_of):
    """Function that gives a copy of a dataset in which one row of a split has other values."""

    def change(splits, split, row, **values):
        rows = rows_of(splits[split])
        rows[row] |= values
        return DatasetDict(splits | {split: Dataset.from_list(rows, features=splits[split].features)})

    return change


@pytest.fixture(scope="session")
def encode():
    """Function that gives a picture as a column of images holds it, in a file of the given format."""

    def write(image, format="PNG", **options):
        file = BytesIO()
        image.save(file, format, **options)
        return {"bytes": file.getvalue(), "path": None}

    return write
