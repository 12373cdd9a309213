import json
import random
from pathlib import Path

import pytest

from tests.evaluation.benchmarks.yesno_checks import answer_all
from tests.evaluation.goldens import Golden, assert_same, goldens
from trl_spatial.evaluation.benchmarks.base import Evidence, Item
from trl_spatial.evaluation.benchmarks.tiif import (
    GROUPS,
    TEMPLATES,
    TIIF,
    choose_template,
    count_correct,
    fill_template,
    parse_reply,
    read_lines,
)
from trl_spatial.evaluation.data_files import find_data
from trl_spatial.scenes import parse_description


@pytest.fixture
def example():
    benchmark = TIIF()
    return benchmark, benchmark.load(find_data(benchmark, "example"))


def write_files(folder: Path, files) -> Path:
    """Files of questions, each line as it is, and files of prompts with as many lines."""
    for name in ("testmini_prompts", "testmini_eval_prompts"):
        (folder / name).mkdir()
    for i, lines in enumerate(files):
        (folder / "testmini_eval_prompts" / f"{i}_eval_prompts.jsonl").write_text("".join(f"{x}\n" for x in lines))
        prompts = []
        for line in lines:
            try:
                prompt = {"type": json.loads(line)["type"], "short_description": "Short.", "long_description": "Long."}
                prompts.append(json.dumps(prompt))
            except ValueError:
                prompts.append(line)
        (folder / "testmini_prompts" / f"{i}_prompts.jsonl").write_text("".join(f"{x}\n" for x in prompts))
    return folder


def row(type="style", questions=("Is it?",), answers=("yes",)) -> str:
    return json.dumps({"type": type, "yn_question_list": list(questions), "yn_answer_list": list(answers)})


@goldens("tiif", "parse")
def test_replies_are_read_as_officially(golden: Golden):
    assert parse_reply(golden.given["text"], golden.given["questions"]) == golden.official.get("preds")


@goldens("tiif", "template")
def test_the_template_is_drawn_as_officially(golden: Golden):
    template = choose_template(random.Random(golden.given["python_random_seed"]))
    assert TEMPLATES.index(template) == golden.official["template_index"]
    before, _, after = template.partition("##QUESTIONS##")
    message = fill_template(template, golden.given["questions"])
    assert message == before + golden.official["questions_in_message"] + after


@goldens("tiif", "tasks")
def test_images_are_found_as_officially(golden: Golden, tmp_path):
    benchmark, given = TIIF(), golden.given
    write_files(tmp_path, given["jsonl"].values())
    if golden.official.get("error") or {"index_shift", "mixed_types"} & set(golden.tags):
        # a line that would move all others, or be looked for in the folder of another type, is an error here
        with pytest.raises(ValueError, match=r"line \d|row \d|at least one"):
            benchmark.load(tmp_path)
        return
    items = benchmark.load(tmp_path)
    chosen = given.get("sample_idx")
    items = [item for item in items if not chosen or item.data["index"] in chosen[item.data["type"]]]
    postfix = given.get("postfix", "")  # a suffix of the folders, which is no part of the layout
    official = {image: image.replace(f"{postfix}/", "/", 1) if postfix else image for image in given["images"]}
    found = benchmark.assign(items, sorted(official.values()), "official")
    expected = {(official[image], index) for image, _, index in golden.official["tasks"]}
    # here, answers to an image that is there are not kept in the folder of another run
    kept = {tuple(output.removesuffix(".json").split("/")[1:]) for output in given.get("existing_outputs", ())}
    data = {item.id: item.data for item in items}
    assert {
        (file, data[id]["index"])
        for (id, _), file in found.items()
        if (data[id]["type"], data[id]["length"], str(data[id]["index"])) not in kept
    } == expected


def items_of_results(results):
    """Items whose replies are the answers in result files of one model."""
    items, images, replies = [], {}, {}
    for type, lengths in results.items():
        for length, files in lengths.items():
            for name, result in files.items():
                keys = [key.strip().lower() for key in result["gt_answers"]]
                answers = result["model_pred"]
                data = {"type": type, "length": length, "index": name, "answers": keys}
                item = Item(
                    f"{type}/{length}/{name}", "", data | {"questions": ["?"] * len(answers)}, is_spatial=False
                )
                items.append(item)
                images[item.id, 0] = name
                for key in ("official", "fixed"):
                    replies[item.id, 0, key] = ["\n".join(answers)]
    return items, Evidence(images, replies)


@goldens("tiif", "summary")
def test_tables_are_the_goldens(golden: Golden):
    benchmark = TIIF()
    for model, results in golden.given.items():
        items, evidence = items_of_results(results)
        numbers = benchmark.official(items, evidence)
        accuracy = golden.official["accuracy"][model]
        assert_same({name: numbers.get(name) for name in accuracy}, accuracy)
        totals = {name: total for name, (_, total) in count_correct(items, evidence).items()}
        expected = {name: total or None for name, total in golden.official["total_questions"][model].items()}
        assert_same({name: totals.get(name) or None for name in expected}, expected)
        groups = {name: found[model] for name, found in golden.official["groups_short_long"].items()}
        assert_same({name: [numbers[f"{name}|{x}"] for x in ("short", "long")] for name in groups}, groups)
        metrics = {metric.name: metric for metric in benchmark.fixed(items, evidence)}
        for name, (correct, total) in ((golden.fixed or {}).get(model) or {}).items():
            values = metrics[name.replace("|", ", ")].values
            assert (values.sum(), len(values)) == (correct, total)


