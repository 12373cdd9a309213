"""The scene checker as an exact reward, for the flat world of colored shapes."""

from functools import lru_cache
from typing import Any

from ..judges.scenes import check_image, share_shown
from ..scenes import SceneGraph, parse_description


class SceneRules:
    """
    Rewards an image of a scene by [`~judges.scenes.share_shown`], the share of the prompt's relations that its pixels show.

    Example:

    ```python
    >>> SceneRules()(["A red circle is left of a blue square."], [image])
    [1.0]
    ```
    """

    def __init__(self) -> None:
        self.__name__ = "rules"  # the name in the trainers' logs

    def __call__(
        self, prompts: list[str], images: list[Any], scene: list[str | None] | None = None, **columns: Any
    ) -> list[float | None]:
        """
        Rewards images; the trainer calls this. Other columns of the dataset are ignored.

        Args:
            prompts (`list[str]`), images (`list`):
                One prompt per image, and the images, of at least 24 pixels, in any form that
                [`~preferences.images.load_image`] takes.
            scene (`list[str]`, *optional*):
                Column of the dataset: the scene of each prompt in the words of [`~scenes.describe_scene`], or `None`
                where there is none. Without this column, the prompts themselves are read.

        Returns:
            `list[float | None]`: One reward per image; `None` where the prompt has no scene or is not in these words.

        Raises:
            `ValueError`: If a value of the column `scene` cannot be read.
        """
        if scene is None:
            graphs = [_read_prompt(prompt) for prompt in prompts]
        else:
            graphs = [_read_scene(index, text) for index, text in enumerate(scene)]
        return [
            None if graph is None else share_shown(check_image(image, graph, row=index), graph)
            for index, (image, graph) in enumerate(zip(images, graphs, strict=True))
        ]


# Cached, because the images of a group share their prompt.
@lru_cache(maxsize=1024)
def _read_prompt(prompt: str) -> SceneGraph | None:
    try:
        graph = parse_description(prompt)
    except ValueError:
        return None
    return graph if graph.entities else None


def _read_scene(index: int, text: str | None) -> SceneGraph | None:
    if text is None:
        return None
    graph = _read_prompt(text)
    if graph is None:
        raise ValueError(
            f"scene[{index}] is {text!r}, which does not describe a scene. Write it as `describe_scene` does, one relation "
            "a sentence, or leave it `None`."
        )
    return graph
