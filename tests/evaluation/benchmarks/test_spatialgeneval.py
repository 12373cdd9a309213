"""SpatialGenEval: the official program's numbers, and the corrected ones."""

import json
from hashlib import sha256
from pathlib import Path

import pytest

from tests.evaluation.benchmarks.asking import all_files, ask, by_name, collect
from tests.evaluation.goldens import assert_same, goldens
from trl_spatial.evaluation.benchmarks import make_benchmark
from trl_spatial.evaluation.benchmarks.base import Item, OfficialError
from trl_spatial.evaluation.benchmarks.spatialgeneval import (
    DIMENSIONS,
    check_votes,
    read_letters,
    select_options,
    shown_options,
    split_question,
)
from trl_spatial.evaluation.data_files import find_data
from trl_spatial.scenes import parse_description


BENCHMARK = make_benchmark("spatialgeneval")
FILE = BENCHMARK.files[0].name
EXAMPLE = find_data(BENCHMARK, "example")


@pytest.fixture(scope="module")
def items():
    return BENCHMARK.load(EXAMPLE)


def item_of(row):
    return Item(str(row["id"]), row["prompt"], row)


def reply_of(letters):
    return "\n".join(f"{letter}: what it shows" for letter in letters)


def answer_with(choose):
    """A judge that picks the option `choose(question, letter → option, right option)`, whatever its letter."""

    def judge(item, number, question, attempt):
        lines = question.text.split("\n")
        questions = [split_question(line) for line in lines if "Options:" in line]
        keys = [
            split_question(text)[1].get(key)
            for text, key in zip(item.data["questions"], item.data["answers"], strict=True)
        ]
        return reply_of(choose(text, options, key) for (text, options), key in zip(questions, keys, strict=True))

    return judge


def the_right_one(text, options, key):
    return next((letter for letter, option in options.items() if option == key), "E")


@goldens("spatialgeneval", "votes")
def test_votes_are_counted_as_officially(golden):
    answers, votes, min_votes = (golden.given[name] for name in ("answers", "preds", "min_count"))
    columns = [[vote[i] for vote in votes if len(vote) > i] for i in range(len(answers))]
    selected = [select_options(column, min_votes)[0] or ["(No valid predictions)"] for column in columns]
    assert selected == golden.official["selected"]
    assert check_votes(answers, votes, min_votes) == golden.official["correct"]


@goldens("spatialgeneval", "item")
def test_an_item_scores_as_officially(golden):
    given = golden.given
    questions = [f"Q{i}?  Options: A: a, B: b, C: c, D: d, E: None" for i in range(given["questions"])]
    row = {"id": 1, "scene": "Forest", "prompt": "a", "questions": questions, "answers": given["answers"]}
    if "empty_field" in given:
        row[given["empty_field"]] = type(row[given["empty_field"]])()
    item = item_of(row)
    replies = [None if reply == "!raise" else reply for reply in given["replies"]]
    num_calls = 0

    def judge(item, number, question, attempt):
        nonlocal num_calls
        num_calls += 1
        return replies[min(attempt, len(replies) - 1)]

    evidence = collect(BENCHMARK, [item], ["000001.png"], "official", judge)
    assert num_calls == golden.official["calls"]
    result = golden.official["result"]
    if result is None:
        with pytest.raises(OfficialError, match="five usable answers"):
            BENCHMARK.official([item], evidence)
        return
    numbers = BENCHMARK.official([item], evidence)
    hits = [bool(numbers[dimension]) for dimension in DIMENSIONS if dimension in numbers]
    assert hits == result["true-or-false"]
    for name, start, end in (("avg_acc", 0, 10), ("basic_acc", 0, 2), ("spatial_acc", 2, 10)):
        right, total = map(int, result[name].split("/"))
        assert (sum(hits[start:end]), len(hits[start:end])) == (right, total)
        # the program divides by 10, 2 and 8, however many questions there are
        assert numbers[name] == pytest.approx(right / (end - start), abs=5e-4)


