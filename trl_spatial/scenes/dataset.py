"""Datasets of scenes: pairs of rendered images that differ in one to three relations, and prompts without images."""

import hashlib
import itertools
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, List, Value

from .graph import COLORS, SPLITS, Relation, SceneGraph
from .layout import place_together
from .perturbation import Operation, perturb, sample_graph
from .relations import RELATIONS
from .rendering import MIN_IMAGE_SIZE, draw_layouts, sample_style
from .shapes import SHAPES
from .wording import LENGTHS, describe_scene


# Generator named in the rows. It has no version, so that the same seed gives the same data.
GENERATOR = "trl_spatial.scenes"

_RELATION = {"relation": Value("string"), "arguments": List(Value("string"))}
FEATURES = Features(
    {
        "prompt": Value("string"),
        "chosen": Image(),
        "rejected": Image(),
        "perturbed_prompt": Value("string"),
        "level": Value("int32"),
        "operations": List({"operation": Value("string"), "before": _RELATION, "after": _RELATION}),
        "relations": List(_RELATION),
        "scene": Value("string"),
        "generator": Value("string"),
        "seed": Value("int64"),
    }
)


def make_preference_dataset(
    num_pairs: int,
    *,
    split: str = "train",
    seed: int = 0,
    levels: Sequence[int] = (1, 2, 3),
    num_objects: tuple[int, int] = (2, 4),
    num_relations: tuple[int, int] = (1, 4),
    relations: Sequence[str] = tuple(RELATIONS),
    length: str | None = None,
    image_size: int = 64,
    both_directions: bool = False,
    num_proc: int | None = None,
) -> Dataset:
    """
    Make pairs of rendered scenes: the chosen image shows what the prompt says, in the rejected one some relations are
    changed. Both share sizes, shades and background. Which of the two graphs of a pair is the prompt's is a coin flip, so
    that neither an image nor a text alone shows which one wins.

    Args:
        num_pairs (`int`):
            Number of pairs.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"`, `"validation"` or `"test"`. No set of colored shapes is in two splits.
        seed (`int`, *optional*, defaults to `0`):
            Seed. Pair `i` depends on the seed, the split and `i` only, not on the number of processes.
        levels (`Sequence[int]`, *optional*, defaults to `(1, 2, 3)`):
            Numbers of changed relations, each equally often.
        num_objects (`tuple[int, int]`, *optional*, defaults to `(2, 4)`):
            Least and largest number of objects.
        num_relations (`tuple[int, int]`, *optional*, defaults to `(1, 4)`):
            Least and largest number of relations in the prompt.
        relations (`Sequence[str]`, *optional*):
            Kinds of relations. Defaults to all of `RELATIONS`.
        length (`str`, *optional*):
            `"short"` or `"long"` prompts. By default one in two is long.
        image_size (`int`, *optional*, defaults to `64`):
            Width and height of the images, in pixels.
        both_directions (`bool`, *optional*, defaults to `False`):
            Whether every pair is given twice: also with the perturbed prompt and the images exchanged. The result has
            `2 * num_pairs` rows then.
        num_proc (`int`, *optional*):
            Number of processes.

    Returns:
        `Dataset` with the columns:

        - `prompt` (`str`) and `perturbed_prompt` (`str`): what the chosen and what the rejected image shows.
        - `chosen` and `rejected` ([`~datasets.Image`]): PNG images of `image_size` by `image_size` pixels, in RGB.
        - `level` (`int`): number of changed relations.
        - `operations` (`list[dict]` of length `level`): each change, as `operation`, and `before` and `after` as `relation`
          and `arguments`. [`describe_changes`] puts them into words.
        - `relations` (`list[dict]`): the relations of the prompt, as `relation` and `arguments`.
        - `scene` (`str`): what the chosen image shows, in short sentences, even if the prompt is long:
          [`parse_description`] makes the scene's graph of it, and [`~trl_spatial.rewards.SceneRules`] reads it.
        - `generator` (`str`): what drew the images, here always `"trl_spatial.scenes"`.
        - `seed` (`int`): seed of the pair.
    """
    _check_arguments(num_pairs, split, levels, num_objects, num_relations, relations, length, image_size)
    options = {
        "split": split,
        "levels": tuple(levels),
        "num_objects": tuple(num_objects),
        "num_relations": tuple(num_relations),
        "relations": tuple(relations),
        "length": length,
        "image_size": image_size,
        "both_directions": both_directions,
    }
    num_shards = max(num_proc or 1, 1)
    shards = [part.tolist() for part in np.array_split(np.arange(num_pairs), num_shards) if len(part)]
    return Dataset.from_generator(
        _generate_pairs,
        features=FEATURES,
        # these arguments are the key of datasets' cache: another version of the world must not find the old pairs
        gen_kwargs={"shards": shards, "seed": seed, "options": options | {"world": _fingerprint()}},
        num_proc=len(shards) if len(shards) > 1 else None,
        split=split,
    )


