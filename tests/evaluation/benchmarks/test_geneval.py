"""GenEval by both protocols: the official program's numbers, and scenes of which everything is known."""

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from tests.evaluation.benchmarks.flat_detector import find_things
from tests.evaluation.goldens import assert_same, goldens
from trl_spatial.evaluation.benchmarks import make_benchmark
from trl_spatial.evaluation.benchmarks.base import Evidence, Item, OfficialError, images_of
from trl_spatial.evaluation.benchmarks.geneval import judge_reply, official_specification
from trl_spatial.evaluation.benchmarks.t2i_compbench_rules import intersection_over_union
from trl_spatial.evaluation.data_files import find_data
from trl_spatial.judges.geneval import (
    COUNTING_THRESHOLD,
    THRESHOLD,
    Detection,
    confident_objects,
    read_specification,
    relative_positions,
)
from trl_spatial.scenes import parse_description, render_scene


BENCHMARK = make_benchmark("geneval")
FILE = BENCHMARK.files[0].name
PUBLIC_FILE = Path(__file__).parents[4] / "shared" / "bench_data" / "geneval" / FILE
EXAMPLE = find_data(BENCHMARK, "example")
MUG_LEFT_OF_LAMP = {
    "tag": "position",
    "include": [{"class": "lamp", "count": 1}, {"class": "mug", "count": 1, "position": ["left of", 0]}],
    "prompt": "a photo of a mug left of a lamp",
}


def as_reply(detections, colors=None):
    """A detector's reply of `{class: [[left, top, right, bottom, score], ...]}`, most confident first, ties in the detector's order."""
    rows = [
        {"label": name, "score": box[4], "box": box[:4]}
        | ({"color": colors[name][i]} if colors and name in colors else {})
        for name, boxes in detections.items()
        for i, box in enumerate(boxes)
    ]
    return {"size": [512, 512], "boxes": sorted(rows, key=lambda row: -row["score"])}


def write_rows(folder, rows):
    (folder / FILE).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def evidence_of(items, replies, protocol):
    """Evidence of images in the official layout: file → reply."""
    images = BENCHMARK.assign(items, sorted(replies), protocol)
    return Evidence(images, {(*key, "boxes"): [replies[file]] for key, file in images.items()})


def estimates(items, evidence):
    return {metric.name: metric.estimate for metric in BENCHMARK.fixed(items, evidence)}


# ---------------------------------------------------------------------------------------------- the official program


@goldens("geneval", "relative_position")
def test_positions_as_officially(golden):
    found = sorted(relative_positions(golden.given["a"][:4], golden.given["b"][:4]))
    if "boundary" in golden.tags and found != golden.official["relations"]:
        pytest.skip("the official program computes in single precision")
    assert found == golden.official["relations"]


@goldens("geneval", "evaluate")
def test_verdicts_as_officially(golden):
    # the order of the boxes is given, and the threshold is passed
    ranked = {
        name: [[*box[:4], 0.999 - rank / 1000] for rank, box in enumerate(boxes)]
        for name, boxes in golden.given["objects"].items()
    }
    reply = as_reply(ranked, golden.given["colors"])
    if "error" in golden.official:
        with pytest.raises(OfficialError, match=r"named later|There is no"):
            judge_reply(official_specification(golden.given["metadata"]), reply)
        return
    result = judge_reply(official_specification(golden.given["metadata"]), reply)
    assert result.correct == golden.official["correct"]
    assert result.reason == golden.official["reason"]


@goldens("geneval", "evaluate_image")
def test_images_as_officially(golden):
    result = judge_reply(official_specification(golden.given["metadata"]), as_reply(golden.given["detections"]))
    assert (result.correct, result.reason) == (golden.official["correct"], golden.official["reason"])
    threshold = COUNTING_THRESHOLD if golden.given["metadata"]["tag"] == "counting" else THRESHOLD
    rows = as_reply(golden.given["detections"])["boxes"][::-1]
    found = confident_objects([Detection(row["label"], row["score"], row["box"]) for row in rows], threshold)
    kept = {name: [[*each.box, each.score] for each in objects] for name, objects in found.items()}
    assert_same(kept, golden.official["kept"])


@goldens("geneval", "compute_iou")
def test_overlaps_as_officially(golden):
    """The official program counts pixels: the last column and row belong to a box. Its verdicts do not depend on overlap."""
    first, second = ([*box[:2], box[2] + 1, box[3] + 1] for box in (golden.given["a"], golden.given["b"]))
    assert intersection_over_union(first, second) == pytest.approx(golden.official["iou"], abs=1e-6)


