"""VISOR by both protocols: the official program's numbers, and scenes of which everything is known."""

import json

import pytest

from tests.evaluation.benchmarks.flat_detector import find_things
from tests.evaluation.goldens import assert_same, goldens
from trl_spatial.evaluation.benchmarks import make_benchmark
from trl_spatial.evaluation.benchmarks.base import Evidence, OfficialError, images_of
from trl_spatial.evaluation.benchmarks.visor import RELATIONS, find_centers, judge_boxes
from trl_spatial.evaluation.data_files import find_data
from trl_spatial.scenes import parse_description, render_scene


BENCHMARK = make_benchmark("visor")
FILE = BENCHMARK.files[0].name
EXAMPLE = find_data(BENCHMARK, "example")
OPPOSITE = {
    "to the left of": "to the right of",
    "to the right of": "to the left of",
    "above": "below",
    "below": "above",
}
# where the first object lies when the second lies in the middle
PLACES = {"to the left of": (-100, 0), "to the right of": (100, 0), "above": (0, -100), "below": (0, 100)}


def write_rows(folder, rows):
    (folder / FILE).write_text(json.dumps(rows, indent=2))
    return folder


def make_row(index, relation="above", **changes):
    return {
        "unique_id": index,
        "num_objects": 2,
        "obj_1_attributes": ["mug"],
        "obj_2_attributes": ["lamp"],
        "rel_type": relation,
        "text": f"a mug {relation} a lamp",
    } | changes


def as_reply(classes, relation="above"):
    """A reply in which the objects of some classes were found, mugs in a relation to the lamps."""
    rows = []
    for name in classes:
        x, y = PLACES[relation] if name == "mug" else (0, 0)
        rows.append({"label": name, "score": 0.5, "box": [x + 216, y + 216, x + 296, y + 296]})
    return {"size": [512, 512], "boxes": rows}


def evidence_of(items, replies, protocol):
    """Evidence of images in the official layout: file → reply."""
    images = BENCHMARK.assign(items, sorted(replies), protocol)
    return Evidence(images, {(*key, "boxes"): [replies[file]] for key, file in images.items()})


# ---------------------------------------------------------------------------------------------- the official program


@goldens("visor", "detection")
def test_images_as_officially(golden):
    objects = [golden.given["object_a"], golden.given["object_b"]]
    rows = [{"label": objects[which], "score": score, "box": box} for which, score, box in golden.given["detections"]]
    found = judge_boxes(rows, objects, golden.given["relation"])
    assert found == (golden.official["recall"] == 2, bool(golden.official["sra"]))
    for name in set(objects):
        pairs = zip(golden.official["classes"], golden.official["centroid"], strict=True)
        expected = [center for found_name, center in pairs if found_name == name]
        assert_same([list(center) for center in find_centers(rows, name)], expected)


def read_run(golden, tmp_path):
    """Items and file → reply of a run of which classes and verdicts are given."""
    items = BENCHMARK.load(write_rows(tmp_path, golden.given["text"]))
    replies = {}
    for name, result in golden.given["results"].items():
        relation = golden.given["text"][int(name.partition("_")[0])]["rel_type"]
        if relation in RELATIONS:
            shown = relation if result["sra"] else OPPOSITE[relation]
            replies[f"{name}.png"] = as_reply(result["classes"], shown)
        else:
            replies[f"{name}.png"] = as_reply(result["classes"])
    return items, replies


@goldens("visor", "aggregate")
def test_runs_as_officially(golden, tmp_path):
    items, replies = read_run(golden, tmp_path)
    evidence = evidence_of(items, replies, "official")
    if "error" in golden.official:
        with pytest.raises(OfficialError, match="divides by"):
            BENCHMARK.official(items, evidence)
        return
    numbers = BENCHMARK.official(items, evidence)
    expected = {name: text for name, text in golden.official.items() if name not in ("Model", "Num_Imgs")}
    assert {name: f"{value:.2f}" for name, value in numbers.items()} == expected


@goldens("visor", "aggregate")
def test_runs_without_the_bugs(golden, tmp_path):
    if golden.fixed is None:
        pytest.skip("not recorded")
    items, replies = read_run(golden, tmp_path)
    metrics = {metric.name: metric for metric in BENCHMARK.fixed(items, evidence_of(items, replies, "fixed"))}
    for name, value in golden.fixed.items():
        if not name.startswith("n_"):
            assert_same(100 * metrics[name].estimate, "NaN" if value is None else value)
    assert len(metrics["OA"].values) == len(metrics["VISOR_uncond"].values) == golden.fixed["n_images"]
    assert len(metrics["VISOR_1"].values) == golden.fixed["n_prompts"]


# ---------------------------------------------------------------------------------------------- scenes


@pytest.mark.parametrize("protocol", ["official", "fixed"])
def test_right_scenes_are_right_and_wrong_ones_wrong(protocol):
    """Oracle: the renderer, which draws what it is told to. A wrong picture has the two things exchanged."""
    items = BENCHMARK.load(EXAMPLE)

    def draw(prompt, seed):
        return find_things(render_scene(parse_description(prompt), seed=seed, image_size=128))

    def exchange(item):
        first, second = item.data["obj_1_attributes"][0], item.data["obj_2_attributes"][0]
        return item.prompt.replace(first, "*").replace(second, first).replace("*", second)

    images = images_of(items, BENCHMARK.num_images)
    right = {BENCHMARK.image_path(item, n): draw(item.prompt, n) for item, n in images}
    wrong = {BENCHMARK.image_path(item, n): draw(exchange(item), n) for item, n in images}
    for replies, score in ((right, 1.0), (wrong, 0.0)):
        evidence = evidence_of(items, replies, protocol)
        if protocol == "official":
            numbers = {name: value / 100 for name, value in BENCHMARK.official(items, evidence).items()}
        else:
            numbers = {metric.name: metric.estimate for metric in BENCHMARK.fixed(items, evidence)}
            assert {
                f"{kind}: {name}" for kind in ("VISOR_cond", "VISOR_uncond") for name in RELATIONS
            } < numbers.keys()
        assert numbers.pop("OA") == 1.0  # the things are there in both
        assert {"VISOR_uncond", "VISOR_cond", "VISOR_1", "VISOR_4"} < numbers.keys()
        assert set(numbers.values()) == {score}


