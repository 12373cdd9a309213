"""GenEval 2: the official program's numbers, and the corrected ones."""

import json
from hashlib import sha256
from pathlib import Path

import pytest

from tests.evaluation.benchmarks.asking import all_files, by_name, collect
from tests.evaluation.goldens import FOLDER, assert_same, goldens
from trl_spatial.evaluation.benchmarks import make_benchmark
from trl_spatial.evaluation.benchmarks.base import Evidence, Item, OfficialError
from trl_spatial.evaluation.benchmarks.geneval2 import (
    IMAGE_MAP,
    SKILLS,
    accepted_spellings,
    fixed_score,
    hard_score,
    opposite_question,
    soft_score,
    vqascore_text,
)
from trl_spatial.evaluation.data_files import find_data
from trl_spatial.scenes import parse_description


BENCHMARK = make_benchmark("geneval2")
FILE = BENCHMARK.files[0].name
EXAMPLE = find_data(BENCHMARK, "example")


@pytest.fixture(scope="module")
def items():
    return BENCHMARK.load(EXAMPLE)


def reply_with(probabilities, spellings, table=None):
    """A reply in which the rest of the probability is on another token; spellings are one token each unless the table says otherwise."""
    rest = 1 - sum(probabilities.values())
    tokens = {spelling: (table or {}).get(spelling, [spelling]) for spelling in spellings}
    return {"probabilities": {**probabilities, "<rest>": max(rest, 0.0)}, "tokens": tokens}


def always(answer, probability=1.0):
    return lambda item, number, question, attempt: reply_with({answer: probability}, question.options["spellings"])


def the_right_one(item, number, question, attempt):
    if question.key == "whole prompt":
        return always("Yes")(item, number, question, attempt)
    _, place, *opposite = question.key.replace(",", "").split()
    answer = "No" if opposite else item.data["vqa_list"][int(place)][1]
    return always(answer)(item, number, question, attempt)


@goldens("geneval2", "atom")
def test_an_atom_scores_as_officially_and_as_it_should(golden):
    question, answer = golden.given["question"], golden.given["answer"]
    table = json.loads((FOLDER / "geneval2" / "tokens.json").read_text())["table"]
    spellings = accepted_spellings(question, answer)
    reply = reply_with(golden.given["token_probs"], spellings, table)
    assert soft_score(reply, spellings) == pytest.approx(golden.official["soft"], abs=1e-6)
    assert hard_score(reply, spellings) == bool(golden.official["hard"])
    row = {"prompt": "a", "atom_count": 1, "vqa_list": [[question, answer]], "skills": ["object"]}
    item = Item("0", "a", row)
    assert BENCHMARK.questions(item, "official")[0].text == golden.official["asked"]
    if golden.fixed is not None:
        assert fixed_score(reply, spellings) == pytest.approx(golden.fixed["soft"], abs=1e-6)
        fixed = BENCHMARK.fixed([item], Evidence({("0", 0): "a.png"}, {("0", 0, "atom 0"): [reply]}))
        assert by_name(fixed)["soft_tifa_am"] == pytest.approx(golden.fixed["soft"], abs=1e-6)


@goldens("geneval2", "vqascore")
def test_a_whole_prompt_scores_as_officially(golden):
    prompt = golden.given["prompt"]
    row = {"prompt": prompt, "atom_count": 1, "vqa_list": [["Is it?", "Yes"]], "skills": ["object"]}
    items = [Item("0", prompt, row)]

    def judge(item, number, question, attempt):
        return reply_with(golden.given["token_probs"], question.options["spellings"])

    evidence = collect(BENCHMARK, items, all_files(BENCHMARK, items), "official", judge)
    questions = {question.key: question for question in BENCHMARK.questions(items[0], "official")}
    if "error" in golden.official:
        with pytest.raises(OfficialError):
            vqascore_text(prompt)
        assert "whole prompt" not in questions
        numbers = BENCHMARK.official(items, evidence)
        assert numbers["vqascore"] is None and numbers["soft_tifa_am"] > 0
        return
    assert questions["whole prompt"].text == golden.official["asked"]
    assert BENCHMARK.official(items, evidence)["vqascore"] == pytest.approx(100 * golden.official["score"], abs=1e-4)


def run_of(given, protocol):
    """Items and evidence of a golden run, whose scores are the probabilities of a yes."""
    items, files = [], []
    for i, row in enumerate(given["rows"]):
        atoms = [[f"Is it {j}?", "Yes"] for j in range(len(row["scores"]))]
        items.append(Item(str(i), row["prompt"], {**row, "vqa_list": atoms}))
        files += [] if row.get("image_missing") else [f"{i}.png"]

    def judge(item, number, question, attempt):
        place = 0 if question.key == "whole prompt" else int(question.key.split()[1])
        score = item.data["scores"][place]
        return reply_with({"Yes": score, "No": 1 - score}, question.options["spellings"])

    return items, collect(BENCHMARK, items, files, protocol, judge)


