"""The recipe of a preference dataset: loads and checks the YAML file."""

import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError

from ...endpoints import Prices
from ...generation.painters import check_spec
from ...scenes import RELATIONS
from ...yaml_text import load_yaml


DIMENSIONS = tuple(dict.fromkeys(kind.dimension for kind in RELATIONS.values()))
# Prompts in the paper's dataset, by number of relations and by scene.
NUM_RELATIONS = {
    3: 503, 4: 3348, 5: 10572, 6: 15572, 7: 19054, 8: 13829, 9: 11056, 10: 3430, 11: 1428, 12: 357,
}  # fmt: skip
SCENES = {
    "kitchen": 3971, "living room": 3037, "classroom": 1808, "study": 1607, "bedroom": 1602, "hallway": 1323,
    "garage": 923, "campsite": 895, "patio": 864, "dining room": 836, "garden": 826, "bathroom": 750,
    "home office": 634, "greenhouse": 632, "balcony": 613,
}  # fmt: skip


@strict
@dataclass
class PromptsRecipe:
    """
    The section `prompts`: how many prompts are written, by which writer, and about what.

    Args:
        num_prompts (`int`):
            Prompts to write, without those that are dropped. It may be raised later.
        writer (`dict`, *optional*):
            `{"name": "tabletop"}`, a grammar of the ray-caster's world; or a language model: `model`, and what else
            [`~endpoints.Endpoint`] takes: `base_url`, `api_key_env`, `prices`; or `{"local": "ORG/NAME"}`, one of transformers
            that is loaded here.
        reader (`dict`, *optional*):
            The language model that reads perturbed prompts back. Defaults to the writer.
        num_relations (`dict[int, float]`, *optional*):
            How often a prompt has so many relations. Defaults to the paper's counts.
        scenes (`dict[str, float]`, *optional*):
            How often a prompt is about a scene. Defaults to the paper's counts, or those of the grammar, equally often.
        dimensions (`dict[str, float]`, *optional*):
            How often the relation that is changed first is of a dimension, see [`~scenes.RelationKind`]. By default all
            equally often.
        levels (`dict[int, float]`, *optional*):
            How often so many relations are changed. By default 1, 2 and 3 equally often.
        max_cost (`float`, *optional*):
            Largest sum to spend on language models, in US dollars. It may be changed later.
    """

    num_prompts: int
    writer: dict = field(default_factory=lambda: {"name": "tabletop"})
    reader: dict | None = None
    num_relations: dict = field(default_factory=lambda: dict(NUM_RELATIONS))
    scenes: dict = field(default_factory=dict)
    dimensions: dict = field(default_factory=lambda: dict.fromkeys(DIMENSIONS, 1))
    levels: dict = field(default_factory=lambda: {1: 1, 2: 1, 3: 1})
    max_cost: float | None = None

    def __post_init__(self):
        if self.num_prompts < 1:
            raise ValueError(f"prompts.num_prompts is {self.num_prompts}. It should be at least 1.")
        for name in ("num_relations", "scenes", "dimensions", "levels"):
            _check_weights(f"prompts.{name}", getattr(self, name), may_be_empty=name == "scenes")
        if unknown := set(self.dimensions) - set(DIMENSIONS):
            raise ValueError(f"prompts.dimensions names {sorted(unknown)}. Choose from {', '.join(DIMENSIONS)}.")
        for name, least, largest in (("num_relations", 1, 20), ("levels", 1, 3)):
            if not all(isinstance(key, int) and least <= key <= largest for key in getattr(self, name)):
                raise ValueError(f"prompts.{name} has the keys {list(getattr(self, name))}: use {least} to {largest}.")
        if max(self.levels) > min(self.num_relations):
            raise ValueError(
                f"prompts.levels has {max(self.levels)} changes, but a prompt may have {min(self.num_relations)} relations. "
                "Ask for more relations or fewer changes."
            )


@strict
@dataclass
class RenderRecipe:
    """
    The section `render`: the generators that draw the images.

    Args:
        generators (`list[dict]`, *optional*):
            Each as [`~generation.painters.make_painter`] takes it, with a `share` of the pairs (equal shares by default)
            and, where it is not known, the `license` of its images.
        draws (`int`, *optional*, defaults to `1`):
            Pairs of images for each prompt and its perturbation.
        same_seed (`bool`, *optional*, defaults to `True`):
            Whether both images of a pair start from the same noise.
        max_cost (`float`, *optional*):
            Largest sum to spend on image APIs, in US dollars. It may be changed later.
    """

    generators: list = field(default_factory=lambda: [{"name": "tabletop", "image_size": 128}])
    draws: int = 1
    same_seed: bool = True
    max_cost: float | None = None

    def __post_init__(self):
        if not self.generators or not all(isinstance(generator, dict) for generator in self.generators):
            raise ValueError("render.generators should be a list of generators, each with its settings.")
        for generator in self.generators:
            check_spec({key: value for key, value in generator.items() if key not in ("share", "license")})
        if self.draws < 1:
            raise ValueError(f"render.draws is {self.draws}. It should be at least 1.")
        _check_weights("render.generators: share", dict(enumerate(g.get("share", 1) for g in self.generators)))