def make_prompt_dataset(
    num_prompts: int,
    *,
    split: str = "train",
    seed: int = 0,
    num_objects: tuple[int, int] = (2, 4),
    num_relations: tuple[int, int] = (1, 4),
    relations: Sequence[str] = tuple(RELATIONS),
    colors: Sequence[str] = tuple(COLORS),
    shapes: Sequence[str] = SHAPES,
    length: str | None = None,
) -> Dataset:
    """
    Make prompts of scenes, for training a text-to-image model with [`~trl_spatial.rewards.SceneRules`].

    Args:
        num_prompts (`int`):
            Number of prompts.
        split (`str`, *optional*, defaults to `"train"`):
            `"train"`, `"validation"` or `"test"`. No set of colored shapes is in two splits.
        seed (`int`, *optional*, defaults to `0`):
            Seed. Prompt `i` depends on the seed, the split, `i` and the options below only.
        num_objects (`tuple[int, int]`, *optional*, defaults to `(2, 4)`):
            Least and largest number of objects.
        num_relations (`tuple[int, int]`, *optional*, defaults to `(1, 4)`):
            Least and largest number of relations.
        relations (`Sequence[str]`, *optional*):
            Kinds of relations. Defaults to all of `RELATIONS`.
        colors (`Sequence[str]`, *optional*), shapes (`Sequence[str]`, *optional*):
            Colors and shapes of the objects. Default to all of `COLORS` and `SHAPES`.
        length (`str`, *optional*):
            `"short"` or `"long"` prompts. By default one in two is long.

    Returns:
        `Dataset` with the columns `prompt` and `scene`, which says in short sentences what the prompt may say in long
        ones: [`parse_description`] makes the scene's graph of it.
    """
    if num_prompts < 1:
        raise ValueError(f"num_prompts={num_prompts} must be at least 1.")
    _check_scenes(split, num_objects, num_relations, relations, length)
    for name, given, known in (("colors", colors, COLORS), ("shapes", shapes, SHAPES)):
        if not given or not set(given) <= set(known):
            raise ValueError(f"{name}={given!r} must be some of {list(known)}.")
    if len(colors) < num_objects[1]:
        raise ValueError(f"colors={colors!r} are too few for num_objects={num_objects}: no two objects share a color.")
    world = {"split": split, "relations": relations, "colors": tuple(colors), "shapes": tuple(shapes)}
    prompts = (
        _make_prompt([seed, list(SPLITS).index(split), index], num_objects, num_relations, length, world)
        for index in range(num_prompts)
    )
    return Dataset.from_list(list(prompts), split=split)


def _make_prompt(seed: list[int], num_objects, num_relations, length, world: dict[str, Any]) -> dict[str, str]:
    rng = np.random.default_rng(seed)
    for _ in range(100):
        objects, count = _draw_sizes(rng, num_objects, num_relations)
        try:
            graph = sample_graph(rng, num_objects=objects, num_relations=count, **world)
        except ValueError:
            continue  # this draw has no consistent graph; the next one may
        wording, drawn = int(rng.integers(2**31)), LENGTHS[rng.integers(2)]
        return {
            "prompt": describe_scene(graph, seed=wording, length=length or drawn),
            "scene": describe_scene(graph, seed=wording),
        }
    raise ValueError(
        f"No scene with {num_objects} objects, {num_relations} relations and {world} was found. Allow "
        "more objects, fewer relations or more kinds."
    )


def _check_arguments(num_pairs, split, levels, num_objects, num_relations, relations, length, image_size) -> None:
    if num_pairs < 1:
        raise ValueError(f"num_pairs={num_pairs} must be at least 1.")
    _check_scenes(split, num_objects, num_relations, relations, length)
    if image_size < MIN_IMAGE_SIZE:
        raise ValueError(f"image_size={image_size} is too small to show shapes; use at least {MIN_IMAGE_SIZE}.")
    if not levels or not all(1 <= level <= num_relations[1] for level in levels):
        raise ValueError(
            f"levels={tuple(levels)} must be between 1 and the largest num_relations, {num_relations[1]}."
        )


def _check_scenes(split, num_objects, num_relations, relations, length) -> None:
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {list(SPLITS)}.")
    if length is not None and length not in LENGTHS:
        raise ValueError(f"length={length!r} must be one of {LENGTHS}, or None for a mixture.")
    if unknown := [name for name in relations if name not in RELATIONS]:
        raise ValueError(f"relations has unknown kinds {unknown}; choose from {list(RELATIONS)}.")
    if not relations:
        raise ValueError(f"relations={relations!r} is empty; choose from {list(RELATIONS)}.")
    if not 2 <= num_objects[0] <= num_objects[1]:
        raise ValueError(f"num_objects={num_objects} must be a range (least, largest) with at least 2 objects.")
    pairs = num_objects[1] * (num_objects[1] - 1) // 2
    if not 1 <= num_relations[0] <= num_relations[1] <= pairs + num_objects[1]:
        raise ValueError(
            f"num_relations={num_relations} must be a range (least, largest); {num_objects[1]} objects have at most "
            f"{pairs} pairs and {num_objects[1]} places."
        )