def test_the_example_is_drawable():
    rows = json.loads((EXAMPLE / FILE).read_text())
    items = BENCHMARK.load(EXAMPLE)
    assert [item.data["rel_type"] for item in items] == list(RELATIONS)  # the others have no relation
    assert [row["rel_type"] for row in rows] == [*RELATIONS, "and", "single"]
    for item in items:
        (relation,) = parse_description(item.prompt).relations
        assert [entity.look for entity in relation.arguments] == [
            item.data["obj_1_attributes"][0],
            item.data["obj_2_attributes"][0],
        ]
        assert relation.name == item.data["rel_type"].removeprefix("to the ").replace(" ", "_")
        for protocol in ("official", "fixed"):
            (question,) = BENCHMARK.questions(item, protocol)
            assert question.kind == "boxes" and question.key == "boxes"
            assert question.options["classes"] == [entity.look for entity in relation.arguments]


def test_other_names_of_a_class_are_the_class():
    """Detectors of COCO's classes disagree about their names."""
    boxes = [{"label": "computer mouse", "score": 0.5, "box": [0, 0, 10, 10]}]
    boxes.append({"label": "tvmonitor", "score": 0.5, "box": [100, 0, 110, 10]})
    assert judge_boxes(boxes, ["mouse", "tv"], "to the left of") == (True, True)


# ---------------------------------------------------------------------------------------------- what is missing


def test_what_is_missing_is_wrong_and_every_value_has_its_item(tmp_path):
    items = BENCHMARK.load(write_rows(tmp_path, [make_row(0, "above"), make_row(1, "to the left of")]))
    replies = {"0_1.png": as_reply(["mug", "lamp"], "above"), "0_2.png": as_reply(["mug", "lamp"], "below")}
    evidence = evidence_of(items, replies, "fixed")
    failed = Evidence(evidence.images | {("0", 3): "0_3.png"}, {**evidence.replies, ("0", 3, "boxes"): [None]})
    for found in (evidence, failed):
        metrics = {metric.name: metric for metric in BENCHMARK.fixed(items, found)}
        assert metrics["VISOR_uncond"].values.tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
        assert metrics["OA"].values.tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
        assert metrics["OA"].items == metrics["VISOR_uncond"].items == ["0"] * 4 + ["1"] * 4
        assert metrics["VISOR_cond"].values.tolist() == [1, 0] and metrics["VISOR_cond"].items == ["0", "0"]
        assert metrics["VISOR_cond: above"].values.tolist() == [1, 0]
        assert len(metrics["VISOR_cond: to the left of"].values) == 0
        assert metrics["VISOR_1"].values.tolist() == [1, 0] and metrics["VISOR_2"].values.tolist() == [0, 0]
        assert metrics["VISOR_uncond: above"].values.tolist() == [0, 1, 0, 0]
        assert metrics["VISOR_uncond: to the left of"].items == ["1"] * 4
        assert [name for name, metric in metrics.items() if metric.is_headline] == ["VISOR_uncond", "VISOR_cond"]
    assert BENCHMARK.official(items, evidence)["VISOR_1"] == 100  # the prompt without images is forgotten
    with pytest.raises(OfficialError, match=r"0_3\.png"):
        BENCHMARK.official(items, failed)


# ---------------------------------------------------------------------------------------------- files


def test_which_file_is_which_image(tmp_path):
    items = BENCHMARK.load(write_rows(tmp_path, [make_row(i) for i in range(3)]))
    files = [BENCHMARK.image_path(item, number) for item, number in images_of(items, 4)]
    assert files[:5] == ["0_0.png", "0_1.png", "0_2.png", "0_3.png", "1_0.png"]
    expected = dict(zip(((item.id, n) for item, n in images_of(items, 4)), files, strict=True))
    for protocol in ("official", "fixed"):
        assert BENCHMARK.assign(items, sorted(files), protocol) == expected
    files = ["0_7.png", "01_0.png", "2_3.JPG", "9_0.png", "grid.png", "x/1_1.png"]
    assert BENCHMARK.assign(items, files, "official") == {("0", 7): "0_7.png"}
    assert BENCHMARK.assign(items, files, "fixed") == {("1", 0): "01_0.png", ("2", 3): "2_3.JPG"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"unique_id": 7}, "`unique_id` 7, which should be 1"),
        ({"rel_type": "left of"}, "'left of' of 2 objects"),
        ({"num_objects": 3}, "of 3 objects"),
        ({"obj_2_attributes": [None]}, r"`obj_2_attributes` \[None\]"),
        ({"obj_1_attributes": []}, r"`obj_1_attributes` \[\]"),
        ({"text": ""}, "`text` ''"),
    ],
)
def test_a_damaged_row_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"{FILE}, row 2 .*{message}"):
        BENCHMARK.load(write_rows(tmp_path, [make_row(0), make_row(1, **changes)]))


@pytest.mark.parametrize(
    "content, message",
    [("{", "is not JSON"), ("{}", "a list of rows, not dict"), ("[3]", "row 1 is 3"), (None, "cannot be read")],
)
def test_a_damaged_or_missing_file_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match=f"{FILE}.*{message}"):
        BENCHMARK.load(tmp_path)