@goldens("spatialgeneval", "run")
def test_a_run_scores_as_officially(golden):
    items, evidence = official_run(golden.given)
    stage1, stage2 = golden.official["stage1"], golden.official.get("stage2")
    if isinstance(stage1, dict) or stage1 == "nothing written":
        with pytest.raises(OfficialError):
            BENCHMARK.official(items, evidence)
        return
    numbers = BENCHMARK.official(items, evidence)
    found = {"columns": [f"{numbers[dimension]:.3f}" for dimension in DIMENSIONS if dimension in numbers]}
    found |= {name: f"{numbers[f'{name}_acc']:.3f}" for name in ("avg", "basic", "spatial")}
    assert found == stage2
    for id, file, score in stage1:
        [item] = [item for item in items[: len(golden.given["rows"])] if int(item.id) == id]
        assert Path(evidence.images[item.id, 0]).name == file
        assert hits_of(item, evidence) == int(score.partition("/")[0])


def hits_of(item, evidence):
    """How many questions of an item are right."""
    alone = BENCHMARK.official([item], evidence)
    return round(sum(alone[dimension] for dimension in DIMENSIONS))


def official_run(given):
    rows = [item_of(row) for row in given["rows"]]

    def judge(item, number, question, attempt):
        replies = given["replies"].get(evidence_files[item.id], [None])
        return replies[min(attempt, len(replies) - 1)]

    evidence_files = {id: file for (id, _), file in BENCHMARK.assign(rows, sorted(given["files"]), "official").items()}
    evidence = collect(BENCHMARK, rows, given["files"], "official", judge)
    scenes = given.get("scenes") or {row.data["scene"] for row in rows}
    items = [row for row in rows if row.data["scene"] in scenes]
    # results are appended to those of earlier runs, which were of all rows or of the first ones
    return items * (1 + given.get("appended_again", 0)) + items[: given.get("appended_first", 0)], evidence


@goldens("spatialgeneval", "run")
def test_a_run_scores_as_it_should(golden):
    if golden.fixed is None:
        return
    given = golden.given
    items = [item_of(row) for row in given["rows"]]

    def judge(item, number, question, attempt):
        """The reply that the official program got, in the letters of the shuffled options."""
        vote = int(question.key.split()[1])
        replies = [reply for reply in given["replies"].get(BENCHMARK.image_path(item, number), []) if "\n" in reply]
        if not replies:
            return None
        texts = [split_question(text)[1] | {"E": ""} for text in item.data["questions"]]
        lines = [line for line in replies[min(vote, len(replies) - 1)].split("\n") if line.strip()]
        return reply_of(
            next(letter for letter, option in shown.items() if option == options[line[0]])
            for shown, options, line in zip(shown_options(item, vote), texts, lines, strict=True)
        )

    numbers = by_name(BENCHMARK.fixed(items, collect(BENCHMARK, items, given["files"], "fixed", judge)))
    found = {"columns": [numbers[dimension] for dimension in DIMENSIONS]}
    found |= {name: numbers[f"{name}_acc"] for name in ("avg", "basic", "spatial")}
    assert_same(found, golden.fixed)


@pytest.mark.parametrize("protocol", ["official", "fixed"])
def test_right_answers_score_one(items, protocol):
    evidence = collect(BENCHMARK, items, all_files(BENCHMARK, items), protocol, answer_with(the_right_one))
    if protocol == "official":
        assert set(BENCHMARK.official(items, evidence).values()) == {1.0}
    else:
        numbers = by_name(BENCHMARK.fixed(items, evidence))
        assert numbers == dict.fromkeys(numbers, 1.0)
        assert {"Orientation", "Occlusion", "spatial_acc, corrected for chance"} < numbers.keys()


