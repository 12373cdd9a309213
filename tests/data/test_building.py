"""Building a dataset: nothing is done twice, nothing is lost, and what comes out is what was decided."""

import io
import json
import random
import signal
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.launching import run_processes
from tests.openai_stub import OpenAIStub
from tests.warm import run_python
from trl_spatial.cli import main
from trl_spatial.data.building.build_store import BuildStore, Quota
from trl_spatial.data.building.controls import guess_from_images, guess_from_texts, guess_without_prompt
from trl_spatial.data.building.decisions import decide_pairs, review_items
from trl_spatial.data.building.drafts import graph_of, relation_of
from trl_spatial.data.building.duplicates import DuplicateFinder, graph_key
from trl_spatial.data.building.filter import drawn_pairs
from trl_spatial.data.building.recipe import load_recipe, make_recipe
from trl_spatial.data.review import VoteLog
from trl_spatial.data.validation import validate_splits
from trl_spatial.scenes import RELATIONS
from trl_spatial.scripts.datasets import load_dataset_dict
from trl_spatial.store import RecordLog, mark_complete


RECIPE = {
    "prompts": {"num_prompts": 40, "num_relations": {3: 1, 5: 1}},
    "render": {"generators": [{"name": "tabletop", "image_size": 64}]},
    "filter": {"review_share": 0.3},
    "export": {"validation": 0.1, "test": 0.2},
}


def write_recipe(folder, **changes):
    """A recipe of a small dataset in `folder`, with some sections changed."""
    content = {"store": str(folder / "store"), **{name: dict(part) for name, part in RECIPE.items()}}
    for section, values in changes.items():
        content[section] = content.get(section, {}) | values
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