@strict
@dataclass
class FilterRecipe:
    """
    The section `filter`: the judges of the images.

    Args:
        judges (`list[dict]`, *optional*):
            `{"name": "rules"}`, for images of the embedded renderers; `{"model": ..., "base_url": ...}`, a vision-language
            model behind an OpenAI-compatible server; or `{"local": "ORG/NAME"}`, one that is loaded here. A pair on which
            they agree passes or is dropped; the others go to reviewers.
        review_share (`float`, *optional*, defaults to `0.02`):
            Share of the pairs on which judges agree that reviewers see too.
        quality (`str`, *optional*):
            A reward that does not look at the prompt, as `--rewards` of `trl_spatial grpo` names it. Pairs whose images
            differ in it by more than `max_quality_gap` are dropped.
        max_quality_gap (`float`, *optional*):
            The largest difference.
        max_cost (`float`, *optional*):
            Largest sum to spend on judges, in US dollars. It may be changed later.
    """

    judges: list = field(default_factory=lambda: [{"name": "rules"}])
    review_share: float = 0.02
    quality: str | None = None
    max_quality_gap: float | None = None
    max_cost: float | None = None

    def __post_init__(self):
        if not self.judges or not all(isinstance(judge, dict) for judge in self.judges):
            raise ValueError("filter.judges should be a list of judges, each with its settings.")
        names = [judge.get("model") or judge.get("local") or judge.get("name") for judge in self.judges]
        for judge, name in zip(self.judges, names, strict=True):
            if not isinstance(name, str) or ("name" in judge and judge != {"name": "rules"}):
                raise ValueError(f"filter.judges names {judge}. Give `name: rules`, a `model` or a `local` model.")
        if len(set(names)) < len(names):
            raise ValueError(f"filter.judges names a model twice: {', '.join(names)}. Two judges must be two models.")
        if not 0 <= self.review_share <= 1:
            raise ValueError(f"filter.review_share is {self.review_share}. It should be between 0 and 1.")
        if (self.quality is None) != (self.max_quality_gap is None):
            raise ValueError("filter.quality and filter.max_quality_gap belong together: set both or neither.")


@strict
@dataclass
class ReviewRecipe:
    """
    The section `review`: how people review pairs.

    Args:
        votes_per_item (`int`, *optional*, defaults to `2`):
            Independent votes on each pair. It is kept if all of them say so.
        gold_share (`float`, *optional*, defaults to `0.05`):
            Share of pairs with a known answer among those that a reviewer sees.
        reviewers (`list[str]`, *optional*):
            Names of the reviewers.
    """

    votes_per_item: int = 2
    gold_share: float = 0.05
    reviewers: list = field(default_factory=lambda: ["reviewer"])

    def __post_init__(self):
        if self.votes_per_item < 1:
            raise ValueError(f"review.votes_per_item is {self.votes_per_item}. It should be at least 1.")
        names = self.reviewers
        if not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
            raise ValueError(f"review.reviewers is {names}. It should be a list of different names.")
        if not 0 <= self.gold_share < 1:
            raise ValueError(f"review.gold_share is {self.gold_share}. It should be from 0 to below 1.")


@strict
@dataclass
class ExportRecipe:
    """
    The section `export`: the splits of the dataset.

    Args:
        validation (`float`, *optional*, defaults to `0.05`), test (`float`, *optional*, defaults to `0.1`):
            Shares of the prompts in these splits, about. No scene is in two splits.
        num_benchmark_pairs (`int`, *optional*, defaults to `365`):
            Pairs of the scenes of the test split, at most half of them, that make the split `benchmark`: half with one
            change and half with two or three, as in the paper.
    """

    validation: float = 0.05
    test: float = 0.1
    num_benchmark_pairs: int = 365

    def __post_init__(self):
        if self.num_benchmark_pairs < 0:
            raise ValueError(f"export.num_benchmark_pairs is {self.num_benchmark_pairs}. It should not be negative.")
        if min(self.validation, self.test) < 0 or self.validation + self.test >= 1:
            raise ValueError(
                f"export.validation is {self.validation} and export.test {self.test}. They should leave some pairs for training."
            )


