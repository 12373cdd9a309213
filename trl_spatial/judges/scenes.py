"""Compares images with the scenes that they should show, by the rules of the scenes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..preferences.images import load_image
from ..scenes import SceneCheck, SceneGraph, Verdict, check_scene
from ..statistics import Interval, share_interval


def check_image(image: Any, graph: SceneGraph, *, row: int = 0) -> SceneCheck:
    """
    Compares an image, as a viewer sees it, with the scene it was asked to show. It is of at least 24 pixels, in any
    form that [`~preferences.images.load_image`] takes; `row` is its number in errors.
    """
    try:
        picture = load_image(image)
    except ValueError as error:
        raise ValueError(f"images[{row}] {error}.") from error
    return check_scene(picture, graph)


def check_images(images: Sequence[Any], graphs: Sequence[SceneGraph]) -> list[SceneCheck]:
    """[`check_image`] for each of several images and its graph."""
    if len(images) != len(graphs):
        raise ValueError(f"There are {len(images)} `images` and {len(graphs)} `graphs`. Give one graph per image.")
    return [check_image(image, graph, row=row) for row, (image, graph) in enumerate(zip(images, graphs, strict=True))]


def share_shown(check: SceneCheck, graph: SceneGraph) -> float:
    """
    Share of a scene's relations that an image satisfies, from 0 to 1; a relation of an object that is missing or
    duplicated is not satisfied. For a scene without relations, the share of the objects that occur exactly once.
    """
    if graph.relations:
        return sum(result.verdict == Verdict.SATISFIED for result in check.relations) / len(graph.relations)
    return 1.0 - (len(check.missing) + len(check.duplicated)) / len(graph.entities)


def has_objects(check: SceneCheck) -> bool:
    """Whether every named object is in the image exactly once, wherever it stands."""
    return not (check.missing or check.duplicated)


def summarize_checks(
    checks: Sequence[SceneCheck], clusters: Sequence | np.ndarray | None = None
) -> dict[str, Interval]:
    """
    Summarizes what the images of a generator show, with 95 % intervals: `"spatial_accuracy"`, the share of the images
    in which every named object occurs once and every relation holds; `"objects_present"`, the share in which the
    objects occur once, wherever they are; and, if there are such images, `"relations_correct"`, the share of these in
    which the relations hold.

    `clusters` are the prompts of the images, or their numbers, where several images share one: they succeed and fail
    together, so the intervals draw whole prompts. If not set, the images count as independent.
    """
    if not checks:
        raise ValueError("`checks` is empty: there is nothing to summarize.")
    correct = np.array([check.is_correct for check in checks])
    present = np.array([has_objects(check) for check in checks])
    keys = None if clusters is None else np.asarray(clusters)
    if keys is not None and keys.shape != correct.shape:
        raise ValueError(
            f"There are {len(checks)} `checks`, but `clusters` has shape {keys.shape}. Give one per check."
        )
    summary = {"spatial_accuracy": share_interval(correct, keys), "objects_present": share_interval(present, keys)}
    if present.any():
        summary["relations_correct"] = share_interval(correct[present], None if keys is None else keys[present])
    return summary


def pairwise_distance(images: Sequence[Any], group_size: int) -> float:
    """
    Diversity of a generator: root mean square difference of the pixels of two images of the same prompt, from 0 to 1,
    averaged over all pairs of different images of a prompt, and over the prompts. 0 if a prompt always gives the same
    image.

    The images are of one size, in any form that [`~preferences.images.load_image`] takes, `group_size` of each prompt,
    at least 2, next to each other.
    """
    if group_size < 2 or not images or len(images) % group_size:
        raise ValueError(
            f"{len(images)} images are no whole number of groups of group_size={group_size}: give at least 2 images of "
            "every prompt."
        )
    pixels = np.stack([np.asarray(load_image(image), np.float32) / 255 for image in images])
    groups = pixels.reshape(-1, group_size, pixels[0].size)  # (num_prompts, group_size, height * width * 3)
    squares = np.einsum("gid,gid->gi", groups, groups)
    products = np.einsum("gid,gjd->gij", groups, groups)
    distances = (squares[:, :, None] + squares[:, None, :] - 2 * products).clip(0) / groups.shape[2]
    rows, columns = np.triu_indices(group_size, k=1)
    return float(np.sqrt(distances[:, rows, columns]).mean())