def read_folder(golden, tmp_path):
    """Items and file → reply of a folder of images."""
    folders = golden.given["folders"]
    if any("extra_line" in entry or "no_samples" in entry for entry in folders.values()):
        pytest.skip("what stands in a metadata.jsonl beside images, and empty folders, are not looked at")
    numbered = {name: entry for name, entry in folders.items() if name.isdigit() and entry["metadata"]}
    items = BENCHMARK.load(write_rows(tmp_path, [numbered[name]["metadata"] for name in sorted(numbered)]))
    items = [replace(item, id=name) for item, name in zip(items, sorted(numbered), strict=True)]
    replies = {
        f"{name}/samples/{file}": as_reply(detections)
        for name, entry in folders.items()
        for file, detections in entry["files"].items()
    }
    return items, replies


@goldens("geneval", "folder")
def test_folders_as_officially(golden, tmp_path):
    items, replies = read_folder(golden, tmp_path)
    evidence = evidence_of(items, replies, "official")
    if "error" in golden.official:
        with pytest.raises(OfficialError, match="no images"):
            BENCHMARK.official(items, evidence)
        return
    numbers = BENCHMARK.official(items, evidence)
    tags = golden.official["tags"]
    assert len(evidence.images) == golden.official["images"]
    assert f"{numbers['overall']:.5f}" == golden.official["overall"]
    assert f"{numbers['correct images']:.2%}" == f"{golden.official['correct_images_pct']}%"
    assert f"{numbers['correct prompts']:.2%}" == f"{golden.official['correct_prompts_pct']}%"
    assert_same({tag: numbers[tag] for tag in tags}, {tag: right / total for tag, (_, right, total) in tags.items()})
    assert len(numbers) == len(tags) + 3
    rows = {item.id: item.data for item in items}
    evaluated = [
        [file, judge_reply(official_specification(rows[id]), replies[file]).correct]
        for (id, _), file in evidence.images.items()
    ]
    assert sorted(evaluated) == sorted(golden.official["evaluated"])


@goldens("geneval", "folder")
def test_what_a_folder_says_has_to_be_there(golden, tmp_path):
    folders = {name: entry for name, entry in golden.given["folders"].items() if name.isdigit()}
    for name, entry in folders.items():
        (tmp_path / name / "samples").mkdir(parents=True)
        lines = [json.dumps(entry["metadata"])] if entry["metadata"] else []
        if lines:
            lines += [entry["extra_line"]] if "extra_line" in entry else []
            (tmp_path / name / "metadata.jsonl").write_text("".join(f"{line}\n" for line in lines))
    items = [Item(name, "x", entry["metadata"] or {}) for name, entry in folders.items()]
    if bad := [name for name, entry in folders.items() if not entry["metadata"] or "extra_line" in entry]:
        with pytest.raises(ValueError, match=f"{bad[0]}/metadata.jsonl"):
            BENCHMARK.check_folder(tmp_path, items)
    else:
        BENCHMARK.check_folder(tmp_path, items)


@goldens("geneval", "folder")
def test_folders_without_the_bugs(golden, tmp_path):
    if golden.fixed is None:
        pytest.skip("not recorded")
    items, replies = read_folder(golden, tmp_path)
    metrics = {metric.name: metric for metric in BENCHMARK.fixed(items, evidence_of(items, replies, "fixed"))}
    found = {name: metric.estimate for name, metric in metrics.items()}
    assert_same({tag: found[tag] for tag in golden.fixed["tags"]}, golden.fixed["tags"])
    assert_same(found["overall"], golden.fixed["overall"])
    assert_same(found["correct images"], golden.fixed["correct_images"])
    assert_same(found["correct prompts"], golden.fixed["correct_prompts"])
    assert len(metrics["overall"].values) == golden.fixed["images"]
    assert len(metrics["correct prompts"].values) == golden.fixed["prompts"]


# ---------------------------------------------------------------------------------------------- scenes


def other_prompt(item):
    """A prompt whose picture is wrong for an item: things exchanged, or of another color."""
    graph = parse_description(item.prompt)
    if not graph.relations:
        return item.prompt.replace(graph.entities[0].color, "cyan")
    first, second = graph.relations[0].arguments
    return item.prompt.replace(str(first), "*").replace(str(second), str(first)).replace("*", str(second))