def build(recipe, *options, action="build"):
    assert main(["data", action, str(recipe), *options]) == 0


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The store of a small dataset."""
    recipe = write_recipe(tmp_path_factory.mktemp("built"))
    build(recipe)
    return BuildStore(recipe)


@pytest.fixture(scope="module")
def dataset(built):
    return load_dataset_dict(str(built.folder / "dataset"))


def contents(store):
    """What a build has made, without times."""
    text = load_dataset_dict(str(store.folder / "dataset"), config_name="text")
    rows = {split: part.remove_columns(["chosen_recipe", "rejected_recipe"]).to_list() for split, part in text.items()}
    images = {path.name for path in (store.folder / "images").iterdir()}
    logs = {
        name: [{k: v for k, v in record.items() if k not in ("seconds", "recipe")} for record in getattr(store, name)]
        for name in ("prompts", "edits", "images", "verdicts")
    }
    return rows, images, {name: sorted(log, key=lambda record: record["id"]) for name, log in logs.items()}


class TestRecipe:
    @pytest.mark.parametrize(
        "change, message",
        [
            ({"prompts": {"num_prompt": 5}}, "Unknown key prompts.num_prompt"),
            ({"prompts": {}}, "prompts.num_prompts is missing"),
            ({"prompts": {"num_prompts": "many"}}, "prompts: .*num_prompts.*expected int, got str"),
            ({"prompts": {"num_prompts": 5, "levels": {4: 1}}}, "prompts.levels has the keys \\[4\\]"),
            ({"prompts": {"num_prompts": 5, "dimensions": {"up": 1}}}, "prompts.dimensions names \\['up'\\]"),
            ({"prompts": {"num_prompts": 5, "num_relations": {3: -1}}}, "gives 3 the weight -1"),
            ({"render": {"draws": 0}}, "render.draws is 0"),
            ({"filter": {"quality": "m:f"}}, "belong together"),
            ({"export": {"test": 1.0}}, "export.test 1.0"),
            ({"store": 5}, "`store` is missing"),
            ({"seed": -1}, "`seed` is -1"),
        ],
    )
    def test_errors_name_the_key(self, change, message):
        with pytest.raises(ValueError, match=message):
            make_recipe({"store": "x", "prompts": {"num_prompts": 5}} | change)

    def test_the_store_may_be_in_the_home_folder(self, monkeypatch):
        monkeypatch.setenv("HOME", "/home/me")
        assert make_recipe({"store": "~/runs/x", "prompts": {"num_prompts": 5}}).store == "/home/me/runs/x"

    def test_a_key_that_stands_twice_is_refused(self, tmp_path):
        (tmp_path / "twice.yaml").write_text("store: x\nprompts:\n  num_prompts: 5\n  num_prompts: 6\n")
        with pytest.raises(
            ValueError, match=r"twice.yaml is not .*'num_prompts' appears on line 3 and again on line 4"
        ):
            load_recipe(tmp_path / "twice.yaml")

    def test_those_that_ship_are_read(self):
        for name in ("small", "spatialreward"):
            assert load_recipe(f"recipes/data/{name}.yaml").prompts.num_prompts > 0

    def test_a_changed_one_is_refused_once_it_was_begun(self, built, tmp_path):
        content = built.recipe.to_dict()
        content["prompts"]["levels"] = {1: 1}
        (tmp_path / "other.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(ValueError, match=r"prompts.levels was .* and is \{1: 1\} now"):
            BuildStore(tmp_path / "other.yaml")


def test_a_quota_holds_after_any_number_of_draws():
    weights = {"a": 5.0, "b": 3.0, "c": 1.0, "d": 1.0}
    for number in (100, 300, 1000):
        counts = Counter(islice(Quota(weights, np.random.default_rng(0)), number))
        assert all(abs(counts[name] - number * weight / 10) <= 1 for name, weight in weights.items())
    firsts = [next(iter(Quota(weights, np.random.default_rng(seed)))) for seed in range(50)]
    assert len(set(firsts)) > 1  # not the largest one first


class TestDuplicates:
    RECORD = {
        "id": "0", "scene": "kitchen", "entities": ["red mug", "blue box", "green pear"],
        "relations": [{"relation": "left_of", "arguments": ["red mug", "blue box"]},
                      {"relation": "between", "arguments": ["green pear", "red mug", "blue box"]}],
        "prompt": " ".join(f"word{i}" for i in range(60)),
    }  # fmt: skip

    @pytest.mark.parametrize(
        "relations",
        [
            [{"relation": "right_of", "arguments": ["old box", "new mug"]},
             {"relation": "between", "arguments": ["ripe pear", "old box", "new mug"]}],
            [{"relation": "between", "arguments": ["ripe pear", "new mug", "old box"]},
             {"relation": "left_of", "arguments": ["new mug", "old box"]}],
        ],
    )  # fmt: skip
    def test_the_same_scene_in_other_words_has_the_same_key(self, relations):
        other = {**self.RECORD, "entities": ["old box", "new mug", "ripe pear"], "relations": relations}
        assert graph_key(other) == graph_key(self.RECORD)

    def test_another_scene_has_another(self):
        swapped = [{"relation": "left_of", "arguments": ["blue box", "red mug"]}, self.RECORD["relations"][1]]
        for change in (
            {"scene": "garage"},
            {"relations": swapped},
            {"entities": ["red cup", "blue box", "green pear"]},
        ):
            other = self.RECORD | change
            if "entities" in change:
                other["relations"] = json.loads(json.dumps(other["relations"]).replace("red mug", "red cup"))
            assert graph_key(other) != graph_key(self.RECORD)

    def test_nearly_the_same_text_is_found_among_many(self):
        finder, rng = DuplicateFinder(), random.Random(0)
        words = [f"word{i}" for i in range(500)]
        for number in range(300):
            entities = [f"noun{number}", f"noun{number + 1000}"]
            record = {
                "id": str(number), "scene": "kitchen", "entities": entities,
                "relations": [{"relation": "near", "arguments": entities}], "prompt": " ".join(rng.choices(words, k=60)),
            }  # fmt: skip
            assert finder.add(record) is None
        changed = record["prompt"].split()
        changed[30] = "another"
        record |= {"id": "x", "scene": "garage", "prompt": " ".join(changed)}
        assert finder.add(record) == "nearly the same text: 299"


class TestRecordLog:
    def test_a_line_that_was_cut_off_is_dropped_and_the_rest_stays(self, tmp_path):
        log = RecordLog(tmp_path / "log.jsonl")
        log.append([{"a": 1}, {"b": "ü" * 70000}])
        with log.path.open("ab") as file:
            file.write(b'{"c": 3')
        assert len(list(log)) == 2
        log.append([{"d": 4}])
        assert list(log) == [{"a": 1}, {"b": "ü" * 70000}, {"d": 4}]

    def test_a_damaged_line_is_named(self, tmp_path):
        (tmp_path / "log.jsonl").write_text('{"a": 1}\n{"b": \n{"c": 3}\n')
        with pytest.raises(ValueError, match="line 2 is damaged"):
            list(RecordLog(tmp_path / "log.jsonl"))

    def test_a_full_disk_leaves_whole_lines(self, tmp_path):
        program = (
            "import resource, signal\nfrom pathlib import Path\nfrom trl_spatial.store import RecordLog\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            f"log = RecordLog(Path({str(tmp_path / 'log.jsonl')!r}))\nlog.append([{{'a': 'x' * 400}}])\n"
            "try:\n    log.append([{'b': 'y' * 900}])\nexcept OSError:\n    print('full')\n"
        )
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert ended.stdout == "full\n", ended.stderr
        assert list(RecordLog(tmp_path / "log.jsonl")) == [{"a": "x" * 400}]


class TestBuild:
    def test_prompts_and_perturbations_say_what_is_recorded(self, built):
        prompts, edits = built.accepted_prompts(), built.accepted_edits()
        assert len(prompts) == 40 and len(edits) >= 30
        for id, edit in edits.items():
            prompt = prompts[id]
            for record in (prompt, edit):
                for relation in record["relations"]:
                    start, end = relation["span"]
                    named = relation["arguments"][:-1] if relation["relation"] == "at" else relation["arguments"]
                    assert all(name in record["prompt"][start:end] for name in named)
            before, after = (Counter(map(relation_of, record["relations"])) for record in (prompt, edit))
            changes = edit["operations"]
            assert before - after == Counter(relation_of(change["before"]) for change in changes)
            assert after - before == Counter(relation_of(change["after"]) for change in changes)
            assert edit["level"] == len(changes) == prompt["level"]
            assert RELATIONS[changes[0]["before"]["relation"]].dimension == prompt["dimension"]
            assert graph_of(prompt["entities"], edit["relations"])  # of the same things

    def test_generators_and_seeds_are_the_same_on_both_sides(self, built):
        for pair in drawn_pairs(built).values():
            first, second = pair.images.values()
            assert (first["seed"], first["generator"]) == (second["seed"], second["generator"])
            assert first["image"] != second["image"]
            assert {"seed", "device", "renderer"} <= first["recipe"].keys()

    def test_accepted_pairs_are_exported_in_both_directions(self, built, dataset):
        accepted = {id for id, decision in decide_pairs(built).items() if decision.outcome == "accepted"}
        rows = [(split, row) for split, part in dataset.items() for row in part.remove_columns(["chosen", "rejected"])]
        directions = Counter((row["pair"], row["direction"]) for _, row in rows)
        assert {pair for pair, _ in directions} == accepted and set(directions.values()) == {1}
        assert all(sum(directions[pair, side] for side in ("original", "edited")) in (1, 2) for pair in accepted)
        once = {pair for pair in accepted if directions[pair, "original"] + directions[pair, "edited"] == 1}
        assert once == set(dataset["benchmark"]["pair"])
        scenes = {split: set(part["scene"]) for split, part in dataset.items()}
        assert not scenes["train"] & (scenes["test"] | scenes["validation"] | scenes["benchmark"])
        assert not scenes["validation"] & (scenes["test"] | scenes["benchmark"])

    def test_it_is_valid_and_has_three_configurations(self, built, dataset):
        assert validate_splits(dataset).errors == []
        text = load_dataset_dict(str(built.folder / "dataset"), config_name="text")
        assert text["train"]["prompt"] == dataset["train"]["prompt"] and "chosen" not in text["train"].column_names
        assert len(load_dataset_dict(str(built.folder / "dataset"), config_name="preview")["train"]) <= 100
        card = (built.folder / "dataset" / "README.md").read_text()
        tasks = yaml.safe_load((built.folder / "dataset" / "eval.yaml").read_text())["tasks"]
        assert {(task["config"], task["split"]) for task in tasks} == {("default", "benchmark")} and len(tasks) == 3
        assert "--split benchmark --scorers" in card
        assert "## How it was made" in card and "## Controls" in card and "no terms: drawn by trl_spatial" in card

    def test_no_scorer_without_the_prompt_finds_the_winner(self, dataset):
        assert guess_without_prompt(dataset["train"]) == 0.5
        assert guess_from_images(dataset["train"], dataset["train"]).estimate == 0.5

    def test_a_leak_would_be_found(self, dataset):
        """With one direction only, in which the winner's image is brighter and its text names a thing of its own."""

        def leak(row):
            row["chosen"] = row["chosen"].point([min(value + 30, 255) for value in range(256)] * 3)
            return row | {"prompt": f"{row['prompt']} Indeed."}

        rows = dataset["train"].filter(lambda direction: direction == "original", input_columns="direction").map(leak)
        assert guess_without_prompt(rows) == 1
        assert guess_from_images(rows, rows).low > 0.8
        assert guess_from_texts(rows, rows).low > 0.8

    def test_what_is_done_is_not_done_again(self, built):
        times = {path: path.stat().st_mtime_ns for path in built.folder.glob("*.jsonl")}
        before = contents(built)
        build(built.folder)
        assert {path: path.stat().st_mtime_ns for path in built.folder.glob("*.jsonl")} == times
        assert contents(built) == before

    def test_more_prompts_may_be_asked_for_later(self, built, tmp_path):
        found = []
        for number in (25, 40):
            recipe = write_recipe(tmp_path, prompts={"num_prompts": number})
            build(recipe)
            store = BuildStore(recipe)
            text = load_dataset_dict(str(store.folder / "dataset"), config_name="text")
            found.append({pair: split for split, part in text.items() for pair in part["pair"]})
            assert len(store.accepted_prompts()) == number
        first, second = found
        assert first.keys() < second.keys()
        moved = {(split, second[pair]) for pair, split in first.items() if second[pair] != split}
        assert moved <= {("test", "benchmark"), ("benchmark", "test")}  # of the same scenes

    def test_the_estimate_in_the_text_is_what_is_printed(self, capsys):
        text = Path("recipes/data/README.md").read_text()
        build("recipes/data/flux_qwen.yaml", "--estimate")
        assert f"```text\n{capsys.readouterr().out}```" in text

    def test_an_estimate_does_nothing(self, tmp_path, capsys):
        build(write_recipe(tmp_path), "--estimate")
        assert "40 to do, 0 done" in capsys.readouterr().out
        assert not (tmp_path / "store").exists()

    def test_status_says_where_everything_stands(self, built, capsys):
        capsys.readouterr()
        build(built.folder, "--json", action="status")
        found = json.loads(capsys.readouterr().out)
        assert all(stage["todo"] == 0 for stage in found["stages"])
        assert sum(found["dropped"]["perturb"].values()) == 40 - len(built.accepted_edits())
        build(built.folder, action="stats")
        page = (built.folder / "stats.html").read_text()
        assert "What was dropped, and why" in page and "<script" not in page and page.count("data:image/png") == 12


