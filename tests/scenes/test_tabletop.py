"""The tabletop world: scenes are read back from their words, pictures show what they were drawn from, and changes are seen."""

import numpy as np
import pytest

from trl_spatial.scenes import RELATIONS, Relation, SceneGraph, Verdict, perturb
from trl_spatial.scenes.tabletop import (
    NOUNS,
    SCENES,
    Item,
    check_tabletop,
    describe_tabletop,
    is_possible,
    parse_tabletop,
    render_tabletop,
    sample_tabletop_graph,
    scene_of,
)
from trl_spatial.scenes.tabletop.raycasting import _place


DIMENSIONS = ("lateral", "vertical", "containment", "depth", "distance", "between", "region", "order")


def sample(number, rng):
    """A graph, and one of its perturbations."""
    dimension = DIMENSIONS[number % len(DIMENSIONS)]
    while True:
        try:
            graph = sample_tabletop_graph(rng, num_relations=3 + number % 6, dimensions=[dimension])
            return graph, *perturb(graph, rng, 1 + number % 3, dimension=dimension, is_possible=is_possible)
        except ValueError:
            continue


@pytest.fixture(scope="module")
def graphs():
    rng = np.random.default_rng(0)
    return [sample(number, rng) for number in range(64)]


def test_words_are_read_back_and_differ_where_the_graphs_do(graphs):
    for seed, (graph, changed, operations) in enumerate(graphs):
        scene = list(SCENES)[seed % len(SCENES)]
        texts = [describe_tabletop(g, seed=seed, scene=scene) for g in (graph, changed)]
        for given, text in zip((graph, changed), texts, strict=True):
            assert parse_tabletop(text.text) == given and scene_of(text.text) == scene
            assert 36 <= len(text.text.split()) <= 100
            for relation, (start, end) in zip(given.relations, text.spans, strict=True):
                alone = parse_tabletop(f"{text.text[start:end]}.")
                assert alone.relations == (relation,)
        clauses = [[text.text[start:end] for start, end in text.spans] for text in texts]
        # a clause changes where its relation does; another one at most in which thing it is the first to name
        plain = [
            [c.replace("an ", "").replace("a ", "").replace("the ", "").lower() for c in part] for part in clauses
        ]
        differing = {i for i, (a, b) in enumerate(zip(*plain, strict=True)) if a != b}
        assert differing == {graph.relations.index(operation.before) for operation in operations}


def test_pictures_show_their_graph_and_not_the_changed_one(graphs):
    for seed, (graph, changed, operations) in enumerate(graphs):
        scene = list(SCENES)[seed % len(SCENES)]
        for given, other in ((graph, changed), (changed, graph)):
            rendering = render_tabletop(given, seed=seed, scene=scene, image_size=128)
            own = check_tabletop(rendering, given)
            assert own.is_correct, own.reasons
            verdicts = {check.relation: check.verdict for check in check_tabletop(rendering, other).relations}
            for operation in operations:
                relation = operation.after if given == graph else operation.before
                assert verdicts[relation] == Verdict.VIOLATED


def test_rays_end_on_the_surfaces_of_the_things(graphs):
    """Each point that is labelled with a thing fulfils the equation of its surface."""
    for seed, (graph, _, _) in enumerate(graphs[:24]):
        rendering = render_tabletop(graph, seed=seed, scene="study", image_size=96)
        for number, placed in enumerate(_place(graph, seed)):
            x, y, z = rendering.points[rendering.labels == number].T.astype(float)
            x, y, z, r, h = x - placed.x, y - placed.base, z - placed.z, placed.radius, placed.height
            form = placed.item.solid.form
            assert ((y > -1e-3) & (y < h + 1e-3)).all()
            if form == "sphere":
                assert np.abs(np.sqrt(x**2 + (y - r) ** 2 + z**2) - r).max() < 2e-3
            elif form in ("cylinder", "cone"):
                reach = r if form == "cylinder" else r * (1 - 0.96 * y / h)
                assert (np.minimum(np.abs(np.hypot(x, z) - reach), np.abs(y - h)) < 2e-3).all()
            elif form == "box":
                assert np.abs(np.maximum(np.maximum(np.abs(x), np.abs(z)) / r, np.abs(2 * y / h - 1)) - 1).max() < 0.02
            else:
                assert (np.maximum(np.abs(x), np.abs(z)) < r + 1e-3).all()
        assert (rendering.points[rendering.labels < 0][:, 1] > -1e-3).all()  # the table and the wall