@pytest.mark.parametrize("protocol", ["official", "fixed"])
def test_right_scenes_are_right_and_wrong_ones_wrong(protocol):
    """Oracle: the renderer, which draws what it is told to; with these seeds not on a diagonal, where GenEval sees no position."""
    items = BENCHMARK.load(EXAMPLE)
    right, wrong = (
        {
            BENCHMARK.image_path(item, n): find_things(
                render_scene(parse_description(prompt_of(item)), seed=n, image_size=128)
            )
            for item, n in images_of(items, 2)
        }
        for prompt_of in (lambda item: item.prompt, other_prompt)
    )
    for replies, score in ((right, 1.0), (wrong, 0.0)):
        if protocol == "official":
            numbers = BENCHMARK.official(items, evidence_of(items, replies, protocol))
            assert set(numbers.values()) == {score}
        else:
            numbers = estimates(items, evidence_of(items, replies, protocol))
            # two of four images of each prompt are there
            assert {name: value for name, value in numbers.items() if value != score / 2} == (
                {"correct prompts": 1.0} if score else {}
            )
    tags = ["two_object", "counting", "colors", "color_attr", "position"]
    expected = {"overall", *tags, "correct images", "correct prompts"}
    relations = {f"position: {name}" for name in ("left of", "below")}
    assert numbers.keys() == (expected if protocol == "official" else expected | relations)


def test_the_example_is_drawable_and_has_a_spatial_part():
    items = BENCHMARK.load(EXAMPLE)
    assert [item.id for item in items] == [f"{row:05d}" for row in range(6)]
    for item in items:
        looks = {entity.look for entity in parse_description(item.prompt).entities}
        assert looks == {entry["class"] for entry in item.data["include"]}
    assert [item.is_spatial for item in items] == [item.data["tag"] == "position" for item in items]
    assert sum(item.is_spatial for item in items) == 2


def test_questions_name_what_to_look_for_and_whose_color_matters():
    items = BENCHMARK.load(EXAMPLE)
    for item in items:
        (question,) = BENCHMARK.questions(item, "official")
        assert question.kind == "boxes" and question.key == BENCHMARK.questions(item, "fixed")[0].key
        assert question.options["classes"] == [entry["class"] for entry in item.data["include"]]
        colored = {entry["class"] for entry in item.data["include"] if "color" in entry}
        assert set(question.options["colors"]) == colored
    assert BENCHMARK.judges == {"detector", "colors"}


# ---------------------------------------------------------------------------------------------- what is missing


def make_items(*rows):
    return [Item(f"{i:05d}", row["prompt"], row, is_spatial=row["tag"] == "position") for i, row in enumerate(rows)]


RIGHT = as_reply({"mug": [[60, 216, 140, 296, 0.9]], "lamp": [[360, 216, 440, 296, 0.9]]})


def test_what_is_missing_is_wrong_and_every_value_has_its_item():
    items = make_items(MUG_LEFT_OF_LAMP, MUG_LEFT_OF_LAMP)
    evidence = evidence_of(items, {"00000/samples/0001.png": RIGHT, "00000/samples/0003.png": RIGHT}, "fixed")
    failed = Evidence(
        evidence.images | {("00000", 2): "00000/samples/0002.png"},
        {**evidence.replies, ("00000", 2, "boxes"): [None]},
    )
    for found in (evidence, failed):
        metrics = {metric.name: metric for metric in BENCHMARK.fixed(items, found)}
        for name in ("overall", "position", "position: left of", "correct images"):
            assert metrics[name].values.tolist() == [0, 1, 0, 1, 0, 0, 0, 0]
            assert list(metrics[name].items) == ["00000"] * 4 + ["00001"] * 4
        assert metrics["correct prompts"].values.tolist() == [1, 0]  # equal prompts stay two
        assert [name for name, metric in metrics.items() if metric.is_headline] == ["overall", "position"]
    assert BENCHMARK.official(items, evidence)["position"] == 1.0
    with pytest.raises(OfficialError, match=r"00000/samples/0002\.png"):
        BENCHMARK.official(items, failed)


def test_equal_boxes_are_two_objects():
    row = {"tag": "counting", "include": [{"class": "mug", "count": 2}], "prompt": "two mugs"}
    twice = as_reply({"mug": [[60, 216, 140, 296, 0.95]] * 2})
    assert judge_reply(read_specification(row), twice).correct


# ---------------------------------------------------------------------------------------------- files


