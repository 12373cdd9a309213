"""UniGenBench++: the official program's numbers, and the corrected ones."""

import csv
import json
from hashlib import sha256
from pathlib import Path

import pytest

from tests.evaluation.benchmarks.asking import all_files, ask, by_name, collect
from tests.evaluation.goldens import assert_same, goldens
from trl_spatial.evaluation.benchmarks import make_benchmark
from trl_spatial.evaluation.benchmarks.base import Evidence, OfficialError
from trl_spatial.evaluation.benchmarks.unigenbench import (
    CONFIRMED,
    LAYOUT,
    TEST_POINTS,
    fixed_scores,
    parse_reply,
    tally,
)
from trl_spatial.evaluation.data_files import find_data
from trl_spatial.scenes import parse_description


SHORT, LONG = make_benchmark("unigenbench-short"), make_benchmark("unigenbench-long")
NAMES = {"short": SHORT, "long": LONG}


@pytest.fixture(params=NAMES)
def benchmark(request):
    return NAMES[request.param]


def load_example(benchmark):
    return benchmark.load(find_data(benchmark, "example"))


def reply_of(scores):
    return f"<analysis>{['seen'] * len(scores)}</analysis><score>{list(scores)}</score>"


def always(score):
    """A judge that gives every point the same score, whatever it is asked."""

    def judge(item, number, question, attempt):
        is_layout = question.key != "test points"
        points = [point for point in item.data["Testpoints"] if not is_layout or point.startswith(LAYOUT)]
        return reply_of([score] * len(points))

    return judge


def the_right_one(item, number, question, attempt):
    return always(int(question.key == "test points"))(item, number, question, attempt)


def write_table(folder, benchmark, rows, columns=("index", "prompt_en", "sub_dims_en")):
    with (folder / benchmark.files[0].name).open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


@goldens("unigenbench", "parse")
def test_replies_are_read_as_officially(golden):
    text, num_points = golden.given["text"], len(golden.given["testpoints"])
    if "error" in golden.official:
        with pytest.raises(OfficialError):
            parse_reply(text, num_points)
        assert fixed_scores(text, num_points) is None
        return
    parsed = parse_reply(text, num_points)
    if golden.official["parsed"] is None:
        assert parsed is None
        return
    analysis, score = parsed
    found = {"analysis_len": len(analysis), "score": score, "score_type": type(score).__name__}
    assert_same(json.loads(json.dumps(found)), golden.official["parsed"])


def run_of(given, folder, protocol):
    """The benchmark, items and evidence of a golden run, whose rows are read from a file of the benchmark's."""
    benchmark = make_benchmark("unigenbench-short")
    benchmark.num_images = given.get("images_per_prompt", 4)
    rows = []
    for row in given["rows"]:
        points = {"Testpoints": row.get("testpoints"), "Testpoint Description": row.get("testpoints")}
        rows.append((row["index"], row["prompt"], row.get("raw_sub_dims", json.dumps(points))))
    write_table(folder, benchmark, rows)
    items = benchmark.load(folder)
    num_calls = {}

    def judge(item, number, question, attempt):
        if question.key != "test points":
            return None
        file = benchmark.image_path(item, number)
        num_calls[file] = attempt + 1
        replies = given["replies"].get(file, [None])
        return replies[min(attempt, len(replies) - 1)]

    files = set(all_files(benchmark, items)) - set(given.get("absent_images", ()))
    return benchmark, items, collect(benchmark, items, files, protocol, judge), num_calls


@goldens("unigenbench", "run")
def test_a_run_scores_as_officially(golden, tmp_path):
    benchmark, items, evidence, num_calls = run_of(golden.given, tmp_path, "official")
    if "error" in golden.official:
        with pytest.raises(OfficialError):
            benchmark.official(items, evidence)
        return
    numbers = benchmark.official(items, evidence)
    expected = {name: row[2] for table in ("primary", "sub") for name, row in golden.official[table].items()}
    overall = numbers.pop("overall")
    assert_same(numbers, expected)
    primary = [row[2] for row in golden.official["primary"].values()]
    assert overall == (pytest.approx(sum(primary) / len(primary)) if primary else None)
    if golden.official["calls"] is not None:
        assert num_calls == golden.official["calls"]