def test_several_processes_share_the_images(built, tmp_path):
    recipe = write_recipe(tmp_path)
    build(recipe, action="prompts")
    build(recipe, action="perturb")
    run_processes(["-m", "trl_spatial", "data", "render", recipe], ACCELERATE_USE_CPU="true")
    assert len(list((tmp_path / "store").glob("images*.jsonl"))) == 2
    build(recipe)
    assert contents(BuildStore(recipe)) == contents(built)


# The command, which kills itself before it does something with a file for the so manieth time.
KILLED = """
import os, signal, sys
from trl_spatial.cli import main

def kill(event, arguments):
    global number
    if event == what and part in str(arguments):
        number -= 1
        if number == 0:
            os.kill(os.getpid(), signal.SIGKILL)

what, part, number = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1))
sys.addaudithook(kill)
main(sys.argv[1:])
"""
PLACES = (
    ("os.rename", "recipe.json", 1), ("open", "store/prompts.jsonl", 3), ("open", "store/edits.jsonl", 3), ("os.rename", "store/images/", 5),
    ("open", "store/images/", 50), ("open", "store/images.jsonl", 5), ("open", "store/verdicts.jsonl", 3),
    ("open", ".parquet", 2), ("os.rename", "dataset.partial", 1),
)  # fmt: skip