@pytest.mark.parametrize("letter", "ABCDE")
def test_one_letter_for_everything_gains_nothing(items, letter):
    judge = answer_with(lambda text, options, key: letter if letter in options else "A")
    evidence = collect(BENCHMARK, items, all_files(BENCHMARK, items), "fixed", judge)
    numbers = by_name(BENCHMARK.fixed(items, evidence))
    assert numbers["spatial_acc"] == 0 and numbers["spatial_acc, corrected for chance"] < 0
    # officially it gains the share of the letter among the keys
    evidence = collect(BENCHMARK, items, all_files(BENCHMARK, items), "official", judge)
    share = sum(key == letter for item in items for key in item.data["answers"]) / 40
    assert BENCHMARK.official(items, evidence)["avg_acc"] >= share


def test_a_guess_that_never_changes_scores_zero_after_the_correction(items):
    """Whoever picks the same wording in each vote is right by chance: over all ways to pick, the mean is 0."""
    [item, *_] = items
    scores = []
    for pick in range(12):  # of three options as well as of four
        wordings = [list(split_question(text)[1].values())[:-1] for text in item.data["questions"]]

        def choose(text, options, key, pick=pick, wordings=wordings):
            known = next(words for words in wordings if set(words) <= set(options.values()) and key in words)
            return next(letter for letter, option in options.items() if option == known[pick % len(known)])

        evidence = collect(BENCHMARK, [item], all_files(BENCHMARK, [item]), "fixed", answer_with(choose))
        scores.append(by_name(BENCHMARK.fixed([item], evidence))["spatial_acc, corrected for chance"])
    assert sum(scores) == pytest.approx(0)


def test_each_vote_sees_the_same_options_in_another_order(items):
    for item in items:
        for i, text in enumerate(item.data["questions"]):
            options = split_question(text)[1]
            orders = [shown_options(item, vote)[i] for vote in range(5)]
            for order in orders:
                assert sorted(list(order.values())[:-1]) == sorted(list(options.values())[:-1])
                assert list(order)[-1] == "E" and order["E"] == ""
            right = options[item.data["answers"][i]]
            places = [next(letter for letter, option in order.items() if option == right) for order in orders]
            assert max(map(places.count, places)) <= 2
    questions = BENCHMARK.questions(items[0], "fixed")
    assert len({question.key for question in questions}) == len({question.text for question in questions}) == 5
    assert all("E: None" in question.text for question in questions)


def test_missing_images_count_as_wrong(items):
    files = all_files(BENCHMARK, items)
    evidence = collect(BENCHMARK, items, files[1:], "fixed", answer_with(the_right_one))
    metrics = BENCHMARK.fixed(items, evidence)
    assert by_name(metrics)["avg_acc"] == (len(items) - 1) / len(items)
    assert {len(metric.values) for metric in metrics if metric.name in DIMENSIONS} == {len(items)}


def test_four_of_five_votes_are_needed(items):
    def judge(num_right):
        right, wrong = answer_with(the_right_one), answer_with(lambda *about: "E")
        return lambda item, number, question, attempt: (right if int(question.key[-1]) < num_right else wrong)(
            item, number, question, attempt
        )

    for num_right, expected in ((3, 0), (4, 1)):
        evidence = collect(BENCHMARK, items, all_files(BENCHMARK, items), "fixed", judge(num_right))
        assert by_name(BENCHMARK.fixed(items, evidence))["spatial_acc"] == expected


def test_files_are_paired_by_place_officially_and_by_number_otherwise(items):
    files = ["0.txt", "000002.png", "3.jpg", "sub/000001.png"]
    official = BENCHMARK.assign(items, files, "official")
    assert official == {("000001", 0): "0.txt", ("000002", 0): "000002.png", ("000003", 0): "3.jpg"}
    assert BENCHMARK.assign(items, files, "fixed") == {("000002", 0): "000002.png", ("000003", 0): "3.jpg"}
    with pytest.raises(ValueError, match=r"'000003\.png'"):
        BENCHMARK.assign(items, ["0003.jpg", "3.png"], "fixed")