def test_the_seed_decides_about_everything_but_the_places(graphs):
    graph, changed, _ = graphs[0]
    first = render_tabletop(graph, seed=3, scene="kitchen", image_size=64)
    again = render_tabletop(graph, seed=3, scene="kitchen", image_size=64)
    assert first.image.tobytes() == again.image.tobytes()
    other = render_tabletop(changed, seed=3, scene="kitchen", image_size=64)
    assert first.image.tobytes() != other.image.tobytes()
    wall = [np.asarray(picture.image)[:8] for picture in (first, other)]
    assert (wall[0] == wall[1]).all()
    sizes = [{item.item: item.radius for item in _place(g, 3)} for g in (graph, changed)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("num_relations", [1, 2, 3, 8, 12])
def test_graphs_of_any_size_are_found(num_relations):
    rng = np.random.default_rng(num_relations)
    for _ in range(10):
        graph = sample_tabletop_graph(rng, num_relations=num_relations)
        assert len(graph.relations) == num_relations
        assert {item for relation in graph.relations for item in relation.arguments} == set(graph.entities)


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize("num_relations", [1, 4])
def test_a_wanted_dimension_is_there(dimension, num_relations):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        graph = sample_tabletop_graph(rng, num_relations=num_relations, dimensions=[dimension])
        assert len(graph.relations) == num_relations
        assert dimension in {RELATIONS[relation.name].dimension for relation in graph.relations}


def test_all_wanted_dimensions_are_there():
    wanted = ["vertical", "containment", "between"]
    for seed in range(12):
        graph = sample_tabletop_graph(np.random.default_rng(seed), num_relations=4, dimensions=wanted)
        assert {RELATIONS[relation.name].dimension for relation in graph.relations} >= set(wanted)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_wanted_split_is_drawn_from(split):
    for seed in range(5):
        assert sample_tabletop_graph(np.random.default_rng(seed), num_relations=3, split=split).split == split


def test_what_cannot_be_is_refused():
    red, blue, bowl = Item("red", "box"), Item("blue", "book"), Item("green", "bowl")
    rng = np.random.default_rng(0)
    for relations in (
        (Relation("left_of", (red, blue)), Relation("left_of", (blue, red))),
        (Relation("inside", (bowl, red)),),  # a box holds nothing
        (Relation("on", (red, blue)), Relation("far_from", (red, blue))),
        (Relation("on", (Item("red", "ball"), blue)),),  # it would roll off
    ):
        entities = tuple(dict.fromkeys(item for relation in relations for item in relation.arguments))
        assert not is_possible([SceneGraph(entities, relations)], rng)


def test_errors_name_what_is_wrong():
    graph = SceneGraph((Item("red", "box"),), (Relation("at", (Item("red", "box"),), "center"),))
    with pytest.raises(ValueError, match="image_size=8 is too small"):
        render_tabletop(graph, seed=0, scene="kitchen", image_size=8)
    with pytest.raises(ValueError, match="Unknown scene 'moon'"):
        render_tabletop(graph, seed=0, scene="moon")
    with pytest.raises(ValueError, match="Cannot read the sentence 'A red box sings'"):
        parse_tabletop("A red box sings.")
    with pytest.raises(ValueError, match="num_relations=13"):
        sample_tabletop_graph(np.random.default_rng(0), num_relations=13)
    with pytest.raises(ValueError, match="unknown \\['height'\\]"):
        sample_tabletop_graph(np.random.default_rng(0), num_relations=3, dimensions=["height"])
    with pytest.raises(ValueError, match="num_relations=1 is too small"):
        sample_tabletop_graph(np.random.default_rng(0), num_relations=1, dimensions=["depth", "order"])
    with pytest.raises(ValueError, match="Unknown split 'dev'"):
        sample_tabletop_graph(np.random.default_rng(0), num_relations=3, split="dev")
    assert all(Item("red", noun).solid for noun in NOUNS)
