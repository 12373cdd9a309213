"""Official layouts that have a folder for each model."""

from collections.abc import Collection, Sequence
from pathlib import PurePosixPath


_OURS = "model"  # where images are drawn


def find_model(files: Sequence[str], kinds: Collection[str]) -> str:
    """
    Name of the model in a layout `KIND/MODEL/…`.

    Args:
        files (`Sequence[str]`):
            The files that are there.
        kinds (`Collection[str]`):
            The folders of the first level.

    Raises:
        `ValueError`: If there are several.
    """
    paths = [PurePosixPath(file).parts for file in files]
    models = sorted({parts[1] for parts in paths if len(parts) > 2 and parts[0] in kinds})
    if len(models) > 1:
        raise ValueError(
            f"The folder of images has images of several models: {', '.join(models)}. Copy those of one into a folder of its own."
        )
    return models[0] if models else _OURS