@pytest.mark.parametrize(
    "line, letter",
    [
        ("C: thing - reason", "C"), ("c: thing", "C"), ("**C**: thing", "C"), ("(C) thing", "C"), ("1. C: thing", "C"),
        ("10) **C** - thing", "C"), ("Answer: C", "C"), ("The correct answer is C.", "C"), ("Q3: C. thing", "C"),
        ("E: None - hidden", "E"), ("- D", "D"), ("A red circle is left", None), ("because it is red", None),
        ("F: thing", None), ("Based on the image, C", None), ("1", None), ("", None),
    ],
)  # fmt: skip
def test_a_letter_is_read_in_any_usual_form(line, letter):
    assert read_letters(line, 1) == (None if letter is None else [letter])


def test_remarks_between_the_answers_are_skipped():
    assert read_letters("Here are my answers\nA: x\nbecause of y\n\nB: z", 2) == ["A", "B"]
    assert read_letters("A: x\nB: z", 3) is None and read_letters(None, 2) is None


def test_questions_are_asked_a_bounded_number_of_times(items):
    [question] = BENCHMARK.questions(items[0], "official")
    assert len(ask(question, lambda attempt: "nonsense")) == 25
    assert sum(len(ask(q, lambda attempt: "x")) for q in BENCHMARK.questions(items[0], "fixed")) == 25


def test_the_official_program_knows_one_image_for_each_prompt(items):
    four = make_benchmark("spatialgeneval")
    four.num_images = 4
    evidence = collect(four, items, all_files(four, items)[:-1], "fixed", answer_with(the_right_one))
    assert by_name(four.fixed(items, evidence))["avg_acc"] == pytest.approx(15 / 16)
    with pytest.raises(OfficialError, match="one image"):
        four.official(items, collect(four, items, all_files(four, items), "official", answer_with(the_right_one)))


def test_example_rows_are_scenes_of_the_flat_world(items):
    assert len(items) == 4 and all(item.is_spatial for item in items)
    for item in items:
        assert len(parse_description(item.prompt).entities) == 3


@pytest.mark.parametrize(
    "change, words",
    [
        ({"id": "one"}, "row 2.*digits"), ({"id": "000001"}, "row 2 has the id 000001"), ({"prompt": " "}, "row 2.*prompt"),
        ({"scene": None}, "row 2.*scene"), ({"answers": ["A"] * 9}, "row 2.*10 texts"), ({"answers": ["E"] * 10}, "row 2.*'E'"),
        ({"questions": ["Why?"] * 10}, "row 2.*question 1 needs"), ({"question_type": ["Object"]}, "row 2.*question_type"),
    ],
)  # fmt: skip
def test_a_damaged_row_is_named(tmp_path, change, words):
    rows = [json.loads(line) for line in (EXAMPLE / FILE).read_text().splitlines()]
    rows[1] |= change
    (tmp_path / FILE).write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=f"{FILE}, {words}"):
        BENCHMARK.load(tmp_path)


def test_a_question_without_its_right_option_is_listed_and_left_out(tmp_path):
    rows = [json.loads(line) for line in (EXAMPLE / FILE).read_text().splitlines()]
    rows[0]["questions"][3] = "Where does it point?  Options: A: up, B: down, C: left, E: None"
    (tmp_path / FILE).write_text("\n".join(map(json.dumps, rows)))
    items = BENCHMARK.load(tmp_path)
    assert [item.data.get("faults", []) for item in items[1:]] == [[]] * 3
    [fault] = items[0].data["faults"]
    assert fault == "question 4 has no option D, which is its answer"
    evidence = collect(BENCHMARK, items, all_files(BENCHMARK, items), "fixed", answer_with(the_right_one))
    metrics = {metric.name: metric for metric in BENCHMARK.fixed(items, evidence)}
    assert len(metrics["Orientation"].values) == 3 and metrics["avg_acc"].estimate == 1


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=FILE):
        BENCHMARK.load(tmp_path)


def test_the_published_file_is_read_whole():
    path = Path(__file__).parents[4] / "shared" / "bench_data" / "spatialgeneval" / FILE
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    assert sha256(path.read_bytes()).hexdigest() == BENCHMARK.files[0].sha256
    assert len(BENCHMARK.load(path.parent)) == 1230
