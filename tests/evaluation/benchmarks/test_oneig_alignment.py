import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.benchmarks.yesno_checks import answer_all
from tests.evaluation.goldens import Golden, assert_same, goldens
from trl_spatial.evaluation.benchmarks.base import Evidence, Item, OfficialError
from trl_spatial.evaluation.benchmarks.oneig_alignment import OneIGAlignment, read_questions
from trl_spatial.evaluation.data_files import find_data
from trl_spatial.scenes import parse_description


@pytest.fixture
def example():
    benchmark = OneIGAlignment()
    return benchmark, benchmark.load(find_data(benchmark, "example"))


@goldens("oneig_alignment", "prompt")
def test_official_and_fixed_numbers_are_the_goldens(golden: Golden):
    benchmark, given = OneIGAlignment(), golden.given
    benchmark.num_images = given["tiles"]
    row = {"question": {str(id): "Is it?" for id in given["questions"]}, "dependency": given["dependencies"]}
    item = Item("object/000", "Prompt.", {"questions": read_questions(row, "row")})
    replies = {
        (item.id, number, id): [reply]
        for number, answers in enumerate(given["answers"])
        for id, reply in answers.items()
    }
    names = ["object/m/000.png", "object/m/000_again.png"][: given.get("files_found", 1)]
    evidence = Evidence(benchmark.assign([item], names, "official"), replies)
    if "error" in golden.official:
        with pytest.raises(OfficialError, match=r"numbers \[.*without a gap"):
            benchmark.official([item], evidence)
    else:
        assert_same(benchmark.official([item], evidence), {"alignment": golden.official["score"]})
    if golden.fixed:
        headline = next(metric for metric in benchmark.fixed([item], evidence) if metric.is_headline)
        assert_same(headline.estimate, golden.fixed["score_transitive"])


def test_example_prompts_are_scenes(example):
    _, items = example
    assert [item.id for item in items if not item.is_spatial] == ["object/001"]
    for item in items:
        assert parse_description(item.prompt).entities


@pytest.mark.parametrize("reply,share", [("Yes", 1.0), ("No", 0.0)])
def test_whole_pass_on_the_example(example, reply, share):
    benchmark, items = example
    evidence = answer_all(benchmark, items, "official", lambda question: reply)
    assert benchmark.official(items, evidence) == {"alignment": share}
    metrics = benchmark.fixed(items, evidence)
    assert {metric.estimate for metric in metrics} == {share}
    assert [metric.name for metric in metrics if metric.is_headline] == ["alignment"]
    assert "questions: front and behind" in {metric.name for metric in metrics}


def test_what_is_missing_or_unreadable_counts_as_wrong_only_in_fixed(example):
    benchmark, items = example
    whole = answer_all(benchmark, items, "official", lambda question: "Yes")
    images = {key: file for key, file in whole.images.items() if key[0] != "anime/000" and key != ("human/000", 3)}
    replies = {key: reply for key, reply in whole.replies.items() if key[:2] in images}
    evidence = Evidence(images, replies)
    assert benchmark.official(items, evidence) == {"alignment": 1}
    replies["human/000", 0, "3"] = ["Hard to say."]
    metrics = {metric.name: metric for metric in benchmark.fixed(items, evidence)}
    assert len(metrics["alignment"].values) == 20
    assert metrics["alignment"].estimate == pytest.approx((12 + 2 + 2 / 3) / 20)
    assert metrics["questions: front and behind"].estimate == 0.5


def test_official_files_begin_with_the_id_and_are_alone(example):
    benchmark, items = example
    files = [
        "anime/m/000_final.webp",
        "anime/m/001.jpg",
        "anime/m/0012.png",
        "human/m/000/0.png",
        "object/m/000.png",
        "object/m/000.txt",
    ]
    official = benchmark.assign(items, files, "official")
    assert official == {("anime/000", number): f"{files[0]}#{number}" for number in range(4)}
    fixed = benchmark.assign(items, files, "fixed")
    assert {tile.partition("#")[0] for tile in fixed.values()} == {files[0], files[1], files[4]}
    with pytest.raises(ValueError, match="several models: m, other"):
        benchmark.assign(items, [*files, "object/other/000.png"], "fixed")
    with pytest.raises(ValueError, match=r"000-a\.png, anime/m/000_final\.webp could be the grid of item 'anime/000'"):
        benchmark.assign(items, ["anime/m/000-a.png", *files], "fixed")


def test_what_was_drawn_is_found_by_both_protocols_and_black_is_no_image(example, tmp_path):
    benchmark, items = example
    drawn = {}
    for i, number in enumerate([0, 1, 3]):  # the third image was refused
        path = tmp_path / benchmark.image_path(items[0], number)
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn[number] = Image.new("RGB", (5, 4), (50 * i + 50, 0, 1))
        drawn[number].save(path)
    benchmark.finish(tmp_path, items)
    benchmark.finish(tmp_path, items)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert benchmark.assign(items, files, "fixed").keys() == {("anime/000", number) for number in drawn}
    official = benchmark.assign(items, files, "official")
    assert len(official) == 4
    for number, image in drawn.items():
        opened = benchmark.open(tmp_path, official["anime/000", number])
        assert np.array_equal(np.asarray(opened), np.asarray(image))
    with pytest.raises(ValueError, match="is black"):
        benchmark.open(tmp_path, official["anime/000", 2])


@pytest.mark.parametrize(
    "row,message",
    [
        ({"question": "{", "dependency": "{}"}, "row '000' has no question by number"),
        ({"question": '{"1": "Is it?"}', "dependency": "[0]"}, "row '000' has no dependency by number"),
        ({"question": '{"1": " "}', "dependency": "{}"}, "row '000' has no questions, or an empty one"),
        (
            {"question": '{"1": "Is it?"}', "dependency": '{"2": [1]}'},
            r"row .000. has dependencies of the questions \[2\]",
        ),
        (
            {"question": '{"1": "Is it?"}', "dependency": '{"1": "0"}'},
            "row .000. has the dependency .0. of question 1",
        ),
    ],
)
def test_bad_rows_are_named(example, tmp_path, row, message):
    benchmark, _ = example
    shutil.copytree(find_data(benchmark, "example"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "human.json").write_text(json.dumps({"000": row}))
    with pytest.raises(ValueError, match=rf"human\.json, {message}"):
        benchmark.load(tmp_path)


def test_bad_files_are_named(example, tmp_path):
    benchmark, _ = example
    with pytest.raises(ValueError, match=r"OneIG-Bench\.csv cannot be read"):
        benchmark.load(tmp_path)
    shutil.copytree(find_data(benchmark, "example"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "object.json").write_text("[]")
    with pytest.raises(ValueError, match=r"object\.json is not a JSON object"):
        benchmark.load(tmp_path)
    table = tmp_path / "OneIG-Bench.csv"
    table.write_text(table.read_text().replace("General_Object,001", "General_Object,009"))
    shutil.copy(find_data(benchmark, "example") / "object.json", tmp_path)
    with pytest.raises(ValueError, match=r"object\.json, row '001' has no prompt of the category General_Object"):
        benchmark.load(tmp_path)
    table.write_text("category,id\n")
    with pytest.raises(ValueError, match="has no column prompt_en"):
        benchmark.load(tmp_path)
