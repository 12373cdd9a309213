"""T2I-CompBench++'s spatial parts by both protocols."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluation.goldens import FOLDER, assert_same, goldens
from trl_spatial.evaluation.benchmarks.base import Evidence, Item, OfficialError
from trl_spatial.evaluation.benchmarks.t2i_compbench import T2ICompBench2D, T2ICompBench3D
from trl_spatial.evaluation.benchmarks.t2i_compbench_rules import (
    find_fixed,
    fixed_relation,
    intersection_over_union,
    is_depth_order_right,
    official_relation_score,
    official_size,
)
from trl_spatial.evaluation.boxes import add_depths
from trl_spatial.scenes import parse_description
from trl_spatial.scenes.layout import place_scene, sample_radii


BENCHMARKS = {"2d": T2ICompBench2D, "3d": T2ICompBench3D}
PARTS = pytest.mark.parametrize("part", BENCHMARKS)
EXAMPLES = Path("trl_spatial/evaluation/benchmarks/examples/t2i_compbench")
ROOT = Path(__file__).parents[3]
DATA = ROOT.parent / "shared" / "bench_data" / "t2i_compbench"
# a size that the official program does not change
FRAME = (479, 479)


class EveryLabel2D(T2ICompBench2D):
    """The detector of the goldens has a label for every noun."""

    unlabeled = frozenset()


class EveryLabel3D(T2ICompBench3D):
    unlabeled = frozenset()


def depth_map(depth):
    """`(height, width)`."""
    pixels = np.full((depth["height"], depth["width"]), depth["background"], dtype=np.uint8)
    for left, top, right, bottom, value in depth["rects"]:
        pixels[max(top, 0) : bottom, max(left, 0) : right] = value
    return pixels


def mean_depth(pixels, box, *, transposed):
    left, top, right, bottom = map(int, box)
    if not transposed:
        return float(pixels[max(top, 0) : bottom, max(left, 0) : right].mean())
    # in the official precision, whose rounding decides between equal means
    part = (torch.from_numpy(pixels).float() / 255)[left:right, top:bottom]
    return float(part.mean()) if part.numel() else None


def box_row(label, score, box, pixels=None):
    row = {"label": label, "score": score, "box": list(box)}
    if pixels is not None:
        row |= {
            "depth": mean_depth(pixels, box, transposed=False),
            "depth_transposed": mean_depth(pixels, box, transposed=True),
        }
    return row


def item_of(prompt, nouns, relation="near", id="000"):
    return Item(id, prompt, {"nouns": list(nouns), "relation": relation})


def evidence_with(benchmark, answers):
    """Rows of item, number, file and the boxes of the one question, the same by both protocols."""
    images = {(item.id, number): file for item, number, file, _ in answers}
    replies = {
        (item.id, number, question.key): [{"size": list(FRAME), "boxes": boxes}]
        for item, number, _, boxes in answers
        for protocol in ("official", "fixed")
        for question in benchmark.questions(item, protocol)
    }
    return Evidence(images, replies)


@goldens("t2i_compbench", "rule_2d", "rule_3d")
def test_goldens_of_the_rules(golden):
    boxes = golden.given["box1"], golden.given["box2"]
    pixels = depth_map(golden.given["depth"]) if "depth" in golden.given else None
    depths = {
        transposed: tuple(None if pixels is None else mean_depth(pixels, box, transposed=transposed) for box in boxes)
        for transposed in (False, True)
    }
    if "error" in golden.official:
        with pytest.raises(OfficialError):
            official_relation_score(golden.given["locality"], *boxes, depths[True])
    else:
        found = official_relation_score(golden.given["locality"], *boxes, depths[True])
        assert_same(found, golden.official["score"])
    if golden.fixed is not None:
        relation = "front" if golden.given["locality"] == "in front of" else "behind"
        result = fixed_relation(relation, *boxes, FRAME, depths[False])
        found = {
            "depth_order_right": result.is_right,
            "iou": intersection_over_union(*boxes),
            "score_same_weights_row_column_depth": result.score,
        }
        assert_same(found, golden.fixed)
        assert is_depth_order_right(relation, depths[False]) == golden.fixed["depth_order_right"]


@goldens("t2i_compbench", "image_2d", "image_3d")
def test_goldens_of_images(golden):
    benchmark = EveryLabel3D() if golden.group == "image_3d" else EveryLabel2D()
    answers = []
    for index, image in enumerate(golden.given["images"]):
        pixels = depth_map(image["depth"]) if "depth" in image else None
        boxes = [box_row(row["label"], row["score"], row["box"], pixels) for row in image["detections"]]
        nouns = [image["nouns"][0], image["nouns"][-1]] if image["nouns"] else []
        item = item_of(image["file"].split("_")[0], nouns, id=str(index))
        answers.append((item, 0, f"samples/{image['file']}", boxes))
    evidence = evidence_with(benchmark, answers)
    items = [item for item, _, _, _ in answers]
    if "error" in golden.official:
        with pytest.raises(OfficialError):
            benchmark.official(items, evidence)
        return
    assert_same(benchmark.official(items, evidence), {"avg score": golden.official["average"]})
    scores = sorted(
        [int(file.split("_")[1].split(".")[0]), benchmark.official_image_score(item, 0, evidence)]
        for item, _, file, _ in answers
    )
    assert_same(scores, golden.official["scores"])


@PARTS
@pytest.mark.skipif(not DATA.is_dir(), reason=f"there is no folder {DATA}")
def test_the_published_files_are_known_and_read_as_spacy_reads_them(part):
    benchmark = BENCHMARKS[part]()
    for file in benchmark.files:
        assert hashlib.sha256((DATA / file.name).read_bytes()).hexdigest() == file.sha256
    items = benchmark.load(DATA)
    if not (FOLDER / "t2i_compbench" / "nouns.json").is_file():
        pytest.skip("the nouns are not there")
    nouns = json.loads((FOLDER / "t2i_compbench" / "nouns.json").read_text())
    assert [item.data["nouns"] for item in items] == [row[:2] for row in nouns[part]]
    for item, (_, _, phrase) in zip(items, nouns[part], strict=True):
        assert benchmark.official_phrases[phrase] == item.data["relation"]
    assert benchmark.unlabeled == set(nouns[f"{part}_objects_without_label"])
    affected = [index for index, item in enumerate(items) if benchmark.unlabeled & set(item.data["nouns"])]
    assert affected == nouns[f"{part}_prompts_affected"]


def test_what_the_official_detector_has_no_label_for_is_not_looked_for():
    benchmark = T2ICompBench2D()
    (question,) = benchmark.questions(item_of("a girl near a phone", ["girl", "phone"]), "official")
    assert question.options["classes"] == ["person"]
    (fixed,) = benchmark.questions(item_of("a girl near a phone", ["girl", "phone"]), "fixed")
    assert fixed.options["classes"] == ["girl", "phone"] and fixed.key != question.key
    item = item_of("a mouse near a phone", ["mouse", "phone"])
    assert benchmark.questions(item, "official") == []
    evidence = Evidence({(item.id, 0): "samples/a mouse near a phone_000000.png"}, {})
    assert benchmark.official([item], evidence) == {"avg score": 0.0}
    one, two = (benchmark.questions(item_of("a cat near a dog", ["cat", "dog"]), p) for p in ("official", "fixed"))
    assert one[0].key == two[0].key and one[0].options == two[0].options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a cat near a dog\na cat beside the point\n", "line 2.*beside"),
        ("a cat near a dog\n\na key near a bee\n", "line 2"),
        ("a cat near a dog\na bee near a dog\na cat near a dog\n", "line 3.*repeats line 1"),
        ("a cat near a dog/bee\n", "line 1.*file name"),
        ("a cat near a dog_bee\n", "line 1.*file name"),
    ],
)
def test_bad_prompts_are_named_with_their_line(tmp_path, text, message):
    (tmp_path / "spatial_val.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"spatial_val\.txt, {message}"):
        T2ICompBench2D().load(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"3d_spatial_val\.txt"):
        T2ICompBench3D().load(tmp_path)


def test_files_are_assigned_by_the_rules_of_the_protocol():
    benchmark = T2ICompBench2D()
    items = [
        item_of("a cat near a dog", ["cat", "dog"], id="000"),
        item_of("a key near a bee", ["key", "bee"], id="001"),
    ]
    cats = [f"samples/a cat near a dog_{number:06d}.png" for number in range(3)]
    counted_on = [f"samples/a key near a bee_{number:06d}.png" for number in (13, 10, 11)]
    files = sorted(
        [*cats, *counted_on, "a cat near a dog_000007.png", "samples/notes.txt", "other/a cat near a dog_1.png"]
    )
    fixed = benchmark.assign(items, files, "fixed")
    # numbers that go on from one prompt to the next
    expected = dict(zip([("001", 0), ("001", 1), ("001", 2)], sorted(counted_on), strict=True))
    expected |= {("000", number): file for number, file in enumerate(cats)} | {
        ("000", 7): "a cat near a dog_000007.png"
    }
    assert fixed == expected
    official = benchmark.assign(items, files, "official")
    assert sorted(official.values()) == sorted([*cats, *counted_on])
    with pytest.raises(ValueError, match="remove one"):
        benchmark.assign(items, [*files, "samples/a cat near a dog_1.jpg"], "fixed")
    # the official program scores both
    both = benchmark.assign(items, [*files, "samples/a cat near a dog_1.jpg"], "official")
    assert len(both) == len(official) + 1
    paths = [benchmark.image_path(item, number) for item in items for number in range(10)]
    assert list(benchmark.assign(items, paths, "fixed").values()) == paths
    assert sorted(benchmark.assign(items, paths, "official").values()) == sorted(paths)


def test_fewer_images_than_there_are_can_be_taken():
    benchmark = T2ICompBench2D()
    benchmark.num_images = 2
    item = item_of("a cat near a dog", ["cat", "dog"])
    files = [f"samples/a cat near a dog_{number:06d}.png" for number in range(40, 44)]
    assert benchmark.assign([item], files, "fixed") == {("000", 0): files[0], ("000", 1): files[1]}


def test_boxes_are_compared_in_the_frame_that_the_official_program_resizes_to():
    assert official_size(512, 512) == FRAME and official_size(*FRAME) == FRAME
    assert official_size(1024, 512) == (480, 240)  # the long side is at most 480
    item = item_of("a cat near a dog", ["cat", "dog"])
    benchmark = T2ICompBench2D()
    scores = []
    for size in (479, 958):  # the same picture, twice as large
        boxes = [
            box_row("cat", 0.8, np.array([0, 0, 40, 40]) * size / 479),
            box_row("dog", 0.8, np.array([200, 200, 240, 240]) * size / 479),
        ]
        key = benchmark.questions(item, "official")[0].key
        replies = {(item.id, 0, key): [{"size": [size, size], "boxes": boxes}]}
        evidence = Evidence({(item.id, 0): "samples/a cat near a dog_000000.png"}, replies)
        scores.append(benchmark.official_image_score(item, 0, evidence))
    assert scores == pytest.approx([0.4 + 0.5 * 150 / 200] * 2)


@goldens("t2i_compbench", "rule_3d")
def test_goldens_of_depths_as_they_are_read_of_images(golden):
    """Maps of the goldens are of a size that the program would change, so each is put into the corner of one that it keeps."""
    boxes = golden.given["box1"], golden.given["box2"]
    pixels = depth_map(golden.given["depth"])
    if pixels.shape[0] != pixels.shape[1] or min(map(min, boxes)) < 0:
        return  # the borders of the map decide
    whole = np.zeros(FRAME)
    whole[: pixels.shape[0], : pixels.shape[1]] = pixels
    rows = [box_row("", 1.0, box) for box in boxes]
    add_depths(rows, whole)
    for row, box in zip(rows, boxes, strict=True):
        for name, transposed in (("depth", False), ("depth_transposed", True)):
            expected = mean_depth(pixels, box, transposed=transposed)
            expected = expected * 255 if transposed and expected is not None else expected
            assert row[name] == (None if expected is None else pytest.approx(expected, abs=1e-3))


@pytest.mark.parametrize("size", [(24, 24), (32, 24), (24, 32), (1024, 512)])
def test_depths_are_read_in_the_frame_of_the_official_program(size):
    """Oracle: depth that rises evenly from left to right, so that a mean is where the middle of the columns is, in any frame."""
    width, height = size
    frame = np.array(official_size(*size))
    rising = np.broadcast_to(250 * (np.arange(width) + 0.5) / width, (height, width))
    unit = 1 / frame  # of both axes
    for corner in ((0.1, 0.06), (0.29, 0.12), (0.2, 0.33)):
        left, top = np.array(corner) * size
        box = [left, top, left + 0.31 * width, top + 0.29 * height]
        rows = [box_row("", 1.0, box)]
        add_depths(rows, rising)
        first, last = (int(edge * frame[1] / height) for edge in (box[1], box[3]))  # top and bottom, as columns
        assert rows[0]["depth_transposed"] == pytest.approx(250 * (first + last) / 2 * unit[0], abs=1.5)
    # what is right of the last row, counted from the left, is nowhere
    add_depths(rows := [box_row("", 1.0, [0.9 * width, 0, width, 0.5 * height])], rising)
    assert (rows[0]["depth_transposed"] is None) == (width > 1.2 * height)


def test_near_needs_both_axes_in_the_fixed_protocol():
    first, second = [0, 0, 20, 20], [0, 400, 20, 420]
    assert official_relation_score("near", first, second) == 1.0
    assert not fixed_relation("near", first, second, FRAME).is_right
    assert fixed_relation("near", first, [140, 140, 160, 160], FRAME).is_right
    for side in (200, 800):  # pixels
        for share, is_near in ((0.3, True), (0.33, False)):
            second = np.array([0, 0, 20, 20]) + side * share * np.array([0, 1, 0, 1])
            assert fixed_relation("near", first, second, (side, side // 2)).is_right == is_near


def test_depth_decides_without_overlap_in_the_fixed_protocol():
    boxes = [0, 0, 20, 20], [100, 100, 120, 120]
    assert fixed_relation("front", *boxes, FRAME, (200, 20)).is_right
    assert not fixed_relation("behind", *boxes, FRAME, (200, 20)).is_right
    assert not fixed_relation("front", *boxes, FRAME, (None, 20)).is_right
    assert official_relation_score("in front of", *boxes, (200, 20)) == 0.0


def test_of_two_things_of_one_name_either_may_be_the_first():
    assert find_fixed(["phone", "cat", "phone"], ["phone", "phone"]) == [0, 2]
    assert find_fixed(["phone"], ["phone", "phone"]) == [0, None]
    benchmark = T2ICompBench3D()
    item = item_of("a phone behind a phone", ["phone", "phone"], "behind")
    for depths in ((200, 20), (20, 200), (20, 20)):
        boxes = [
            box_row("phone", 0.9, [10 * index, 0, 10 * index + 40, 40]) | {"depth": depth, "depth_transposed": depth}
            for index, depth in enumerate(depths)
        ]
        evidence = evidence_with(benchmark, [(item, 0, "samples/a phone behind a phone_000000.png", boxes)])
        assert benchmark.fixed_image_result(item, 0, evidence).is_right == (depths[0] != depths[1])


def exact_boxes(graph, relation, seed, size):
    """Boxes of a scene as it is drawn; one side of the other in the benchmark's sense too, where one axis must dominate."""
    rng = np.random.default_rng(seed)
    while True:
        placed = place_scene(graph, sample_radii([graph], rng), rng)
        first, second = (next(p for p in placed if p.entity == entity) for entity in graph.relations[0].arguments)
        x, y = abs(first.x - second.x), abs(first.y - second.y)
        if {"left": x > y, "right": x > y, "above": y > x, "below": y > x, "near": max(x, y) < 0.3}.get(
            relation, True
        ):
            break
    pixels = np.zeros((size, size), dtype=np.uint8)
    edges = {}
    for depth, thing in enumerate(placed, start=1):  # those behind first
        box = np.array(
            [thing.x - thing.radius, thing.y - thing.radius, thing.x + thing.radius, thing.y + thing.radius]
        )
        edges[thing.entity] = box * size
        left, top, right, bottom = (box * size).astype(int)
        pixels[top:bottom, left:right] = 100 * depth
    return [box_row(str(entity), 0.9, edges[entity], pixels) for entity in graph.relations[0].arguments]