def tables_of(numbers):
    totals = {name: numbers[name] for name in ("soft_tifa_am", "soft_tifa_gm", "tifa", "vqascore") if name in numbers}
    skills = {skill: numbers[skill] for skill in SKILLS if skill in numbers}
    atoms = {name.split()[0]: number for name, number in numbers.items() if name.endswith("atoms")}
    return {**totals, "per_skill": skills, "per_atomicity": atoms}


@goldens("geneval2", "set")
def test_a_run_scores_as_officially(golden):
    items, evidence = run_of(golden.given, "official")
    if "error" in str(golden.official["soft_tifa_gm"]):
        with pytest.raises(OfficialError):
            BENCHMARK.official(items, evidence)
        return
    found = tables_of(BENCHMARK.official(items, evidence))
    for name, expected in golden.official.items():
        if expected == "not reached":
            continue
        if isinstance(expected, dict) and "error" in expected:
            assert set(found[name].values()) == {None}
        else:
            # to four places, and the program's probabilities have 24 bits
            assert_same(found[name], expected, tolerance=1.5e-4)


@goldens("geneval2", "set")
def test_a_run_scores_as_it_should(golden):
    if golden.fixed is None:
        return
    items, evidence = run_of(golden.given, "fixed")
    numbers = {name: 100 * number for name, number in by_name(BENCHMARK.fixed(items, evidence)).items()}
    assert_same(tables_of(numbers), golden.fixed, tolerance=6e-5)


@pytest.mark.parametrize("protocol", ["official", "fixed"])
def test_right_answers_score_one(items, protocol):
    evidence = collect(BENCHMARK, items, all_files(BENCHMARK, items), protocol, the_right_one)
    if protocol == "official":
        numbers = BENCHMARK.official(items, evidence)
        assert {numbers[name] for name in ("soft_tifa_gm", "soft_tifa_am", "tifa", "vqascore", *SKILLS)} == {100.0}
        assert numbers["3 atoms"] is None  # its analysis cannot do without any of the numbers of atoms
    else:
        numbers = by_name(BENCHMARK.fixed(items, evidence))
        assert numbers == dict.fromkeys(numbers, 1.0)
        assert {
            "position",
            "position, less the opposite",
            "behind and in front of, less the opposite",
            "5 atoms",
            "8 atoms",
        } < numbers.keys()


def test_the_official_analysis_takes_three_to_ten_atoms(items):
    """One prompt of each number, and then one of eleven atoms."""
    prompts = [Item(str(count), str(count), {**items[0].data, "atom_count": count}) for count in range(3, 12)]
    evidence = collect(BENCHMARK, prompts, all_files(BENCHMARK, prompts), "official", the_right_one)
    assert BENCHMARK.official(prompts[:-1], evidence)["5 atoms"] == 100
    assert BENCHMARK.official(prompts, evidence)["5 atoms"] is None


def test_who_always_says_yes_gains_nothing_from_relations(items):
    evidence = collect(BENCHMARK, items, all_files(BENCHMARK, items), "fixed", always("Yes"))
    numbers = by_name(BENCHMARK.fixed(items, evidence))
    assert numbers["position"] == 1 and numbers["position, less the opposite"] == 0
    assert numbers["count"] == 0 and numbers["soft_tifa_gm"] == 0


def test_who_always_says_no_gains_nothing_either(items):
    evidence = collect(BENCHMARK, items, all_files(BENCHMARK, items), "fixed", always("No"))
    assert set(by_name(BENCHMARK.fixed(items, evidence)).values()) == {0.0}


def test_missing_images_and_answers_count_as_wrong(items):
    evidence = collect(BENCHMARK, items, all_files(BENCHMARK, items)[1:], "fixed", the_right_one)
    metrics = {metric.name: metric for metric in BENCHMARK.fixed(items, evidence)}
    assert metrics["soft_tifa_gm"].estimate == 3 / 4
    assert metrics["position, less the opposite"].estimate == 3 / 4  # of four that have an opposite
    assert len(metrics["object"].values) == 9 and metrics["object"].estimate == pytest.approx(7 / 9)

    def without_opposites(item, number, question, attempt):
        return None if "opposite" in question.key else always("Yes")(item, number, question, attempt)

    evidence = collect(BENCHMARK, items, all_files(BENCHMARK, items), "fixed", without_opposites)
    assert by_name(BENCHMARK.fixed(items, evidence))["position, less the opposite"] == 0