def test_killed_at_any_place_it_ends_with_the_same_dataset(built, tmp_path):
    recipe = write_recipe(tmp_path)
    for place in PLACES:
        ended = run_python(["-c", KILLED, *place, "data", "build", recipe])
        assert ended.returncode == -signal.SIGKILL, (place, ended.stderr)
    build(recipe)
    assert contents(BuildStore(recipe)) == contents(built)


def test_reviewers_decide_what_they_have_seen(built, tmp_path):
    """Two simulated reviewers, one of whom errs now and then, see a share of the pairs."""
    recipe = write_recipe(tmp_path, review={"reviewers": ["sure", "hasty"], "votes_per_item": 2})
    build(recipe)
    store = BuildStore(recipe)
    items = review_items(store)
    assert len(items) > 8 and any(item.gold for item in items)
    votes, rng, wrong = VoteLog(store.votes_file), random.Random(1), set()
    for number, item in enumerate(items):
        side = item.id.split(":")[1]
        for reviewer in ("sure", "hasty"):
            order = rng.sample(["original", "edited"], 2)
            errs = reviewer == "hasty" and number % 5 == 0
            if errs and not item.gold:
                wrong.add(item.id.split(":")[0])
            votes.append(
                {"id": f"{reviewer}-{number:06d}", "item": item.id, "reviewer": reviewer, "order": order,
                 "answer": "neither" if errs else ("left", "right")[order.index(side)], "ticks": {}, "milliseconds": 900}
            )  # fmt: skip
    decisions = decide_pairs(store)
    assert wrong and {decisions[pair].outcome for pair in wrong} == {"dropped"}
    assert {decisions[pair].reason for pair in wrong} == {"reviewers disagree"}
    seen = {item.id.split(":")[0] for item in items if not item.gold} - wrong
    assert {(decisions[pair].outcome, decisions[pair].by) for pair in seen} == {("accepted", "people")}
    build(recipe, action="export")
    card = (store.folder / "dataset" / "README.md").read_text()
    assert "votes by people, Krippendorff's alpha" in card and "reviewers disagree" in card


