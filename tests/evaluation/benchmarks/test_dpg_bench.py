import csv
from collections import defaultdict
from pathlib import Path

import pytest

from tests.evaluation.benchmarks.yesno_checks import answer_all
from tests.evaluation.goldens import Golden, assert_same, goldens
from trl_spatial.evaluation.benchmarks import make_benchmark
from trl_spatial.evaluation.benchmarks.base import Evidence
from trl_spatial.evaluation.benchmarks.dpg_bench import DPGBench
from trl_spatial.evaluation.data_files import find_data
from trl_spatial.scenes import parse_description


HEADER = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,question_natural_language"
)


def write_table(folder: Path, rows) -> Path:
    """Rows of (item, proposition, dependency, tuple, question)."""
    with (folder / "dpg_bench.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER.split(","))
        for item, proposition, dependency, what, question in rows:
            writer.writerow([item, f"Prompt of {item}.", "", proposition, dependency, "", "", what, question])
    return folder


@pytest.fixture
def example():
    benchmark = DPGBench()
    return benchmark, benchmark.load(find_data(benchmark, "example"))


def read_golden(given, folder: Path):
    benchmark = DPGBench()
    benchmark.num_images = given.get("pic_num") or 4
    rows = [(row["item_id"], row["id"], row["dep"], row["tuple"], row["qkey"]) for row in given["rows"]]
    return benchmark, benchmark.load(write_table(folder, rows))


def make_evidence(benchmark, items, given, protocol) -> Evidence:
    images = benchmark.assign(items, sorted(given["images"]), protocol)
    replies = {}
    for item in items:
        for (id, number), tile in images.items():
            if id == item.id:
                file, _, place = tile.partition("#")
                answers = given["images"][file]["answers"]
                for i, row in enumerate(item.data["rows"]):
                    reply = answers[int(place or 0)].get(row["question"])
                    # the stub answers no to the black tiles of a picture that is no grid
                    is_black = int(place or 0) >= given["images"][file].get("tiles", 4)
                    replies[id, number, str(i)] = ["no" if is_black else reply]
    return Evidence(images, replies)


@goldens("dpg_bench")
def test_official_and_fixed_numbers_are_the_goldens(golden: Golden, tmp_path):
    if golden.official.get("error") and golden.fixed is None:
        with pytest.raises(ValueError, match=r"row|dependency"):
            benchmark, items = read_golden(golden.given, tmp_path)
            benchmark.official(items, make_evidence(benchmark, items, golden.given, "official"))
        return
    benchmark, items = read_golden(golden.given, tmp_path)
    evidence = make_evidence(benchmark, items, golden.given, "official")
    if golden.official.get("error"):
        with pytest.raises(ValueError, match="dependency"):
            benchmark.official(items, evidence)
    else:
        numbers = benchmark.official(items, evidence)
        found = {"score": "NaN" if numbers["overall"] is None else numbers["overall"]}
        for level in ("L1", "L2"):
            found[level] = {name[3:]: value for name, value in numbers.items() if name.startswith(level)}
        assert_same(found, {name: golden.official[name] for name in found})
        for file, scores in golden.official["per_image"].items():  # each file by itself
            alone = {key: tile for key, tile in evidence.images.items() if tile.partition("#")[0] == file}
            assert benchmark.official(items, Evidence(alone, evidence.replies))["overall"] == pytest.approx(
                100 * scores["mean"], abs=1e-3
            )
        dropped = golden.official["failed"]
        alone = {key: tile for key, tile in evidence.images.items() if tile.partition("#")[0] in dropped}
        assert benchmark.official(items, Evidence(alone, evidence.replies)) == {"overall": None}
    if golden.fixed:
        check_fixed(benchmark, items, make_evidence(benchmark, items, golden.given, "fixed"), golden.fixed)


def check_fixed(benchmark, items, evidence, expected):
    metrics = {metric.name: metric for metric in benchmark.fixed(items, evidence)}
    overall = metrics["overall"]
    of_item = defaultdict(list)
    for item, value in zip(overall.items, overall.values, strict=True):
        of_item[item].append(value)
    found = {
        "score": 100 * overall.estimate,
        "per_item": {item: sum(values) / len(values) for item, values in of_item.items()},
        "L1": {},
        "L2": {},
        "L2_without_dependencies": {},
    }
    for name, metric in metrics.items():
        category, _, addition = name[3:].partition(", ")
        if name.startswith(("L1 ", "L2 ")):
            found[f"{name[:2]}{'_without_dependencies' if addition else ''}"][category] = 100 * metric.estimate
    assert_same(found, expected, 1e-4)


def test_example_prompts_are_scenes(example):
    _, items = example
    assert [item.id for item in items if item.is_spatial] == [
        "red-left-of-blue",
        "triangle-above-diamond",
        "circle-behind-square",
    ]
    for item in items:
        assert parse_description(item.prompt).entities


@pytest.mark.parametrize("reply,share", [("yes", 1.0), ("no", 0.0)])
def test_whole_pass_on_the_example(example, reply, share):
    benchmark, items = example
    evidence = answer_all(benchmark, items, "official", lambda question: reply)
    assert set(benchmark.official(items, evidence).values()) == {100 * share}
    metrics = benchmark.fixed(items, evidence)
    assert {metric.estimate for metric in metrics} == {share}
    assert {metric.name for metric in metrics if metric.is_headline} == {"overall", "L2 relation - spatial"}
    assert "relation - spatial: front and behind" in {metric.name for metric in metrics}


def test_what_is_missing_counts_as_wrong_only_in_fixed(example):
    benchmark, items = example
    whole = answer_all(benchmark, items, "official", lambda question: "yes")
    images = {key: file for key, file in whole.images.items() if key != (items[1].id, 2)}
    replies = {key: reply for key, reply in whole.replies.items() if key[:2] != (items[1].id, 2)}
    replies[items[2].id, 0, "2"] = [None]
    replies[items[2].id, 1, "2"] = ["I cannot tell."]
    metrics = {metric.name: metric for metric in benchmark.fixed(items, Evidence(images, replies))}
    assert len(metrics["overall"].values) == 16
    assert metrics["overall"].estimate == pytest.approx((13 + 2 * 2 / 3) / 16)
    assert len(metrics["L2 relation - spatial"].values) == 12
    assert metrics["L2 relation - spatial"].estimate == pytest.approx(9 / 12)


def test_official_names_end_at_the_first_dot(example):
    benchmark, items = example
    files = ["deeper/circle-behind-square.png", "diamond-alone.final.jpg", "diamond-alone.png", "notes.txt"]
    official = benchmark.assign(items, files, "official")
    assert official == {
        ("diamond-alone", number): f"{file}#{number % 4}"
        for file, numbers in (("diamond-alone.final.jpg", range(4)), ("diamond-alone.png", range(4, 8)))
        for number in numbers
    }
    fixed = benchmark.assign(items, files, "fixed")
    assert fixed == {("diamond-alone", number): f"diamond-alone.png#{number}" for number in range(4)}


def test_two_files_that_may_be_one_grid_are_refused(example):
    benchmark, items = example
    with pytest.raises(ValueError, match=r"diamond-alone\.jpg, diamond-alone\.webp could be .* 'diamond-alone\.png'"):
        benchmark.assign(items, ["diamond-alone.jpg", "diamond-alone.webp"], "fixed")


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda row: (*row[:1], "one", *row[2:]), "row 2 has the proposition_id 'one'"),
        (lambda row: (*row[:2], "1;2", *row[3:]), "row 2 .* dependency '1;2'"),
        (lambda row: (*row[:4], " "), "row 2 has nothing in question_natural_language"),
        (lambda row: ("a/b", *row[1:]), "row 2 has the item_id 'a/b'"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, message):
    rows = [("a", 1, "0", "entity - whole (x)", "Is there x?"), ("a", 2, "1, 1", "other - count (x)", "Is it one?")]
    rows[1] = change(rows[1])
    with pytest.raises(ValueError, match=f"dpg_bench.csv, {message}"):
        DPGBench().load(write_table(tmp_path, rows))


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"dpg_bench\.csv cannot be read"):
        DPGBench().load(tmp_path)
    write_table(tmp_path, [])
    with pytest.raises(ValueError, match=r"dpg_bench\.csv has no rows"):
        DPGBench().load(tmp_path)
    (tmp_path / "dpg_bench.csv").write_text("item_id,text\na,b\n")
    with pytest.raises(ValueError, match="has no column proposition_id, dependency"):
        DPGBench().load(tmp_path)


def test_a_part_of_the_prompts_is_no_table_of_numbers(tmp_path):
    rows = [
        ("padding", 1, "0", "global - (x)", "?"),
        ("a", 1, "0", "entity - whole (x)", "?"),
        ("b", 1, "0,0", "entity - whole (x)", "?"),
    ]
    benchmark = make_benchmark("dpg-bench")
    items = benchmark.load(write_table(tmp_path, rows))[1:2]
    evidence = answer_all(benchmark, items, "official", lambda question: "yes")
    assert benchmark.official(items, evidence)["overall"] == 100