@dataclass
class Recipe:
    """
    How a dataset is built, section by section.

    Args:
        store (`str`):
            Folder in which it is built.
        seed (`int`):
            Seed of everything that is drawn.
        prompts, render, filter, review, export:
            What each stage does.
    """

    store: str
    seed: int
    prompts: PromptsRecipe
    render: RenderRecipe
    filter: FilterRecipe
    review: ReviewRecipe
    export: ExportRecipe

    def to_dict(self) -> dict[str, Any]:
        """The recipe for JSON."""
        return asdict(self)


_SECTIONS: dict[str, type] = {
    "prompts": PromptsRecipe,
    "render": RenderRecipe,
    "filter": FilterRecipe,
    "review": ReviewRecipe,
    "export": ExportRecipe,
}


def load_recipe(path: str | Path) -> Recipe:
    """
    Reads a recipe.

    Args:
        path (`str` or `Path`):
            A YAML file.

    Raises:
        `ValueError`: If it is not YAML, has unknown keys, or a value is not possible. The message names the key.
    """
    try:
        content = load_yaml(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a YAML file: {' '.join(str(error).split())}.") from error
    try:
        return make_recipe(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def make_recipe(content: Any) -> Recipe:
    """Makes a recipe from parsed content, as [`load_recipe`] does from a file."""
    if not isinstance(content, Mapping):
        raise ValueError(f"A recipe is a mapping of {', '.join(['store', 'seed', *_SECTIONS])}.")
    _check_keys("", content, ("store", "seed", *_SECTIONS))
    store, seed = content.get("store"), content.get("seed", 0)
    if not isinstance(store, str) or not store:
        raise ValueError("`store` is missing: name the folder in which the dataset is built.")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"`seed` is {seed!r}. It should be a whole number that is not negative.")
    return Recipe(
        os.path.expanduser(store),
        seed,
        **{name: _read(name, kind, content.get(name)) for name, kind in _SECTIONS.items()},
    )


def endpoint_settings(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of an [`~endpoints.Endpoint`] from a mapping of the recipe."""
    known = ("model", "base_url", "api_key_env", "concurrency", "timeout_s", "max_attempts", "extra_body", "prices")
    _check_keys("", spec, known)
    prices = spec.get("prices")
    if not isinstance(spec.get("model"), str):
        raise ValueError(f"The model {spec.get('model')!r} should be a name.")
    if prices is not None:
        if not isinstance(prices, Mapping):
            raise ValueError(f"The prices of {spec['model']} are {prices!r}. They should be a mapping.")
        _check_keys("prices.", prices, ("input_per_million", "output_per_million"))
    return dict(spec) | ({} if prices is None else {"prices": Prices(**prices)})


def _read(name: str, kind: type, content: Any) -> Any:
    content = {} if content is None else content
    if not isinstance(content, Mapping):
        raise ValueError(f"`{name}` is {content!r}. It should be a mapping.")
    _check_keys(f"{name}.", content, [field.name for field in fields(kind)])
    # JSON keys are strings, and YAML reads `1` as an int
    values = {key: _with_numbers(value) if isinstance(value, Mapping) else value for key, value in content.items()}
    floats = {field.name for field in fields(kind) if "float" in str(field.type)}
    values = {key: float(v) if key in floats and type(v) is int else v for key, v in values.items()}
    for known in fields(kind):
        if known.default is MISSING and known.default_factory is MISSING and known.name not in values:
            raise ValueError(f"{name}.{known.name} is missing.")
    try:
        return kind(**values)
    except StrictDataclassFieldValidationError as error:
        raise ValueError(f"{name}: {' '.join(str(error.__cause__ or error).split())}.") from error


def _with_numbers(weights: Mapping) -> dict:
    return {int(key) if isinstance(key, str) and key.isdecimal() else key: value for key, value in weights.items()}


def _check_keys(prefix: str, content: Mapping, known: Any) -> None:
    if unknown := [str(key) for key in content if key not in known]:
        raise ValueError(f"Unknown key {prefix}{unknown[0]}. Known here: {', '.join(known)}.")


def _check_weights(name: str, weights: Mapping, *, may_be_empty: bool = False) -> None:
    if not weights and not may_be_empty:
        raise ValueError(f"{name} is empty.")
    for key, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise ValueError(f"{name} gives {key!r} the weight {weight!r}. It should be a positive number.")