def test_the_forms_of_other_trainers(built, dataset, tmp_path):
    build(built.folder, "--format", "flow-factory", "--output", str(tmp_path / "flow"), action="export")
    lines = [json.loads(line) for line in (tmp_path / "flow" / "train.jsonl").read_text().splitlines()]
    assert len(lines) == len(dataset["train"])
    for line, row in zip(lines, dataset["train"], strict=True):
        assert set(line) == {"schema_version", "input", "supervision", "metadata"} and line["schema_version"] == 2
        assert line["input"] == {"prompt": row["prompt"], "media": []}
        assert set(line["supervision"]) == {"type", "chosen", "rejected"}
        path = line["supervision"]["chosen"]["media"][0]["path"]
        assert path == f"images/{row['chosen_image']}" and (tmp_path / "flow" / path).is_file()
    build(built.folder, "--format", "diffusion-dpo", "--output", str(tmp_path / "dpo"), action="export")
    rows = load_dataset_dict(str(tmp_path / "dpo"))["train"]
    assert set(rows.column_names) == {"jpg_0", "jpg_1", "label_0", "caption"} and set(rows["label_0"]) == {0, 1}
    for row, ours in zip(rows, dataset["train"], strict=True):
        winner = row["jpg_0"] if row["label_0"] else row["jpg_1"]
        pixels = [
            np.asarray(image.convert("RGB"), float) for image in (Image.open(io.BytesIO(winner)), ours["chosen"])
        ]
        other = np.asarray(ours["rejected"].convert("RGB"), float)
        assert np.abs(pixels[0] - pixels[1]).mean() < np.abs(pixels[0] - other).mean()


