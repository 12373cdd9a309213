"""Writers of prompts and of their perturbations: a grammar, or a language model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ...endpoints import Endpoint
from ...endpoints.local_chat import LocalChat
from ...scenes import Operation, SceneGraph, perturb
from ...scenes.consistency import is_consistent
from ...scenes.tabletop import SCENES as TABLETOP_SCENES
from ...scenes.tabletop import describe_tabletop, is_possible, parse_tabletop, sample_tabletop_graph
from .drafts import Draft, Dropped
from .language import LanguageWriter
from .recipe import SCENES, PromptsRecipe


def scene_weights(recipe: PromptsRecipe) -> Mapping[str, float]:
    """The scenes of the prompts with their weights: those of the recipe, of the grammar, or of the paper."""
    if recipe.scenes:
        return recipe.scenes
    return dict.fromkeys(TABLETOP_SCENES, 1.0) if recipe.writer.get("name") == GrammarWriter.name else SCENES


@dataclass(frozen=True)
class Order:
    """
    The specification of a prompt to write.

    Args:
        id (`str`):
            Id of the prompt.
        scene (`str`):
            The scene.
        num_relations (`int`):
            Number of relations.
        dimension (`str`):
            Dimension of a relation that it must have: this one is changed first.
        level (`int`):
            Number of relations to change.
        wording (`int`):
            Seed of a grammar's wording, the same for a prompt and its perturbation.
    """

    id: str
    scene: str
    num_relations: int
    dimension: str
    level: int
    wording: int


class Writer(Protocol):
    """Writes prompts. Its results depend on the arguments alone, as far as a language model's can."""

    def write(self, order: Order, seed: int) -> Draft | Dropped:
        """Writes a prompt."""
        ...

    def edit(self, draft: Draft, order: Order, seed: int) -> tuple[Draft, list[Operation]] | Dropped:
        """Changes relations of a prompt, one of the ordered dimension first, and nothing else."""
        ...

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Calls a function that asks the writer for each item, several at once where that is faster; in any order."""
        ...


class GrammarWriter:
    """Writes scenes of the ray-caster's world by a grammar, which also reads them: no model is needed."""

    name = "tabletop"

    def write(self, order: Order, seed: int) -> Draft | Dropped:
        try:
            graph = sample_tabletop_graph(
                np.random.default_rng(seed), num_relations=order.num_relations, dimensions=[order.dimension]
            )
        except ValueError as error:
            return Dropped(f"no such scene: {error}")
        return self._describe(graph, order)

    def edit(self, draft: Draft, order: Order, seed: int) -> tuple[Draft, list[Operation]] | Dropped:
        graph = parse_tabletop(draft.prompt)
        try:
            changed, operations = perturb(
                graph, np.random.default_rng(seed), order.level, dimension=order.dimension, is_possible=is_possible
            )
        except ValueError as error:
            return Dropped(f"no valid change: {error}")
        edited = self._describe(changed, order)
        if parse_tabletop(edited.prompt) != changed:
            return Dropped("read back differently", edited.prompt)
        return edited, operations

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        return enumerate(map(function, items))

    def _describe(self, graph: SceneGraph, order: Order) -> Draft:
        description = describe_tabletop(graph, seed=order.wording, scene=order.scene)
        return Draft(order.scene, graph, description.text, description.spans, self.name)


class ModelWriter:
    """
    Writes with a language model.

    Args:
        writer ([`~data.building.language.LanguageWriter`]):
            Asks the model.
        endpoint ([`~endpoints.Endpoint`] or [`~endpoints.local_chat.LocalChat`]):
            The model; a server answers several requests at once.
    """

    def __init__(self, writer: LanguageWriter, endpoint: Endpoint | LocalChat):
        self.writer, self.endpoint = writer, endpoint

    def write(self, order: Order, seed: int) -> Draft | Dropped:
        return self.writer.write(order.scene, order.num_relations, [order.dimension], seed)

    def edit(self, draft: Draft, order: Order, seed: int) -> tuple[Draft, list[Operation]] | Dropped:
        try:
            changed, operations = perturb(
                draft.graph,
                np.random.default_rng(seed),
                order.level,
                dimension=order.dimension,
                is_possible=lambda graphs, rng: all(map(is_consistent, graphs)),
            )
        except ValueError as error:
            return Dropped(f"no valid change: {error}")
        rewritten = self.writer.rewrite(draft, changed, operations, seed)
        return rewritten if isinstance(rewritten, Dropped) else (rewritten, operations)

    def map(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        return self.endpoint.map(function, items)