def test_the_official_program_stops_without_an_image_or_an_answer(items):
    files = all_files(BENCHMARK, items)
    with pytest.raises(OfficialError, match=r"without an image.*red circle"):
        BENCHMARK.official(items, collect(BENCHMARK, items, files[1:], "official", the_right_one))
    with pytest.raises(OfficialError, match="'atom 0' of item 0000"):
        BENCHMARK.official(items, collect(BENCHMARK, items, files, "official", lambda *about: None))


@pytest.mark.parametrize(
    "reply", [None, "Yes", {}, {"probabilities": {}, "tokens": {}}, {"probabilities": {"Yes": 1.0}}]
)
def test_a_damaged_reply_is_not_usable(items, reply):
    [question, *_] = BENCHMARK.questions(items[0], "fixed")
    assert not question.is_usable(reply)
    assert question.is_usable(reply_with({"Yes": 1.0}, question.options["spellings"]))


def test_both_protocols_share_the_questions_about_atoms(items):
    for item in items:
        official, fixed = (
            {question.key: question.text for question in BENCHMARK.questions(item, protocol)}
            for protocol in ("official", "fixed")
        )
        shared = official.keys() & fixed.keys()
        assert len(shared) == len(item.data["vqa_list"])
        assert all(official[key] == fixed[key] for key in shared)
        assert all("opposite" in key for key in fixed.keys() - shared)


@pytest.mark.parametrize(
    "question, opposite",
    [
        ("Is the cat to the left of the dog?", "Is the cat to the right of the dog?"),
        ("Are the cats behind the dog?", "Are the cats in front of the dog?"),
        ("Is the cat under the box?", "Is the cat on top of the box?"),
        ("Is the cat in the box?", None),
        ("Is the cat on the box?", None),
    ],
)
def test_opposites(question, opposite):
    assert opposite_question(question) == opposite
    assert opposite is None or opposite_question(opposite) == question


def test_equal_prompts_have_one_image_officially(items):
    twice = [items[0], Item("0009", items[0].prompt, items[0].data), items[1]]
    files = ["0000.png", "0009.jpg"]
    assert BENCHMARK.assign(twice, files, "official") == {("0000", 0): "0009.jpg", ("0009", 0): "0009.jpg"}
    assert BENCHMARK.assign(twice, files, "fixed") == {("0000", 0): "0000.png", ("0009", 0): "0009.jpg"}
    assert BENCHMARK.assign(twice, files[:1], "official") == {("0000", 0): "0000.png", ("0009", 0): "0000.png"}
    with pytest.raises(ValueError, match="'0009'"):
        BENCHMARK.assign(twice, ["0009.jpg", "9.png"], "fixed")


def test_the_map_from_prompts_to_images_is_written(items, tmp_path):
    for item in items[1:]:
        (tmp_path / BENCHMARK.image_path(item, 0)).write_bytes(b"")
    BENCHMARK.finish(tmp_path, items)
    found = json.loads((tmp_path / IMAGE_MAP).read_text())
    assert found.keys() == {item.prompt for item in items[1:]}
    assert all(Path(path).is_file() and Path(path).is_absolute() for path in found.values())


def test_the_official_program_knows_one_image_for_each_prompt(items):
    two = make_benchmark("geneval2")
    two.num_images = 2
    evidence = collect(two, items, all_files(two, items)[1:], "fixed", the_right_one)
    assert by_name(two.fixed(items, evidence))["soft_tifa_gm"] == 7 / 8
    with pytest.raises(OfficialError, match="one image"):
        two.official(items, evidence)


def test_example_rows_are_scenes_of_the_flat_world(items):
    assert len(items) == 4 and all(item.is_spatial for item in items)
    for item in items:
        names = {entity.shape for entity in parse_description(item.prompt).entities}
        assert all(any(name in question for name in names) for question, _ in item.data["vqa_list"])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"prompt": ""}, "row 2: 'prompt'"), ({"atom_count": "5"}, "row 2: 'atom_count' is '5'"), ({"vqa_list": []}, "row 2: 'vqa_list'"),
        ({"vqa_list": [["Is it?"]]}, "row 2: .*not a question"), ({"vqa_list": [["Is it?", "No"]]}, "row 2: .*Only 'Yes'"),
        ({"skills": ["object"]}, "row 2: 'skills'"), ({"skills": ["space"] * 7}, "row 2: the skill 'space'"),
    ],
)  # fmt: skip
def test_a_damaged_row_is_named(tmp_path, change, words):
    rows = [json.loads(line) for line in (EXAMPLE / FILE).read_text().splitlines()]
    rows[1] |= change
    (tmp_path / FILE).write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=f"{FILE}, {words}"):
        BENCHMARK.load(tmp_path)


def test_the_published_file_is_read_whole():
    path = Path(__file__).parents[4] / "shared" / "bench_data" / "geneval2" / FILE
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    assert sha256(path.read_bytes()).hexdigest() == BENCHMARK.files[0].sha256
    assert len(BENCHMARK.load(path.parent)) == 800