def test_models_behind_a_server_write_draw_and_judge(tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("STUB_KEY", "sk-very-secret")
    with OpenAIStub() as stub:
        model = {"base_url": stub.url, "api_key_env": "STUB_KEY"}
        prices = {"input_per_million": 1.0, "output_per_million": 2.0}
        recipe = write_recipe(
            tmp_path,
            prompts={"num_prompts": 12, "writer": {"model": "writer", "prices": prices, **model}},
            render={"generators": [{"endpoint": stub.url, "model": "painter", "api_key_env": "STUB_KEY",
                                    "size": "64x64", "price_per_image": 0.01}]},
            filter={"judges": [{"model": "judge-a", **model}, {"model": "judge-b", **model}], "review_share": 0.0},
        )  # fmt: skip
        build(recipe)
        store = BuildStore(recipe)
        num_calls = stub.num_calls
        build(recipe)  # nothing is asked again
        assert stub.num_calls == num_calls
    assert len(store.accepted_prompts()) == 12
    assert sum(record["cost"] for record in store.images) == pytest.approx(0.01 * sum(1 for _ in store.images))
    assert all(record["cost"] > 0 for record in store.prompts)
    outcomes = Counter(decision.outcome for decision in decide_pairs(store).values())
    assert outcomes["accepted"] > 0
    shown = caplog.text + "".join(capfd.readouterr())
    everything = shown + "".join(path.read_text() for path in store.folder.glob("*.jsonl"))
    assert "sk-very-secret" not in everything
    assert next(iter(store.accepted_prompts().values()))["prompt"][:60] not in shown


def test_a_spend_cap_stops_the_work_and_keeps_what_was_paid_for(tmp_path, capfd):
    with OpenAIStub() as stub:
        generator = {
            "endpoint": stub.url,
            "model": "painter",
            "size": "64x64",
            "price_per_image": 1.0,
            "concurrency": 2,
        }
        changes = {"prompts": {"num_prompts": 8}, "filter": {"review_share": 0.0}}
        recipe = write_recipe(tmp_path, render={"generators": [generator], "max_cost": 5.0}, **changes)
        assert main(["data", "prompts", str(recipe)]) == main(["data", "perturb", str(recipe)]) == 0
        assert main(["data", "render", str(recipe)]) == 1
        assert "$5.00" in capfd.readouterr().err
        drawn = [record["id"] for record in BuildStore(recipe).images]
        assert 5 <= len(drawn) == stub.num_calls <= 8  # those that were on their way are paid for, too
        assert BuildStore(recipe).spend("render").spent == len(drawn)
        recipe = write_recipe(tmp_path, render={"generators": [generator], "max_cost": 50.0}, **changes)
        assert main(["data", "render", str(recipe)]) == 0
        assert [record["id"] for record in BuildStore(recipe).images][: len(drawn)] == drawn


def test_what_was_paid_counts_in_the_next_run(tmp_path, capfd):
    """A cap holds over runs that end before anything is recorded."""
    with OpenAIStub() as stub:
        model = {"model": "writer", "base_url": stub.url, "prices": {"input_per_million": 1000.0}}
        recipe = write_recipe(tmp_path, prompts={"num_prompts": 30, "writer": model, "max_cost": 2.0})
        assert main(["data", "prompts", str(recipe)]) == 1
        num_calls = stub.num_calls
        assert main(["data", "prompts", str(recipe)]) == 1
        assert stub.num_calls == num_calls  # from the cache, and then no further
        assert json.loads(capture_status(recipe, capfd))["spent"]["prompts"] >= 2
        recipe = write_recipe(
            tmp_path, prompts={"num_prompts": 30, "writer": model | {"concurrency": 2}, "max_cost": 99.0}
        )
        build(recipe, action="prompts")  # settings that change no answer may change
        assert len(BuildStore(recipe).accepted_prompts()) == 30


def capture_status(recipe, capfd):
    capfd.readouterr()
    build(recipe, "--json", action="status")
    return capfd.readouterr().out


def test_what_was_lost_is_made_again(built, tmp_path):
    recipe = write_recipe(tmp_path)
    build(recipe)
    store = BuildStore(recipe)
    lines = (store.folder / "prompts.jsonl").read_text().splitlines(keepends=True)
    (store.folder / "prompts.jsonl").write_text("".join(lines[:6] + lines[7:]))
    next((store.folder / "images").iterdir()).unlink()
    build(recipe)
    assert contents(BuildStore(recipe))[:2] == contents(built)[:2]


def test_an_export_replaces_only_exports(built, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights.bin").write_text("precious")
    mark_complete(folder)
    assert main(["data", "export", str(built.folder), "--output", str(folder)]) == 1
    assert (folder / "weights.bin").read_text() == "precious"
    build(built.folder, "--output", str(tmp_path / "out"), action="export")
    build(built.folder, "--output", str(tmp_path / "out"), action="export")
    (tmp_path / "out" / "mine.txt").write_text("precious")
    assert main(["data", "export", str(built.folder), "--output", str(tmp_path / "out")]) == 1


def test_votes_on_known_items_decide_nothing(tmp_path):
    recipe = write_recipe(
        tmp_path, prompts={"num_prompts": 12}, review={"gold_share": 0.5}, filter={"review_share": 0.4}
    )
    build(recipe)
    store = BuildStore(recipe)
    before = decide_pairs(store)
    gold = [item for item in review_items(store) if item.gold]
    assert gold
    votes = VoteLog(store.votes_file)
    for number, item in enumerate(gold):
        for reviewer in ("a", "b"):
            votes.append({"id": f"{reviewer}-{number:06d}", "item": item.id, "reviewer": reviewer, "answer": "neither",
                          "order": ["original", "edited"], "ticks": {}, "milliseconds": 1})  # fmt: skip
    assert decide_pairs(store) == before