@goldens("unigenbench", "run")
def test_a_run_scores_as_it_should(golden, tmp_path):
    if golden.fixed is None:
        return
    benchmark, items, evidence, _ = run_of(golden.given, tmp_path, "fixed")
    metrics = {metric.name: metric for metric in benchmark.fixed(items, evidence) if metric.name != CONFIRMED}
    overall = metrics.pop("overall")
    found = {name: [metric.values.sum(), len(metric.values)] for name, metric in metrics.items()}
    assert_same(found, golden.fixed["primary"] | golden.fixed["sub"])
    assert overall.estimate == pytest.approx(golden.fixed["overall_mean_of_primary"], abs=1e-6)


def test_scores_are_added_up_by_test_point_and_by_what_stands_before_the_dash():
    primary, points = tally([(["A - B", "A - C", "D"], [1, 0, True]), (["A - B"], ["1"])])
    assert primary == {"A ": (1, 3), "D": (1, 1)}
    assert points == {"A - B": (1, 2), "A - C": (0, 1), "D": (1, 1)}


@pytest.mark.parametrize("protocol", ["official", "fixed"])
def test_right_answers_score_one(benchmark, protocol):
    items = load_example(benchmark)
    evidence = collect(benchmark, items, all_files(benchmark, items), protocol, the_right_one)
    if protocol == "official":
        assert set(benchmark.official(items, evidence).values()) == {1.0}
    else:
        numbers = by_name(benchmark.fixed(items, evidence))
        assert numbers == dict.fromkeys(numbers, 1.0)
        assert {"overall", LAYOUT, CONFIRMED, f"{LAYOUT} - Three-Dimensional Space"} < numbers.keys()


@pytest.mark.parametrize("score", [0, 1])
def test_one_score_for_everything_gains_nothing_when_asked_both_ways(benchmark, score):
    items = load_example(benchmark)
    evidence = collect(benchmark, items, all_files(benchmark, items), "fixed", always(score))
    numbers = by_name(benchmark.fixed(items, evidence))
    assert numbers[LAYOUT] == score and numbers[CONFIRMED] == 0


def test_only_layout_is_asked_both_ways_and_only_by_the_fixed_protocol():
    items = load_example(SHORT)
    assert [item.is_spatial for item in items] == [True, True, False, True]
    for item in items:
        official, fixed = SHORT.questions(item, "official"), SHORT.questions(item, "fixed")
        assert [question.text for question in official] == [question.text for question in fixed[:1]]
        assert len(official) == 1 and len(fixed) == 1 + item.is_spatial
        assert item.prompt in official[0].text
        assert all(text in official[0].text for text in item.data["Testpoint Description"])
    negated = SHORT.questions(items[0], "fixed")[1]
    assert "1 if it is not met" in negated.text and "Attribute" not in negated.text
    assert negated.is_usable(reply_of([0, 0])) and not negated.is_usable(reply_of([0, 0, 0, 0]))


def test_missing_images_and_answers_count_as_wrong():
    items = load_example(SHORT)
    files = all_files(SHORT, items)
    metrics = SHORT.fixed(items, collect(SHORT, items, files[1:], "fixed", the_right_one))
    layout = {metric.name: metric for metric in metrics}[LAYOUT]
    assert len(layout.values) == 5 * 4 and layout.estimate == pytest.approx(18 / 20)
    assert by_name(metrics)[CONFIRMED] == pytest.approx(18 / 20)

    def half_silent(item, number, question, attempt):
        return the_right_one(item, number, question, attempt) if question.key == "test points" else None

    numbers = by_name(SHORT.fixed(items, collect(SHORT, items, files, "fixed", half_silent)))
    assert numbers[LAYOUT] == 1 and numbers[CONFIRMED] == 0
    assert set(by_name(SHORT.fixed(items, Evidence({}, {}))).values()) == {0.0}


def test_a_question_is_asked_eleven_times_at_most():
    [question] = SHORT.questions(load_example(SHORT)[2], "official")
    assert len(ask(question, lambda attempt: "nonsense")) == 11
    assert len(ask(question, lambda attempt: reply_of([1, 0, 1]) if attempt == 3 else None)) == 4