@cache
def _fingerprint() -> str:
    """Hash the source code that pairs depend on."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _generate_pairs(shards: list[list[int]], seed: int, options: dict) -> Iterator[dict]:
    options = {name: value for name, value in options.items() if name != "world"}
    for index in itertools.chain.from_iterable(shards):
        yield from _make_pair(index, seed, **options)


def _make_pair(
    index, seed, *, split, levels, num_objects, num_relations, relations, length, image_size, both_directions
) -> list[dict]:
    """Make the rows of one pair: one row, or two with `both_directions`."""
    pair_seed = int(np.random.SeedSequence([seed, list(SPLITS).index(split), index]).generate_state(1, np.uint32)[0])
    rng = np.random.default_rng(pair_seed)
    level = levels[rng.integers(len(levels))]
    graphs, layouts, operations = _sample_pair(rng, level, num_objects, num_relations, relations, split)
    if rng.random() < 0.5:
        graphs, layouts, operations = graphs[::-1], layouts[::-1], _reverse(operations)
    style = sample_style(graphs[0].entities, rng)
    images = [{"bytes": _encode_png(pixels), "path": None} for pixels in draw_layouts(layouts, style, image_size)]
    wording, chosen_length = int(rng.integers(2**31)), length or LENGTHS[rng.integers(2)]
    texts = [describe_scene(graph, seed=wording, length=chosen_length) for graph in graphs]
    rows = [_row(texts, images, graphs[0], wording, level, operations, pair_seed)]
    if both_directions:
        rows.append(_row(texts[::-1], images[::-1], graphs[1], wording, level, _reverse(operations), pair_seed))
    return rows


def _reverse(operations: list[Operation]) -> list[Operation]:
    return [Operation(o.operation, o.after, o.before) for o in operations]


def _sample_pair(rng, level, num_objects, num_relations, relations, split):
    """Draw a graph and its perturbation; return both, a layout of each, and the operations."""
    for _ in range(100):
        objects, count = _draw_sizes(rng, num_objects, (max(num_relations[0], level), num_relations[1]))
        try:
            graph = sample_graph(rng, num_objects=objects, num_relations=count, relations=relations, split=split)
            perturbed, operations = perturb(graph, rng, level)
            return [graph, perturbed], place_together([graph, perturbed], rng), operations
        except ValueError:
            continue  # this draw has no consistent graph, valid change or layout; the next one may
    raise ValueError(
        f"No pair with {level} changes, {num_objects} objects and {num_relations} relations of kinds {list(relations)} "
        "was found. Allow more objects, fewer relations or more kinds."
    )


def _draw_sizes(
    rng: np.random.Generator, num_objects: tuple[int, int], num_relations: tuple[int, int]
) -> tuple[int, int]:
    """Draw the numbers of objects and relations, if possible with a different pair of objects for each relation."""
    count = int(rng.integers(num_relations[0], num_relations[1] + 1))
    least = next(n for n in itertools.count(num_objects[0]) if n * (n - 1) // 2 >= count or n == num_objects[1])
    return int(rng.integers(least, num_objects[1] + 1)), count


def _encode_png(pixels: np.ndarray) -> bytes:
    """
    Encode an array `(height, width, 3)`, uint8, as a PNG file without filters. Pillow would choose a filter for each
    row of pixels, which takes as long as the compression and, for flat shapes and noise that is the same in all
    channels, makes the file larger.
    """
    height, width, _ = pixels.shape
    lines = np.empty((height, 1 + 3 * width), np.uint8)
    lines[:, 0] = 0  # no filter
    lines[:, 1:] = pixels.reshape(height, -1)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),  # 8 bits of red, green and blue
        (b"IDAT", zlib.compress(lines.data, level=1)),
        (b"IEND", b""),
    )
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _row(
    texts, images, graph: SceneGraph, wording: int, level: int, operations: list[Operation], seed: int
) -> dict[str, Any]:
    return {
        "prompt": texts[0],
        "chosen": images[0],
        "rejected": images[1],
        "perturbed_prompt": texts[1],
        "level": level,
        "operations": [
            {"operation": o.operation, "before": _relation_row(o.before), "after": _relation_row(o.after)}
            for o in operations
        ],
        "relations": [_relation_row(relation) for relation in graph.relations],
        "scene": describe_scene(graph, seed=wording),
        "generator": GENERATOR,
        "seed": seed,
    }


def _relation_row(relation: Relation) -> dict:
    arguments = [str(entity) for entity in relation.arguments] + ([relation.region] if relation.region else [])
    return {"relation": relation.name, "arguments": arguments}


def describe_changes(operations: Sequence[Mapping[str, Any]]) -> str:
    """
    Puts the changes between the two images of a pair into words.

    Args:
        operations (`Sequence[Mapping[str, Any]]`):
            Value of the column `operations`. Older datasets hold `before` and `after` as strings, which are taken too.

    Returns:
        `str`: For example `"left_of(red circle, blue square) to right_of(red circle, blue square)"`.
    """
    return "; ".join(f"{_text(operation['before'])} to {_text(operation['after'])}" for operation in operations)


def _text(relation: Mapping[str, Any] | str) -> str:
    return relation if isinstance(relation, str) else f"{relation['relation']}({', '.join(relation['arguments'])})"
