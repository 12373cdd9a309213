"""`trl_spatial evaluate pairs`: whole runs, interruptions, folders that cannot be used, judges behind a server."""

import json
from base64 import b64encode
from io import BytesIO

import pytest
import yaml
from datasets import DatasetDict
from huggingface_hub import parse_eval_result_entries
from PIL import Image

from tests import openai_stub as stubs
from tests.openai_stub import OpenAIStub
from trl_spatial.cli import main
from trl_spatial.data.export import card_files, check_splits
from trl_spatial.endpoints import BudgetReached, Endpoint, Prices
from trl_spatial.evaluation.pair_run import PairRun, replay_pairs
from trl_spatial.evaluation.pair_set import PairSet
from trl_spatial.evaluation.scorers import Comparison, PairScorer, PairwiseScorer, Score
from trl_spatial.evaluation.scorers.rules import Pixels
from trl_spatial.gaussian_reward.scoring import SpatialScore
from trl_spatial.scenes import check_scene, make_preference_dataset, parse_description


CONDITIONS = ("given", "flip", "image_only", "prompt_swap")
# A scorer whose every number depends on prompt and image, and that ends the program after some calls.
MODULE = """
import zlib
from pathlib import Path

def score(prompts, images, **columns):
    if Path("fuse").is_file():
        left = int(Path("fuse").read_text())
        Path("fuse").write_text(str(left - 1))
        if left == 0:
            Path("fuse").unlink()
            raise KeyboardInterrupt
    pairs = zip(prompts, images, strict=True)
    return [zlib.crc32(prompt.encode() + image.tobytes()) % 1000 / 1000 for prompt, image in pairs]

def picky(prompts, images, **columns):
    if any("red" in prompt for prompt in prompts):
        raise ValueError("red is not liked")
    return [None if "blue" in prompt else 1.0 for prompt in prompts]
"""


@pytest.fixture(scope="module")
def rows():
    return make_preference_dataset(12, split="test", seed=2, both_directions=True)


