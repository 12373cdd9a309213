"""The small world: its relations, graphs, words, layouts and pictures."""

import itertools

import numpy as np
import pytest
from scipy.sparse.csgraph import NegativeCycleError, floyd_warshall

from trl_spatial.scenes import (
    COLORS,
    REGIONS,
    RELATIONS,
    SHAPES,
    SPLITS,
    Entity,
    LayoutError,
    LocatedObject,
    Relation,
    SceneGraph,
    Style,
    Verdict,
    describe_scene,
    is_placeable,
    mirror,
    parse_description,
    perturb,
    place_together,
    render_layout,
    render_scene,
    sample_entities,
    sample_graph,
    sample_style,
)
from trl_spatial.scenes.graph import split_of
from trl_spatial.scenes.layout import DifferenceSystem
from trl_spatial.scenes.placements import Bound, X
from trl_spatial.scenes.rendering import draw_layouts
from trl_spatial.scenes.shapes import hidden_share, signed_distance


A, B, C = Entity("red", "circle"), Entity("blue", "square"), Entity("green", "diamond")
# What the rules need pixels for; test_checking.py holds the renderer and the checker against each other.
PIXEL_RELATIONS = {"inside", "contains", "front_of", "behind", "next_to"}


def graphs(num_graphs, seed=0, **options):
    rng = np.random.default_rng(seed)
    for _ in range(num_graphs):
        num_objects = int(rng.integers(2, 6))
        num_relations = int(rng.integers(1, 2 if num_objects == 2 else num_objects + 1))
        yield sample_graph(rng, num_objects=num_objects, num_relations=num_relations, **options), rng


def located(objects):
    """Objects as a perfect detector would report them, but for the masks."""
    return {
        o.entity: LocatedObject(o.entity.color, o.entity.shape, o.x, o.y, o.radius, 1.0, np.zeros((1, 1), bool))
        for o in objects
    }


def verdicts(graph, objects):
    found = located(objects)
    return {
        relation: RELATIONS[relation.name].check([found[e] for e in relation.arguments], relation.region)[0]
        for relation in graph.relations
        if relation.name not in PIXEL_RELATIONS
    }


class TestRelations:
    @pytest.mark.parametrize("kind", RELATIONS.values(), ids=list(RELATIONS))
    def test_the_table_is_consistent(self, kind):
        if kind.inverse is not None:
            assert RELATIONS[kind.inverse].inverse == kind.name
            assert kind.is_symmetric == (kind.inverse == kind.name)
        if kind.opposite is not None:
            assert kind.opposite != kind.name
            assert RELATIONS[kind.opposite].num_arguments == kind.num_arguments
        assert len(kind.phrases) >= 2

    @pytest.mark.parametrize("name", [kind.name for kind in RELATIONS.values() if kind.inverse])
    def test_the_inverse_says_the_same_with_arguments_exchanged(self, name):
        rng = np.random.default_rng(0)
        yes = np.ones((1, 1), bool)
        for _ in range(300):
            a, b = (
                LocatedObject("red", "circle", *rng.random(2), rng.uniform(0.05, 0.2), rng.random(), yes)
                for _ in range(2)
            )
            kind = RELATIONS[name]
            assert kind.check([a, b], None)[0] == RELATIONS[kind.inverse].check([b, a], None)[0]

    @pytest.mark.parametrize(
        "name", [k.name for k in RELATIONS.values() if k.opposite and k.name not in PIXEL_RELATIONS]
    )
    def test_a_relation_and_its_opposite_never_both_hold(self, name):
        rng = np.random.default_rng(0)
        kind = RELATIONS[name]
        both = 0
        for _ in range(500):
            pair = [
                LocatedObject("red", "circle", *rng.random(2), rng.uniform(0.05, 0.2), 1.0, np.zeros((1, 1), bool))
                for _ in range(2)
            ]
            results = [kind.check(pair, None)[0], RELATIONS[kind.opposite].check(pair, None)[0]]
            both += results == [Verdict.SATISFIED] * 2
        assert both == 0

    @pytest.mark.parametrize(
        "name", [k.name for k in RELATIONS.values() if k.is_transitive and k.name not in PIXEL_RELATIONS]
    )
    def test_transitive_relations_are(self, name):
        a, b, c = Entity("red", "circle"), Entity("blue", "square"), Entity("green", "diamond")
        graph = SceneGraph((a, b, c), (Relation(name, (a, b)), Relation(name, (b, c))))
        for seed in range(30):
            (layout,) = place_together([graph], np.random.default_rng(seed))
            found = located(layout)
            assert RELATIONS[name].check([found[a], found[c]], None)[0] == Verdict.SATISFIED

    def test_regions_tile_the_canvas(self):
        for x, y in itertools.product((0.1, 0.5, 0.9), repeat=2):
            spot = LocatedObject("red", "circle", x, y, 0.05, 1.0, np.zeros((1, 1), bool))
            results = [RELATIONS["at"].check([spot], region)[0] for region in REGIONS]
            assert sorted(results) == [Verdict.SATISFIED] + [Verdict.VIOLATED] * 8