def test_the_layout_is_the_official_one(tmp_path):
    items = BENCHMARK.load(EXAMPLE)
    BENCHMARK.finish(tmp_path, items)
    for row, item in enumerate(items):
        assert json.loads((tmp_path / f"{row:05d}" / "metadata.jsonl").read_text()) == item.data
        assert (tmp_path / f"{row:05d}" / "samples").is_dir()
        assert BENCHMARK.image_path(item, 3) == f"{row:05d}/samples/0003.png"
    files = [BENCHMARK.image_path(item, number) for item, number in images_of(items, 4)]
    for protocol in ("official", "fixed"):
        assigned = BENCHMARK.assign(items, sorted([*files, "00000/metadata.jsonl", "00000/grid.png"]), protocol)
        assert assigned == dict(zip(((item.id, n) for item, n in images_of(items, 4)), files, strict=True))


def test_folders_that_are_numbered_otherwise_are_an_error(tmp_path):
    items = BENCHMARK.load(EXAMPLE)
    BENCHMARK.finish(tmp_path, items)
    (tmp_path / "99999" / "samples").mkdir(parents=True)  # of no prompt
    (tmp_path / "grids" / "samples").mkdir(parents=True)
    BENCHMARK.check_folder(tmp_path, items)
    BENCHMARK.check_folder(tmp_path, items[2:4])  # of some prompts
    (tmp_path / "00003").rename(tmp_path / "3")  # the same number
    BENCHMARK.check_folder(tmp_path, items)
    (tmp_path / "00002").rename(tmp_path / "x")
    (tmp_path / "3").rename(tmp_path / "00002")
    with pytest.raises(ValueError, match=rf"00002/metadata.jsonl .*{items[3].prompt}.*row 2 .*{items[2].prompt}"):
        BENCHMARK.check_folder(tmp_path, items)
    BENCHMARK.check_folder(tmp_path, items[4:])
    (tmp_path / "00002" / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=r"00002/metadata\.jsonl .*missing"):
        BENCHMARK.check_folder(tmp_path, items)


def test_which_file_is_which_image():
    items = make_items(MUG_LEFT_OF_LAMP, MUG_LEFT_OF_LAMP)
    files = [
        "0/samples/0001.jpg",
        "00001/samples/12.png",
        "00001/samples/0002.png.bak",
        "00001/0003.png",
        "x/samples/0000.png",
    ]
    official = BENCHMARK.assign(items, sorted(files), "official")
    assert official == {("00001", 0): "00001/samples/0002.png.bak", ("00001", 1): "00001/samples/12.png"}
    assert BENCHMARK.assign(items, sorted(files), "fixed") == {("00000", 1): "0/samples/0001.jpg"}
    with pytest.raises(ValueError, match=r"0/samples/0001\.jpg, 00000/samples/1\.png"):
        BENCHMARK.assign(items, sorted([*files, "00000/samples/1.png"]), "fixed")


@pytest.mark.parametrize(
    "row, message",
    [
        ({"include": MUG_LEFT_OF_LAMP["include"], "prompt": "x"}, "`tag` None"),
        ({"tag": "position", "include": MUG_LEFT_OF_LAMP["include"], "prompt": " "}, "`prompt` ' '"),
        ({"tag": "position", "include": [], "prompt": "x"}, "asks for nothing"),
        (
            {"tag": "position", "include": [{"class": "mug", "count": 1, "position": ["beside", 0]}], "prompt": "x"},
            "left of",
        ),
        ({"tag": "colors", "include": [{"class": "mug", "count": 1, "color": "mauve"}], "prompt": "x"}, "mauve"),
    ],
)
def test_a_damaged_row_is_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=f"{FILE}, row 2.*{message}"):
        BENCHMARK.load(write_rows(tmp_path, [MUG_LEFT_OF_LAMP, row]))


def test_a_damaged_or_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{FILE} cannot be read"):
        BENCHMARK.load(tmp_path)
    (tmp_path / FILE).write_text(f"{json.dumps(MUG_LEFT_OF_LAMP)}\n{{\n")
    with pytest.raises(ValueError, match=f"{FILE}, line 2 is not JSON"):
        BENCHMARK.load(tmp_path)


@pytest.mark.skipif(not PUBLIC_FILE.is_file(), reason=f"there is no {PUBLIC_FILE}")
def test_the_published_file():
    assert sha256(PUBLIC_FILE.read_bytes()).hexdigest() == BENCHMARK.files[0].sha256
    items = BENCHMARK.load(PUBLIC_FILE.parent)
    assert len(items) == 553 and sum(item.is_spatial for item in items) == 100
    for item in items:
        (question,) = BENCHMARK.questions(item, "official")
        named = [entry["class"] for key in ("include", "exclude") for entry in item.data.get(key, ())]
        assert question.options["classes"] == list(dict.fromkeys(named))