@pytest.fixture(scope="module")
def pairs_folder(rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    DatasetDict({"test": rows}).save_to_disk(folder)
    return folder


@pytest.fixture
def evaluate(pairs_folder, tmp_path, monkeypatch):
    """A function that runs the command in a folder with a module of functions, and returns the results."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_scorers.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)

    def run(*words, output="run", code=0):
        assert main(["evaluate", "pairs", "--dataset", str(pairs_folder), "--output_dir", output, *words]) == code
        file = tmp_path / output / "results.json"
        return json.loads(file.read_text()) if code == 0 else None

    yield run
    import sys

    sys.modules.pop("own_scorers", None)


def timeless(results):
    """Results without what differs from run to run."""
    for row in results["scorers"]:
        row.pop("seconds_per_1000")
    return results


def read_records(folder):
    return [json.loads(line) for path in (folder / "records").iterdir() for line in path.read_text().splitlines()]


def test_a_whole_run(evaluate, rows, make_reward_model, processor, tmp_path, capsys):
    reward_model = SpatialScore(make_reward_model(), processor)
    reward_model.save_pretrained(tmp_path / "model")
    specs = ["rules", "pixels", "spatialscore:model", "own_scorers:score"]
    results = evaluate("--scorers", *specs)
    assert [row["name"] for row in results["scorers"]] == specs and results["num_pairs"] == 24
    rules, pixels, gaussian, _ = results["scorers"]

    graphs = [parse_description(prompt) for prompt in rows["prompt"]]
    is_right = [check_scene(image, graph).is_correct for image, graph in zip(rows["chosen"], graphs, strict=True)]
    assert all(is_right) and rules["accuracy"]["estimate"] == rules["coverage"] == 1
    assert rules["controls"]["flip"]["estimate"] == 1
    assert rules["controls"]["image_only"] == {"estimate": None, "low": None, "high": None, "num_pairs": 0}  # abstains
    assert abs(rules["controls"]["prompt_swap"]["estimate"] - 0.5) < 0.3
    assert pixels["accuracy"]["estimate"] == pixels["controls"]["image_only"]["estimate"] == 0.5  # both directions

    mean, _ = reward_model.score(list(rows["prompt"]) * 2, [*rows["chosen"], *rows["rejected"]])
    is_ordered = mean[:24] > mean[24:]
    assert gaussian["accuracy"]["estimate"] == pytest.approx(float(is_ordered.mean()))
    assert sum(found["num_pairs"] for found in gaussian["calibration"]["bins"]) == 24
    assert len(results["differences"]) == 6 and all(
        0 <= row["p_value"] <= row["p_holm"] <= 1 for row in results["differences"]
    )

    printed = capsys.readouterr().out
    assert printed.startswith((tmp_path / "run" / "results.md").read_text()) and "| rules | 1.000" in printed
    page = (tmp_path / "run" / "report.html").read_text()
    assert "pixels − rules" in page and "None" not in page  # the second minus the first; a control that has no share
    for example in results["examples"]:
        with Image.open(tmp_path / "run" / example["chosen"]) as image:
            assert image.convert("RGB").tobytes() == rows[int(example["pair"])]["chosen"].convert("RGB").tobytes()
        assert set(example["scores"]) == set(specs)
    assert replay_pairs(tmp_path / "run") == results


def test_a_scorer_on_a_benchmark_of_the_hub_has_results_for_its_repository(rows, tmp_path):
    """What is written beside a model fits the leaderboards that `eval.yaml` beside the dataset names."""
    splits = DatasetDict({"benchmark": rows})
    eval_file = yaml.safe_load(card_files(splits, "ORG/Pairs", check_splits(splits, show_progress=False))["eval.yaml"])
    assert {(task["config"], task["split"]) for task in eval_file["tasks"]} == {("default", "benchmark")}
    folder = tmp_path / "run"
    folder.mkdir()
    run = PairRun(folder, PairSet(rows, "ORG/Pairs", dataset_id="ORG/Pairs", split="benchmark"))
    run.measure("pixels", Pixels(), ["flip"], batch_size=8)
    [row] = replay_pairs(folder)["scorers"]
    [place] = (folder / "cards").iterdir()
    entries = [
        entry
        for path in (place / ".eval_results").iterdir()
        for entry in parse_eval_result_entries(yaml.safe_load(path.read_text()))
    ]
    assert {entry.task_id for entry in entries} == {task["id"] for task in eval_file["tasks"]}
    assert {entry.dataset_id for entry in entries} == {"ORG/Pairs"}
    assert {entry.value for entry in entries} == {
        float(f"{number['estimate']:.4g}") for number in row["numbers"].values()
    }
    card = (place / "card.md").read_text()
    assert "## Pairs of ORG/Pairs" in card and "| control: flip |" in card and "| accuracy | 0.5 |" in card
    assert (place / "card.md").read_text().count("\n| ") == 2 + len(row["numbers"])


@pytest.mark.parametrize(
    ("split", "limit", "dataset_id"), [("test", None, "ORG/P"), ("benchmark", 4, "ORG/P"), ("benchmark", None, None)]
)
def test_other_pairs_have_a_card_only(rows, tmp_path, split, limit, dataset_id):
    (tmp_path / "run").mkdir()
    run = PairRun(tmp_path / "run", PairSet(rows, str(tmp_path), split=split, limit=limit, dataset_id=dataset_id))
    run.measure(f"pixels:{tmp_path}/absent", Pixels(), [], batch_size=8)
    replay_pairs(tmp_path / "run")
    [place] = (tmp_path / "run" / "cards").iterdir()
    assert [path.name for path in place.iterdir()] == ["card.md"]
    assert str(tmp_path) not in (place / "card.md").read_text()  # no folder of the author


@pytest.mark.parametrize("num_calls", [0, 1, 7])
def test_an_interrupted_run_continues_to_the_same_results(evaluate, tmp_path, capsys, num_calls):
    words = ("--scorers", "own_scorers:score", "rules", "--batch_size", "5")
    whole = evaluate(*words, output="whole")
    (tmp_path / "fuse").write_text(str(num_calls))
    evaluate(*words, code=130)
    assert "run the same command again to continue" in capsys.readouterr().err
    assert len(read_records(tmp_path / "run")) == 5 * num_calls
    assert timeless(evaluate(*words)) == timeless(whole)
    assert len(read_records(tmp_path / "run")) == 2 * 4 * 24  # nothing was asked twice


@pytest.mark.parametrize("share", [0.03, 0.5, 0.97])
def test_a_killed_run_continues_to_the_same_results(evaluate, tmp_path, share):
    """What a kill leaves: a log that ends anywhere, also within a line."""
    words = ("--scorers", "own_scorers:score")
    whole = timeless(evaluate(*words))
    (log,) = (tmp_path / "run" / "records").iterdir()
    content = log.read_bytes()
    log.write_bytes(content[: int(share * len(content))])
    (tmp_path / "run" / "results.json").unlink()
    assert timeless(evaluate(*words)) == whole
    assert len(log.read_text().splitlines()) == len(content.splitlines())


def test_a_run_that_ended_before_its_plan_was_written_begins_anew(evaluate, tmp_path):
    whole = timeless(evaluate("--scorers", "pixels", output="whole"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pairs.jsonl").write_bytes((tmp_path / "whole" / "pairs.jsonl").read_bytes()[:100])
    assert timeless(evaluate("--scorers", "pixels")) == whole


def test_scorers_and_controls_can_be_added_later(evaluate, tmp_path):
    evaluate("--scorers", "pixels", "--no_controls")
    assert {record["condition"] for record in read_records(tmp_path / "run")} == {"given"}
    results = evaluate("--scorers", "pixels", "rules", "--controls", "flip")
    assert [set(row["controls"]) for row in results["scorers"]] == [{"flip"}, {"flip"}]
    assert len(read_records(tmp_path / "run")) == 4 * 24


def test_what_a_scorer_refuses_is_listed_and_asked_again(evaluate, rows, tmp_path):
    (row,) = evaluate("--scorers", "own_scorers:picky", "--no_controls")["scorers"]
    red, blue = ([word in prompt for prompt in rows["prompt"]] for word in ("red", "blue"))
    reasons = {int(failure["pair"]): failure for failure in row["failures"]}
    for number in range(24):
        if red[number]:
            assert reasons[number]["reason"] == "error: red is not liked"
        elif blue[number]:
            assert reasons[number]["raw"] == "the function returned None"
        else:
            assert number not in reasons
    assert any(red) and row["coverage"] == 1 - len(reasons) / 24
    evaluate("--scorers", "own_scorers:picky", "--no_controls")
    assert len(read_records(tmp_path / "run")) == 24 + sum(red)


def test_folders_that_cannot_be_used_are_refused(evaluate, pairs_folder, rows, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    evaluate("--scorers", "pixels", output="other", code=1)
    assert "is not empty and holds no run that can be continued" in capsys.readouterr().err
    evaluate("--scorers", "pixels")
    evaluate("--scorers", "pixels", "--limit", "3", code=1)
    assert "another number of pairs: it was 24 and is 3" in capsys.readouterr().err
    with pytest.raises(ValueError, match="have changed since"):
        PairRun(tmp_path / "run", PairSet(rows.select([*range(1, 24), 0]), str(pairs_folder)))
    with pytest.raises(ValueError, match=r"holds no run of `evaluate pairs`"):
        replay_pairs(tmp_path / "other")


def test_a_model_that_has_changed_is_refused(evaluate, make_reward_model, processor, tmp_path, capsys):
    SpatialScore(make_reward_model(), processor).save_pretrained(tmp_path / "model")
    evaluate("--scorers", "spatialscore:model", "--no_controls", "--limit", "4")
    changed = make_reward_model()
    next(changed.head.parameters()).data.add_(1)
    SpatialScore(changed, processor).save_pretrained(tmp_path / "model")
    evaluate("--scorers", "spatialscore:model", "--limit", "4", code=1)
    assert "The files of spatialscore:model have changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--scorers", "ruels"), "There is no scorer 'ruels'"),
        (("--scorers", "rules:x"), "takes no model"),
        (("--scorers", "spatialscore"), "needs a model"),
        (("--scorers", "rules", "--split", "train"), "has no split 'train'; it has 'test'. Name one with --split."),
        (("--scorers", "rules", "--batch_size", "0"), "--batch_size is 0"),
        (("--scorers", "rules", "--limit", "0"), "The limit is 0"),
        (("--scorers", "rules", "--prices", "gpt=1"), "--prices gpt=1 does not have the form"),
    ],
)  # fmt: skip
def test_mistakes_are_found_before_the_work(evaluate, tmp_path, capsys, words, message):
    evaluate(*words, code=1)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "plan.json").exists()


class Judge(PairwiseScorer):
    """Asks a model which of two images is better; it may also not know."""

    name, trained_on = "judge", "whatever the stub was"

    def __init__(self, endpoint):
        self.endpoint = endpoint

    def compare(self, prompt, first, second):
        content = [{"type": "text", "text": prompt}]
        for image in (first, second):
            image.save(buffer := BytesIO(), "PNG")
            url = f"data:image/png;base64,{b64encode(buffer.getvalue()).decode()}"
            content.append({"type": "image_url", "image_url": {"url": url}})
        answer = self.endpoint.chat([{"role": "user", "content": content}])
        choice = {"A": "first", "B": "second", "C": "tie"}.get(answer.text)
        return Comparison(choice, answer.text, answer.cost, answer.served_model)


def by_rules(request):
    """The stub's verdict: the image with more of the relations of the prompt; a fixed letter about anything else."""
    try:
        graph = parse_description(request.last)
    except ValueError:
        return "A"
    first, second = (check_scene(Image.open(BytesIO(data)), graph).is_correct for data in request.images)
    return "C" if first == second else "A" if first else "B"


def test_a_judge_behind_a_server(rows, tmp_path):
    pairs = PairSet(rows, "rows", limit=10)
    with OpenAIStub(chat=by_rules) as stub:
        run = PairRun(tmp_path, pairs)
        endpoint = Endpoint("judge-1", base_url=stub.url, prices=Prices(1e6, 0), spend=run.spend())
        judge = Judge(endpoint)
        run.measure("judge", judge, ["image_only"], batch_size=4)
        assert stub.num_calls == 2 * 2 * 10
        assert run.tasks("judge", ["image_only"]) == [] and len(run.tasks("judge", ["flip"])) == 10
    (row,) = replay_pairs(tmp_path)["scorers"]
    assert row["accuracy"]["estimate"] == row["order_consistency"] == 1 and row["served_models"] == ["judge-1"]
    # "A" in both orders is a coin
    assert row["controls"]["image_only"]["estimate"] == 0.5
    assert row["price_per_1000"] == pytest.approx(1000 * run.spend().spent / 20)
    answers = {verdict["raw"] for record in read_records(tmp_path) for verdict in record["verdicts"]}
    assert answers == {"A", "B"}


def test_a_limit_ends_the_run_and_forgets_no_payment(rows, tmp_path):
    pairs = PairSet(rows, "rows", limit=10)
    with OpenAIStub(chat=by_rules) as stub:

        def measure(limit, batch_size):
            run = PairRun(tmp_path, pairs)
            prices = {"prices": Prices(input_per_million=1e4), "spend": run.spend(limit)}
            run.measure("judge", Judge(Endpoint("judge-1", base_url=stub.url, **prices)), [], batch_size=batch_size)
            return run.spend().spent

        with pytest.raises(BudgetReached):
            measure(1e-4, 1)
        assert stub.num_calls == 1  # the first order of the first pair
        first = PairRun(tmp_path, pairs).spend().spent
        (row,) = replay_pairs(tmp_path)["scorers"]
        assert first > 0 and [failure["reason"] for failure in row["failures"]] == ["not asked"] * 10
        total = measure(100.0, 3)
    (row,) = replay_pairs(tmp_path)["scorers"]
    assert row["coverage"] == 1 and total == pytest.approx(first + row["price_per_1000"] * 10 / 1000)


def test_unreadable_and_missing_answers(rows, tmp_path):
    pairs = PairSet(rows, "rows", limit=4)
    with OpenAIStub(chat=lambda request: "I would rather not say") as stub:
        run = PairRun(tmp_path, pairs)
        run.measure("mute", Judge(Endpoint("judge-1", base_url=stub.url)), [], batch_size=2)
        assert run.tasks("mute", []) == []  # it would say the same again
        stub.behaviour = lambda request, usual: stubs.error(503, "busy")
        run.measure("absent", Judge(Endpoint("judge-1", base_url=stub.url, max_attempts=1)), [], batch_size=2)
        assert len(run.tasks("absent", [])) == 4
    mute, absent = replay_pairs(tmp_path)["scorers"]
    assert mute["coverage"] == absent["coverage"] == 0 and mute["accuracy"]["estimate"] == 0
    assert len(mute["failures"]) == 8 and {failure["raw"] for failure in mute["failures"]} == {
        "I would rather not say"
    }
    assert {failure["reason"].partition(":")[0] for failure in absent["failures"]} == {"no answer from the server"}


def test_scores_that_are_no_numbers_are_failures(rows, tmp_path):
    class Broken(PairScorer):
        name, trained_on = "broken", "nothing"

        def score(self, prompts, images):
            return [Score(float("nan"), 1.0) for _ in prompts]

    run = PairRun(tmp_path, PairSet(rows, "rows", limit=2))
    run.measure("broken", Broken(), [], batch_size=2)
    (row,) = replay_pairs(tmp_path)["scorers"]
    assert {failure["raw"] for failure in row["failures"]} == {"the score is nan"} and row["coverage"] == 0