def test_names_are_exact_officially_and_other_formats_do_otherwise():
    items = load_example(SHORT)[:2]
    files = ["0_0.jpg", "000_1.png", "0_2.png", "1_0.webp", "1_1.txt", "model/1_2.png"]
    assert SHORT.assign(items, files, "official") == {("0", 2): "0_2.png"}
    assert SHORT.assign(items, files, "fixed") == {
        ("0", 0): "0_0.jpg", ("0", 1): "000_1.png", ("0", 2): "0_2.png", ("1", 0): "1_0.webp",
    }  # fmt: skip
    assert SHORT.assign(items, ["0_0.jpg", "0_0.png"], "fixed") == {("0", 0): "0_0.png"}
    with pytest.raises(ValueError, match=r"0_0\.jpg, 0_0\.webp.*item '0'"):
        SHORT.assign(items, ["0_0.jpg", "0_0.webp"], "fixed")


def test_example_rows_are_scenes_of_the_flat_world(benchmark):
    items = load_example(benchmark)
    assert len(items) == 4
    for item in items:
        assert len(parse_description(item.prompt).relations) in (1, 2)
        assert set(item.data["Testpoints"]) <= TEST_POINTS


def points_of(points, descriptions):
    return json.dumps({"Testpoints": points, "Testpoint Description": descriptions})


def test_a_missing_comma_is_repaired_and_named(tmp_path):
    raw = points_of(["Style", "World Knowledge"], ["a", "b"]).replace('"Style",', '"Style"')
    write_table(tmp_path, LONG, [(509, "a picture", raw)])
    [item] = LONG.load(tmp_path)
    assert item.data["Testpoints"] == ["Style", "World Knowledge"]
    assert "Expecting ',' delimiter" in item.data["fault"]
    evidence = collect(LONG, [item], all_files(LONG, [item]), "official", the_right_one)
    with pytest.raises(OfficialError, match="item 509"):
        LONG.official([item], evidence)
    assert by_name(LONG.fixed([item], evidence))["overall"] == 1


@pytest.mark.parametrize(
    "row, words",
    [
        (("x", "a", points_of(["Style"], ["a"])), "row 2.*index"),
        (("1", " ", points_of(["Style"], ["a"])), "row 2.*prompt"),
        (("1", "a"), "row 2.*exactly"),
        (("1", "a", points_of(["Style"], ["a"]), "more"), "row 2.*exactly"),
        (("0", "a", points_of(["Style"], ["a"])), "row 2 has the index 0"),
        (("1", "a", "Style"), "row 2.*not JSON"),
        (("1", "a", "[]"), "row 2.*lists of texts"),
        (("1", "a", points_of([], [])), "row 2.*lists of texts"),
        (("1", "a", points_of(["Style"], [1])), "row 2.*lists of texts"),
        (("1", "a", points_of(["Style"], ["a", "b"])), "row 2.*1 test points and 2"),
    ],
)
def test_a_damaged_row_is_named(tmp_path, row, words):
    write_table(tmp_path, SHORT, [("0", "a", points_of(["Style"], ["a"])), row])
    with pytest.raises(ValueError, match=rf"test_prompts_en\.csv, {words}"):
        SHORT.load(tmp_path)


def test_other_columns_and_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"test_prompts_en\.csv cannot be read"):
        SHORT.load(tmp_path)
    write_table(tmp_path, SHORT, [], columns=("index", "prompt_zh", "sub_dims_zh"))
    with pytest.raises(ValueError, match="prompt_zh"):
        SHORT.load(tmp_path)


def test_the_published_files_are_read_whole(benchmark):
    folder = Path(__file__).parents[4] / "shared" / "bench_data" / "unigenbench"
    [file] = benchmark.files
    if not (folder / file.name).is_file():
        pytest.skip(f"there is no {folder}")
    assert sha256((folder / file.name).read_bytes()).hexdigest() == file.sha256
    items = benchmark.load(folder)
    assert len(items) == 600 and sum(item.is_spatial for item in items) == {SHORT: 134, LONG: 311}[benchmark]
    assert [item.id for item in items if "fault" in item.data] == {SHORT: [], LONG: ["509"]}[benchmark]
    assert {point for item in items for point in item.data["Testpoints"]} <= TEST_POINTS
