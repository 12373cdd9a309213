"""Judges for the images of a build: exact rules, a model on a server, or a local model."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ...endpoints import Endpoint, Spend
from ...generation.generators import TabletopGenerator
from ...generation.seeds import image_generator
from ...judges.endpoint_judge import EndpointJudge
from ...judges.local_judge import LocalJudge
from ...judges.questions import JudgedRelation, RelationAnswer, RelationJudge
from ...preferences.images import load_image
from ...scenes import Relation, SceneGraph, Verdict, check_scene, parse_description
from ...scenes.tabletop import check_tabletop, parse_tabletop
from .build_store import BuildStore
from .recipe import endpoint_settings


_ANSWERS: dict[Verdict, RelationAnswer] = {
    Verdict.SATISFIED: "yes",
    Verdict.VIOLATED: "no",
    Verdict.UNDECIDABLE: "cannot_tell",
}


@dataclass(frozen=True)
class Shown:
    """
    An image to be judged.

    Args:
        image (`bytes`):
            The file.
        prompt (`str`):
            What it was drawn from.
        seed (`int`):
            Its seed.
        generator (`Mapping[str, Any]`):
            Who drew it, as in the recipe.
    """

    image: bytes
    prompt: str
    seed: int
    generator: Mapping[str, Any]


class Judge(Protocol):
    """Answers questions about relations in an image."""

    name: str

    def ask(self, shown: Shown, relations: Sequence[dict[str, Any]]) -> list[JudgedRelation]:
        """One answer per relation."""
        ...

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Calls a function that asks for each item, several at once where that is faster; in any order."""
        ...


class RulesJudge:
    """Judges images of the embedded renderers: flat shapes by their pixels, others by what the renderer drew where."""

    name = "rules"

    def ask(self, shown: Shown, relations: Sequence[dict[str, Any]]) -> list[JudgedRelation]:
        world = shown.generator.get("name")
        picture = load_image(shown.image)
        if world == "flat":
            graph = parse_description(shown.prompt)
            check = check_scene(picture, _asked(graph, relations))
        elif world == "tabletop":
            graph = parse_tabletop(shown.prompt)
            generator = TabletopGenerator(picture.width)
            rendering = generator.render(shown.prompt, image_generator(shown.seed))
            if not np.array_equal(np.asarray(rendering.image), np.asarray(picture)):
                raise ValueError(
                    "An image is not what its prompt and seed produce: it was drawn by another version, or has changed. Draw "
                    "it again in a new store."
                )
            check = check_tabletop(rendering, _asked(graph, relations))
        else:
            raise ValueError(
                f"The judge `rules` cannot judge images of {world or shown.generator.get('model')}: it can only judge "
                "those of tabletop and flat. Name a model in filter.judges."
            )
        return [JudgedRelation(_ANSWERS[found.verdict], found.reason, None) for found in check.relations]

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        return enumerate(map(function, items))


def _asked(graph: SceneGraph, relations: Sequence[dict[str, Any]]) -> SceneGraph:
    """Returns the graph of the same objects, with `relations` in place of its own."""
    named = {str(entity): entity for entity in graph.entities}
    asked = []
    for record in relations:
        arguments = list(record["arguments"])
        region = arguments.pop() if record["relation"] == "at" else None
        asked.append(Relation(record["relation"], tuple(named[name] for name in arguments), region))
    return SceneGraph(graph.entities, tuple(asked))


class ModelJudge:
    """
    Judges any images, with a vision-language model.

    Args:
        name (`str`):
            Its name in records.
        judge ([`~judges.questions.RelationJudge`]):
            The model.
        endpoint ([`~endpoints.Endpoint`], *optional*):
            The server, which answers several questions at once.
    """

    def __init__(self, name: str, judge: RelationJudge, endpoint: Endpoint | None = None):
        self.name, self.judge, self.endpoint = name, judge, endpoint

    def ask(self, shown: Shown, relations: Sequence[dict[str, Any]]) -> list[JudgedRelation]:
        return self.judge.ask(Image.open(io.BytesIO(shown.image)).convert("RGB"), relations)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        return enumerate(map(function, items)) if self.endpoint is None else self.endpoint.map(function, items)


def make_judge(spec: Mapping[str, Any], store: BuildStore, spend: Spend | None) -> Judge:
    """
    Makes a judge of the recipe.

    Args:
        spec (`Mapping[str, Any]`):
            See [`~data.building.recipe.FilterRecipe`].
        store ([`BuildStore`]):
            Where answers are kept.
        spend ([`~endpoints.Spend`], *optional*):
            What may be spent.

    Raises:
        `ValueError`: If the recipe names no judge, or a setting is unknown.
    """
    if dict(spec) == {"name": "rules"}:
        return RulesJudge()
    if "local" in spec:
        settings = {key: value for key, value in spec.items() if key != "local"}
        return ModelJudge(spec["local"], LocalJudge(spec["local"], **settings))
    if "model" in spec:
        endpoint = Endpoint(**endpoint_settings(spec), cache=store.cache, spend=spend)
        return ModelJudge(spec["model"], EndpointJudge(endpoint), endpoint)
    raise ValueError(f"filter.judges names {dict(spec)}. Give `name: rules`, a `model` or a `local` model.")