def test_every_type_is_in_one_of_nine_groups():
    assert len(GROUPS) == 9
    assert len({type for types in GROUPS.values() for type in types}) == sum(map(len, GROUPS.values())) == 39


def test_example_prompts_are_scenes(example):
    _, items = example
    assert {item.data["length"] for item in items} == {"short", "long"}
    assert all(item.is_spatial for item in items)
    for item in items:
        assert parse_description(item.prompt).relations


def test_whole_pass_on_the_example(example):
    benchmark, items = example

    def right(question):
        """Answers that agree with every key of the example."""
        lines = [line for line in question.text.split("\n") if line.endswith(("?", "to it?"))]
        return "\n".join("no" if "triangle in" in line and "green" not in line else "yes" for line in lines)

    official = benchmark.official(items, answer_all(benchmark, items, "official", right))
    assert official["Basic_Relation - Relation|short"] == official["Mean_Accuracy"] == 1
    evidence = answer_all(
        benchmark, items, "fixed", lambda q: right(q).replace("yes", "no") if q.key == "negated" else right(q)
    )
    metrics = {metric.name: metric.estimate for metric in benchmark.fixed(items, evidence)}
    assert metrics.pop("share of yes, questions and twins (0.5 without a bias)") == 0.5
    assert set(metrics.values()) == {1}
    assert metrics["questions about front and behind"] == 1


def test_a_judge_who_says_yes_to_all_is_right_with_no_twin(example):
    benchmark, items = example
    evidence = answer_all(benchmark, items, "fixed", lambda q: "\n".join(["yes"] * (q.text.count("?"))))
    metrics = {metric.name: metric.estimate for metric in benchmark.fixed(items, evidence)}
    assert metrics["Relation, short"] == metrics["questions about relations"] == 1
    assert metrics["questions about relations, right with their twins"] == 0


def test_what_is_missing_or_unreadable_counts_as_wrong_only_in_fixed(example):
    benchmark, items = example
    (missing, unreadable, *_) = (item for item in items if item.id.startswith("2d_spatial_relation/short"))
    images, replies = {}, {}
    for item in items:
        if item is not missing:
            images[item.id, 0] = "x.png"
            reply = "yes" if item is unreadable else "yes\nyes\nyes"
            replies |= {(item.id, 0, key): [reply] for key in ("official", "fixed")}
    evidence = Evidence(images, replies)
    assert benchmark.official(items, evidence)["2d_spatial_relation|short"] is None
    metrics = {metric.name: metric for metric in benchmark.fixed(items, evidence)}
    assert metrics["2d_spatial_relation, short"].values.tolist() == [0] * 6
    assert metrics["Relation, short"].estimate == 0.5
    assert len(metrics["questions about relations"].values) == 8


@pytest.mark.parametrize(
    "reply,answers",
    [
        ("1. **Yes**, it is.\n2) No\n- yes", [True, False, True]),
        ('"yes"\n"no"', [True, False]),
        ("Q1: yes\nQuestion 2: no", [True, False]),
        ("<think>no\nno</think>\nyes\nno", [True, False]),
        ("yes\nno\nyes", None),
        ("nothing\nyes", None),
        (None, None),
    ],
)
def test_fixed_reads_numbered_and_bold_lines(reply, answers):
    assert read_lines(reply, 2 if answers is None else len(answers)) == answers


def test_official_files_are_found_by_index(example):
    benchmark, items = example
    files = [
        "2d_spatial_relation/m/short_description/1.final.png",
        "2d_spatial_relation/m/short_description/0000.png",
        "3d_spatial_relation/m/long_description/00.JPG",
    ]
    assert benchmark.assign(items, files, "official") == {("2d_spatial_relation/short/1", 0): files[0]}
    assert benchmark.assign(items, files, "fixed") == {
        ("2d_spatial_relation/short/0", 0): files[1],
        ("3d_spatial_relation/long/0", 0): files[2],
    }
    with pytest.raises(ValueError, match="several models: m, other"):
        benchmark.assign(items, [*files, "negation+2d/other/short_description/0.png"], "official")


@pytest.mark.parametrize(
    "lines,message",
    [
        ([row(), row(answers=["maybe"])], r"0_eval_prompts\.jsonl, row 2 has 1 questions and the answers \['maybe'\]"),
        ([row(answers=["yes", "no"])], r"row 1 has 1 questions and the answers"),
        ([row(questions=[])], r"row 1 has \[\] for yn_question_list"),
        ([row(), row("text")], r"0_prompts\.jsonl, row 2 has the type 'text', and the first row 'style'"),
        ([row(), "{broken"], r"0_prompts\.jsonl, line 2 is not JSON"),
        ([], "has 0 rows"),
    ],
)
def test_bad_rows_are_named(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        TIIF().load(write_files(tmp_path, [lines]))


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="no folder testmini_prompts or test_prompts"):
        TIIF().load(tmp_path)
    write_files(tmp_path, [[row()]])
    (tmp_path / "testmini_prompts" / "lonely_prompts.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="only one of the two files, prompts and questions, for lonely"):
        TIIF().load(tmp_path)
    (tmp_path / "test_prompts").mkdir()
    with pytest.raises(ValueError, match="both sets of prompts"):
        TIIF().load(tmp_path)