class TestSceneGraph:
    @pytest.mark.parametrize(
        "make, message",
        [
            (lambda: Entity("mauve", "circle"), "color='mauve'"),
            (lambda: Entity("red", "hexagon"), "shape='hexagon'"),
            (lambda: Relation("beyond", (A, B)), "Unknown relation 'beyond'"),
            (lambda: Relation("left_of", (A,)), "takes 2 arguments, got 1"),
            (lambda: Relation("left_of", (A, A)), "names an entity twice"),
            (lambda: Relation("at", (A,)), "`at` needs one"),
            (lambda: Relation("at", (A,), "attic"), "Unknown region 'attic'"),
            (lambda: SceneGraph((A,), (Relation("left_of", (A, B)),)), "blue square"),
            (lambda: SceneGraph((A, A)), "look the same"),
        ],
    )
    def test_bad_values_are_named(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()

    def test_equality_ignores_the_order(self):
        left, above = Relation("left_of", (A, B)), Relation("above", (B, C))
        assert SceneGraph((A, B, C), (left, above)) == SceneGraph((C, A, B), (above, left))
        assert SceneGraph((A, B, C), (left,)) != SceneGraph((A, B, C), (above,))

    def test_mirroring_twice_changes_nothing_and_once_matches_the_mirrored_layout(self):
        for graph, rng in graphs(60):
            assert mirror(mirror(graph)) == graph
            (layout,) = place_together([graph], rng)
            flipped = [type(o)(o.entity, 1 - o.x, o.y, o.radius) for o in layout]
            assert set(verdicts(mirror(graph), flipped).values()) <= {Verdict.SATISFIED}

    def test_splits_are_disjoint_and_of_the_stated_size(self):
        rng = np.random.default_rng(0)
        counts = dict.fromkeys(SPLITS, 0)
        for _ in range(4000):
            counts[split_of(sample_entities(rng, 3))] += 1
        for split, share in SPLITS.items():
            assert abs(counts[split] / 4000 - share) < 0.03
            entities = sample_entities(rng, 3, split)
            assert split_of(entities) == split_of(entities[::-1]) == split


class TestSampling:
    def test_every_kind_appears_and_every_graph_can_be_placed(self):
        seen = set()
        for graph, rng in graphs(250):
            seen |= {relation.name for relation in graph.relations}
            (layout,) = place_together([graph], rng)
            assert set(verdicts(graph, layout).values()) <= {Verdict.SATISFIED}
        assert seen == set(RELATIONS)

    def test_layouts_stay_on_the_canvas_and_apart(self):
        for graph, rng in graphs(100, seed=1):
            (layout,) = place_together([graph], rng)
            touching = {frozenset(r.arguments) for r in graph.relations if RELATIONS[r.name].is_overlapping}
            for o in layout:
                assert o.radius <= o.x <= 1 - o.radius and o.radius <= o.y <= 1 - o.radius
            for a, b in itertools.combinations(layout, 2):
                if frozenset((a.entity, b.entity)) not in touching:
                    gap = max(abs(a.x - b.x), abs(a.y - b.y)) - a.radius - b.radius
                    assert gap > 0.03

    @pytest.mark.parametrize(
        "relations",
        [
            [("left_of", A, B), ("left_of", B, C), ("left_of", C, A)],
            [("above", A, B), ("below", A, B)],
            [("near", A, B), ("far_from", A, B)],
            [("inside", A, B), ("inside", B, A)],
        ],
    )
    def test_contradictions_are_found(self, relations):
        graph = SceneGraph((A, B, C), tuple(Relation(name, (a, b)) for name, a, b in relations))
        assert not is_placeable([graph], np.random.default_rng(0))
        with pytest.raises(LayoutError):
            render_scene(graph, seed=0)

    def test_bounds_are_shortest_paths(self):
        rng, num_contradictions = np.random.default_rng(0), 0
        for _ in range(60):
            num_objects = int(rng.integers(2, 6))
            margins = rng.uniform(0.05, 0.2, num_objects)
            system = DifferenceSystem.within_borders(margins.tolist())
            steps = np.full((num_objects + 1, num_objects + 1), np.inf)
            steps[:-1, -1], steps[-1, :-1] = -margins, 1 - margins
            np.testing.assert_allclose(system.upper, [floyd_warshall(steps)] * 2)
            for _ in range(6):
                (low, high), minimum = rng.permutation(num_objects)[:2].tolist(), float(rng.uniform(-0.4, 0.4))
                trial, before = system.copy(), np.array(system.upper)
                is_added = trial.add(Bound(X, low, high, minimum))
                np.testing.assert_array_equal(system.upper, before)
                steps[high, low], old = min(steps[high, low], -minimum), steps[high, low]
                try:
                    shortest = floyd_warshall(steps)
                except NegativeCycleError:
                    assert not is_added
                    steps[high, low], num_contradictions = old, num_contradictions + 1
                    continue
                assert is_added
                np.testing.assert_allclose(trial.upper[X], shortest, atol=1e-12)
                system = trial
        assert num_contradictions > 10

    def test_a_question_for_a_layout_draws_what_placing_draws(self):
        # or a seed would give other pairs than before
        answers = []
        for graph, rng in graphs(60, seed=2):
            changed = SceneGraph(
                graph.entities, tuple(Relation(r.name, r.arguments[::-1], r.region) for r in graph.relations)
            )
            other = np.random.default_rng()
            other.bit_generator.state = rng.bit_generator.state
            answers.append(is_placeable([graph, changed], rng))
            try:
                place_together([graph, changed], other, num_draws=1)
                assert answers[-1]
            except LayoutError:
                assert not answers[-1]
            assert rng.bit_generator.state == other.bit_generator.state
        assert 3 < sum(answers) < 57

    def test_layouts_of_a_graph_vary(self):
        graph = SceneGraph((A, B), (Relation("left_of", (A, B)),))
        xs = [
            next(o.x for o in place_together([graph], np.random.default_rng(s))[0] if o.entity == A) for s in range(80)
        ]
        assert np.std(xs) > 0.1

    def test_impossible_requests_say_so(self):
        rng = np.random.default_rng(0)
        with pytest.raises(ValueError, match="num_relations=9"):
            sample_graph(rng, num_objects=2, num_relations=9)
        with pytest.raises(ValueError, match="Unknown relation 'beyond'"):
            sample_graph(rng, relations=("beyond",))


class TestPerturbation:
    @pytest.mark.parametrize("num_changes", [1, 2, 3])
    def test_exactly_the_recorded_relations_change_and_are_violated(self, num_changes):
        for graph, rng in graphs(150, seed=num_changes):
            if len(graph.relations) < num_changes:
                continue
            perturbed, operations = perturb(graph, rng, num_changes)
            before = [r for r, s in zip(graph.relations, perturbed.relations, strict=True) if r != s]
            assert sorted(map(str, before)) == sorted(str(o.before) for o in operations)
            assert len(operations) == num_changes
            (_, layout) = place_together([graph, perturbed], rng)
            for relation, verdict in verdicts(graph, layout).items():
                assert verdict == (Verdict.VIOLATED if relation in before else Verdict.SATISFIED), relation

    def test_all_operations_occur(self):
        seen = set()
        for graph, rng in graphs(200, seed=5):
            seen |= {operation.operation for operation in perturb(graph, rng)[1]}
        assert seen == {"swap", "flip", "move", "slot_swap"}

    def test_too_many_changes_are_refused(self):
        graph = SceneGraph((A, B), (Relation("left_of", (A, B)),))
        with pytest.raises(ValueError, match="num_changes=2"):
            perturb(graph, np.random.default_rng(0), 2)


class TestWording:
    @pytest.mark.parametrize("length", ["short", "long"])
    def test_reading_the_words_gives_the_graph_back(self, length):
        for i, (graph, _) in enumerate(graphs(300, size_probability=0.3)):
            text = describe_scene(graph, seed=i, length=length)
            assert parse_description(text) == graph, text

    def test_capital_letters_do_not_matter(self):
        for graph, _ in graphs(20, seed=4):
            assert parse_description(describe_scene(graph, seed=0).upper()) == graph

    def test_every_phrase_is_read_as_its_own_relation(self):
        for kind in RELATIONS.values():
            arguments = (A, B, C)[: kind.num_arguments]
            relation = Relation(kind.name, arguments, "top edge" if kind.name == "at" else None)
            texts = {describe_scene(SceneGraph(arguments, (relation,)), seed=seed) for seed in range(40)}
            assert len(texts) == len(kind.phrases)
            assert {parse_description(text).relations for text in texts} == {(relation,)}

    def test_a_perturbation_changes_only_its_sentences(self):
        for i, (graph, rng) in enumerate(graphs(100, seed=9)):
            perturbed, operations = perturb(graph, rng)
            # articles may move with the order of the names
            texts = [describe_scene(g, seed=i, length="long").lower() for g in (graph, perturbed)]
            first, second = (text.replace(" a ", " the ").replace(" an ", " the ").split(". ") for text in texts)
            assert sum(a != b for a, b in zip(first, second, strict=True)) == len(operations)

    def test_unknown_sentences_are_named(self):
        with pytest.raises(ValueError, match="The red circle ponders"):
            parse_description("A red circle is left of a blue square. The red circle ponders.")


class TestRendering:
    @pytest.mark.parametrize("shape, area", [("circle", np.pi), ("square", 4.0), ("triangle", 2.0), ("diamond", 2.0)])
    def test_outlines_have_the_right_area(self, shape, area):
        grid = np.linspace(-1.5, 1.5, 1500)
        inside = signed_distance(shape, grid, grid[:, None], 1.0) < 0
        assert inside.mean() * 9 == pytest.approx(area, rel=0.01)

    def test_the_same_seed_gives_the_same_pixels_and_another_one_others(self):
        graph = next(graphs(1))[0]
        first, again, other = (np.asarray(render_scene(graph, seed=s)) for s in (3, 3, 4))
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()

    @pytest.mark.parametrize("image_size", [32, 64, 200])
    def test_drawn_areas_are_those_of_the_shapes(self, image_size):
        # anti-aliasing is exact: the sum of the coverage is the area, at any size
        for shape in SHAPES:
            entity = Entity("green", shape)
            image = np.asarray(render_scene(SceneGraph((entity,)), seed=1, image_size=image_size), float)
            assert image.shape == (image_size, image_size, 3)
            color, background = np.array(COLORS["green"], float), np.median(image.reshape(-1, 3), axis=0)
            coverage = ((image - background) @ (color - background) / ((color - background) ** 2).sum()).clip(0, 1)
            radius = np.sqrt(coverage.sum() / {"circle": np.pi, "square": 4, "triangle": 2, "diamond": 2}[shape])
            assert 0.08 < radius / image_size < 0.14

    @pytest.mark.parametrize("pattern", ["gradient", "stripes", "checks"])
    def test_a_background_is_what_its_style_says(self, pattern):
        colors, size = np.array([[200.0, 90.0, 30.0], [40.0, 120.0, 230.0]]), 50
        x, y = np.meshgrid((np.arange(size) + 0.5) / size, (np.arange(size) + 0.5) / size)
        along = np.cos(0.7) * (x - 0.5) + np.sin(0.7) * (y - 0.5)
        mix = {
            "gradient": 0.5 + along / 1.42,
            "stripes": 0.5 + 0.5 * np.sin(2 * np.pi * along / 0.231),
            "checks": (x // 0.231 + y // 0.231) % 2,
        }[pattern]
        expected = colors[0] + mix[..., None] * (colors[1] - colors[0])
        for noise in (0.0, 3.0):
            style = Style(colors, pattern, 0.7, 0.231, noise, 8, {})
            error = np.asarray(render_layout([], style, size), float) - expected
            assert error.std() == pytest.approx(noise, abs=0.4)
            assert np.ptp(error, axis=-1).max() <= 1.0001  # the noise is grey, but for rounding

    def test_images_of_one_style_are_those_drawn_one_by_one(self):
        for graph, rng in graphs(10, seed=3):
            layouts = [place_together([graph], rng)[0] for _ in range(2)]
            style = sample_style(graph.entities, rng)
            drawn = draw_layouts(layouts, style, 48)
            for layout, pixels in zip(layouts, drawn, strict=True):
                np.testing.assert_array_equal(pixels, np.asarray(render_layout(layout, style, 48)))
            assert (drawn[0] != drawn[1]).any()

    @pytest.mark.parametrize("front", SHAPES)
    @pytest.mark.parametrize("behind", SHAPES)
    def test_the_hidden_share_is_that_of_random_points(self, front, behind):
        x, y = np.random.default_rng(0).uniform(-1, 1, (2, 200_000))
        is_behind = signed_distance(behind, x, y, 1.0) < 0
        is_hidden = is_behind & (signed_distance(front, x - 0.3, y + 0.5, 1.0) < 0)
        assert hidden_share(front, behind, 0.3, -0.5) == pytest.approx(is_hidden.sum() / is_behind.sum(), abs=0.01)

    def test_too_small_images_are_refused(self):
        with pytest.raises(ValueError, match="image_size=4"):
            render_scene(SceneGraph((A,)), seed=0, image_size=4)