@PARTS
def test_a_whole_pass_over_the_examples(part):
    benchmark = BENCHMARKS[part]()
    items = benchmark.load(ROOT / EXAMPLES)
    assert len(items) >= 4
    graphs = [parse_description(item.prompt) for item in items]
    right, wrong = [], []
    for item, graph in zip(items, graphs, strict=True):
        (relation,) = graph.relations
        assert item.data["nouns"] == [str(entity) for entity in relation.arguments]
        for number in range(benchmark.num_images):
            boxes = exact_boxes(graph, item.data["relation"], number, FRAME[0])
            key = (item, number, benchmark.image_path(item, number))
            right.append((*key, boxes))
            # each thing in the other's place; far away, where the relation is symmetric
            exchanged = [row | {"label": other["label"]} for row, other in zip(boxes, boxes[::-1], strict=True)]
            if item.data["relation"] == "near":
                exchanged = [boxes[0] | {"box": [0, 0, 20, 20]}, boxes[1] | {"box": [0, 450, 20, 470]}]
            wrong.append((*key, exchanged))
    files = [file for _, _, file, _ in right]
    for protocol in ("official", "fixed"):
        assert len(benchmark.assign(items, files, protocol)) == len(files)
    for answers, expected in ((right, 1.0), (wrong, 0.0)):
        metrics = {metric.name: metric for metric in benchmark.fixed(items, evidence_with(benchmark, answers))}
        headline = metrics["relation"]
        assert headline.is_headline and headline.estimate == expected
        assert len(headline.values) == len(headline.items) == len(items) * benchmark.num_images
        assert {m.estimate for name, m in metrics.items() if name.startswith("relation: ")} == {expected}
        assert metrics["both objects"].estimate == 1.0
        # the official program does not know all of our words, and keeps the confidences
        assert 0 <= benchmark.official(items, evidence_with(benchmark, answers))["avg score"] < 1


@PARTS
def test_missing_images_and_answers_are_wrong_in_the_fixed_protocol_only(part):
    benchmark = BENCHMARKS[part]()
    items = benchmark.load(ROOT / EXAMPLES)[:1]
    graph = parse_description(items[0].prompt)
    boxes = exact_boxes(graph, items[0].data["relation"], 0, FRAME[0])
    answers = [(items[0], number, benchmark.image_path(items[0], number), boxes) for number in range(10)]
    whole = evidence_with(benchmark, answers)
    images = {key: file for key, file in whole.images.items() if key[1] < 6}
    replies = {key: reply if key[1] != 5 else [None] for key, reply in whole.replies.items() if key[1] < 6}
    partial = Evidence(images, replies)
    metric = benchmark.fixed(items, partial)[0]
    assert metric.values.tolist() == [1.0] * 5 + [0.0] * 5
    with pytest.raises(OfficialError, match="detector failed"):
        benchmark.official(items, partial)
    without = Evidence({key: file for key, file in images.items() if key[1] < 5}, replies)
    assert benchmark.official(items, without) == pytest.approx(benchmark.official(items, whole))
    assert benchmark.fixed(items, Evidence({}, {}))[0].estimate == 0.0
