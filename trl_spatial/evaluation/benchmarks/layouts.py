"""Official layouts with a folder for each model."""

from collections.abc import Collection, Sequence
from pathlib import PurePosixPath


_OURS = "model"  # the folder in which images are drawn


def find_model(files: Sequence[str], kinds: Collection[str]) -> str:
    """
    Returns the name of the model in a layout `KIND/MODEL/…`.

    Args:
        files (`Sequence[str]`):
            The existing files.
        kinds (`Collection[str]`):
            The folders of the first level.

    Raises:
        `ValueError`: If there are several.
    """
    paths = [PurePosixPath(file).parts for file in files]
    models = sorted({parts[1] for parts in paths if len(parts) > 2 and parts[0] in kinds})
    if len(models) > 1:
        raise ValueError(
            f"The folder has images from several models: {', '.join(models)}. Copy those of one model into a separate folder."
        )
    return models[0] if models else _OURS
