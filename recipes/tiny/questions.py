"""The pretraining data of the tiny backbone: true and false sentences about rendered scenes."""

from dataclasses import dataclass

import numpy as np

from trl_spatial.scenes import (
    COLORS,
    REGIONS,
    RELATIONS,
    SHAPES,
    Entity,
    LayoutError,
    LocatedObject,
    PlacedObject,
    Relation,
    SceneGraph,
    Verdict,
    describe_scene,
    parse_description,
    perturb,
    place_together,
    render_layout,
    sample_graph,
    sample_style,
)
from trl_spatial.scenes.shapes import signed_distance


ANSWERS = (" no", " yes")
_OCCLUSION = ("front_of", "behind")
_CONTAINMENT = ("inside", "contains")


@dataclass(frozen=True)
class Scene:
    """A rendered scene, the graph it shows, a perturbed graph that it does not show, and where its objects are."""

    image: np.ndarray  # (image_size, image_size, 3), uint8
    graph: SceneGraph
    perturbed: SceneGraph
    objects: tuple[PlacedObject, ...]
    content: (
        np.ndarray
    )  # (rows, columns, 3), uint8: color, shape and depth at the center of every patch; 0 is background


def make_scene(
    seed: int, *, relations: tuple[str, ...], image_size: int, patch_size: int, split: str, occlusion_weight: int = 1
) -> Scene:
    """
    Draw a scene of two to four objects and one to four relations; at least one of them is changed in the perturbed graph.
    `front_of` and `behind` are drawn `occlusion_weight` times as often as each other relation.
    """
    rng = np.random.default_rng(seed)
    relations = (*relations, *[name for name in _OCCLUSION if name in relations] * (occlusion_weight - 1))
    while True:
        num_relations = int(rng.integers(1, 5))
        num_objects = int(rng.integers({1: 2, 2: 3, 3: 3, 4: 4}[num_relations], 5))
        # one false sentence among true ones is the hardest to find
        num_changes = 1 if rng.random() < 0.6 else int(rng.integers(1, num_relations + 1))
        try:
            graph = sample_graph(
                rng, num_objects=num_objects, num_relations=num_relations, relations=relations, split=split
            )
            perturbed, _ = perturb(graph, rng, num_changes)
            objects, _ = place_together([graph, perturbed], rng)
        except (LayoutError, ValueError):
            continue
        image = np.asarray(render_layout(objects, sample_style(graph.entities, rng), image_size))
        content = _content(objects, find_depths(graph), image_size // patch_size)
        return Scene(image, graph, perturbed, tuple(objects), content)


def find_depths(graph: SceneGraph) -> dict[Entity, int]:
    """Depth of every object that partly hides another or is partly hidden: `1` if it is in front, `2` if behind."""
    depths: dict[Entity, int] = {}
    for relation in graph.relations:
        if relation.name in _OCCLUSION:
            front, behind = relation.arguments[:: 1 if relation.name == "front_of" else -1]
            depths |= {front: 1, behind: 2}
    return depths


def _content(objects: list[PlacedObject], depths: dict[Entity, int], size: int) -> np.ndarray:
    centers = (np.arange(size) + 0.5) / size
    content = np.zeros((size, size, 3), np.uint8)
    for o in objects:  # those in front come last
        is_covered = signed_distance(o.entity.shape, centers - o.x, centers[:, None] - o.y, o.radius) < 0
        color, shape = list(COLORS).index(o.entity.color) + 1, SHAPES.index(o.entity.shape) + 1
        content[is_covered] = color, shape, 1 + depths.get(o.entity, 0)
    return content


def judge(relation: Relation, scene: Scene) -> Verdict:
    """Judge a relation by the placement. Occlusion and containment follow the graph, or are undecidable if it does not say."""
    name, arguments = relation.name, relation.arguments
    pair = next((r for r in scene.graph.relations if set(r.arguments) == set(arguments)), None)
    if name in _OCCLUSION:
        if pair is None or pair.name not in _OCCLUSION:
            return Verdict.UNDECIDABLE
        is_same = (pair.name == name) == (pair.arguments == arguments)
        return Verdict.SATISFIED if is_same else Verdict.VIOLATED
    if pair is not None and pair.name in _CONTAINMENT:
        if name in _CONTAINMENT:
            is_same = (pair.name == name) == (pair.arguments == arguments)
            return Verdict.SATISFIED if is_same else Verdict.VIOLATED
        return Verdict.VIOLATED if name in ("next_to", "far_from") else Verdict.UNDECIDABLE
    if name in _CONTAINMENT:
        return Verdict.VIOLATED
    located = {
        o.entity: LocatedObject(o.entity.color, o.entity.shape, o.x, o.y, o.radius, 1.0, np.zeros((1, 1), bool))
        for o in scene.objects
    }
    return RELATIONS[name].check([located[entity] for entity in arguments], relation.region)[0]


def sample_statement(scene: Scene, is_true: bool, rng: np.random.Generator, relations: tuple[str, ...]) -> str | None:
    """Draw a sentence about a relation that is true or false in the scene, as asked; `None` after 12 failed draws."""
    entities = scene.graph.entities
    names = [name for name in relations if RELATIONS[name].num_arguments <= len(entities)]
    for _ in range(12):
        if is_true and rng.random() < 0.5:
            relation = scene.graph.relations[rng.integers(len(scene.graph.relations))]
        elif not is_true and rng.random() < 0.5:
            changed = [r for r in scene.perturbed.relations if r not in scene.graph.relations]
            relation = changed[rng.integers(len(changed))]
        else:
            name = names[rng.integers(len(names))]
            order = rng.permutation(len(entities))[: RELATIONS[name].num_arguments]
            region = list(REGIONS)[rng.integers(len(REGIONS))] if name == "at" else None
            relation = Relation(name, tuple(entities[i] for i in order), region)
        if judge(relation, scene) == (Verdict.SATISFIED if is_true else Verdict.VIOLATED):
            return describe_scene(SceneGraph(relation.arguments, (relation,)), seed=int(rng.integers(2**31)))
    return None


def _absent(entities: tuple[Entity, ...], rng: np.random.Generator) -> Entity:
    """Draw an object that is not in the scene; about half of them share a color or a shape with one that is."""
    while True:
        like = entities[rng.integers(len(entities))]
        color = like.color if rng.random() < 0.3 else list(COLORS)[rng.integers(len(COLORS))]
        shape = like.shape if rng.random() < 0.3 else SHAPES[rng.integers(len(SHAPES))]
        if (color, shape) not in {(entity.color, entity.shape) for entity in entities}:
            return Entity(color, shape)


def describe_objects(scene: Scene, rng: np.random.Generator) -> str:
    """Describe all objects of the scene in random order, then where each of them is."""
    entities = [scene.graph.entities[i] for i in rng.permutation(len(scene.graph.entities))]
    places = [Relation("at", (entity,), region) for entity in entities for region in REGIONS]
    true_places = [relation for relation in places if judge(relation, scene) == Verdict.SATISFIED]
    return describe_scene(
        SceneGraph(tuple(entities), tuple(true_places)), seed=int(rng.integers(2**31)), length="long"
    )


def ask_for_objects(scene: Scene, rng: np.random.Generator, num_statements: int) -> list[tuple[str, bool]]:
    """
    Make sentences that an object is in the scene, each with its truth. They are not mixed with other sentences, because the objects
    mentioned there would give the answer away.
    """
    entities = scene.graph.entities
    questions = []
    for _ in range(num_statements):
        is_true = bool(rng.integers(2))
        entity = entities[rng.integers(len(entities))] if is_true else _absent(entities, rng)
        questions.append((describe_scene(SceneGraph((entity,)), seed=int(rng.integers(2**31))), is_true))
    return questions


def ask_for_relations(
    scene: Scene, rng: np.random.Generator, relations: tuple[str, ...], num_statements: int
) -> list[tuple[str, bool, list[bool]]]:
    """Make sentences that a relation holds in the scene, each with its truth twice: of the answer and of the sentence."""
    questions = []
    for _ in range(num_statements):
        is_true = bool(rng.integers(2))
        statement = sample_statement(scene, is_true, rng, relations)
        if statement is not None:
            questions.append((statement, is_true, [is_true]))
    return questions


def make_caption(scene: Scene, rng: np.random.Generator) -> tuple[str, bool, list[bool | None]]:
    """
    Make a whole caption, of the scene's own graph or of the perturbed one, with its truth and that of each sentence: `None` for
    a sentence without a relation.
    """
    is_true = bool(rng.integers(2))
    graph = scene.graph if is_true else scene.perturbed
    length = ("short", "long")[rng.integers(2)]
    text = describe_scene(graph, seed=int(rng.integers(2**31)), length=length)
    truths: list[bool | None] = [relation in scene.graph.relations for relation in graph.relations]
    first = text[: text.index(".") + 1]
    if not parse_description(first).relations:
        truths.insert(0, None)
    return text, is_true, truths + [None] * (text.count(".") - len(truths))
