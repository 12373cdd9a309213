"""Data → Hub → training → Hub → another machine, with the commands as users type them."""

import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml
from datasets import load_dataset
from huggingface_hub import DatasetCard, ModelCard
from PIL import Image

from tests.hub.conftest import BACKBONE, Machine
from tests.hub_stub import HubStub


SCORE = """
import sys
from PIL import Image
from trl_spatial import SpatialScore
images = [Image.new("RGB", (32, 32), color) for color in ("red", "blue", "white")]
for name in {names!r}:
    scorer = SpatialScore.from_pretrained(name, device="cpu")
    mean, std = scorer.score(["a red circle to the left of a blue square"] * 3, images)
    print("SCORES", *mean.tolist(), *std.tolist())
"""


def scores(machine, *names, **environment):
    """Scores of the same images, (num_names, 6), of models that are loaded by their names."""
    text = machine.python(SCORE.format(names=names), **environment)
    return np.array([[float(word) for word in line.split()] for line in re.findall("SCORES (.+)", text)])


@pytest.fixture(scope="module")
def trip(backbone_files, tmp_path_factory):
    """The Hub after a round trip, the machine that made it, and what the commands said."""
    folder = tmp_path_factory.mktemp("trip")
    with HubStub() as hub:
        hub.files[BACKBONE] = dict(backbone_files)
        machine = Machine(hub, folder / "here")
        said = {}
        machine.run("data", "make", "--num_pairs", 12, "--num_test_pairs", 6, "--image_size", 32, "--output", "pairs")
        said["data"] = machine.run(
            "push", "pairs", "--to", "hub/SpatialReward", "--license", "apache-2.0", "--max_shard_size", "20KB"
        )
        # the line of the README, word for word
        said["reward"] = machine.run(*["reward", "--dataset", "hub/SpatialReward"])
        said["plan"] = machine.run("push", "trainer_output", "--to", "hub/SpatialScore", "--dry-run")
        assert "tester/SpatialScore" not in hub.files
        said["model"] = machine.run("push", "trainer_output", "--to", "hub/SpatialScore", "--license", "apache-2.0")
        yield hub, machine, said


class TestDataset:
    def test_the_shards_hold_the_images_and_the_rows(self, trip):
        hub, machine, _ = trip
        files = hub.files["datasets/tester/SpatialReward"]
        shards = [name for name in files if name.endswith(".parquet")]
        assert len([name for name in shards if name.startswith("data/train-")]) > 1
        folder = machine.folder / "downloaded"
        for name in shards:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(files[name])
        for split, number in (("train", 12), ("test", 6)):
            pushed = load_dataset("parquet", data_files=str(folder / f"data/{split}-*"), cache_dir=str(folder))[
                "train"
            ]
            made = load_dataset("parquet", data_files=self.export(machine, split), cache_dir=str(folder))["train"]
            assert pushed.column_names == [
                "prompt", "chosen", "rejected", "perturbed_prompt", "level", "operations", "relations", "scene",
                "generator", "seed",
            ]  # fmt: skip
            assert len(pushed) == number
            for mine, theirs in zip(made, pushed, strict=True):
                for column in ("chosen", "rejected"):
                    assert np.array_equal(np.asarray(mine.pop(column)), np.asarray(theirs.pop(column)))
                assert mine == theirs

    @staticmethod
    def export(machine, split):
        from datasets import load_from_disk

        path = machine.folder / f"{split}.parquet"
        load_from_disk(machine.folder / "pairs" / split).to_parquet(path)
        return str(path)

    def test_it_streams_and_is_validated_from_the_hub(self, trip):
        _, machine, _ = trip
        output = machine.python(
            "from datasets import load_dataset\n"
            "rows = list(load_dataset('tester/SpatialReward', split='train', streaming=True))\n"
            "print(len(rows), rows[0]['chosen'].size)"
        )
        assert "12 (32, 32)" in output
        assert 'is_valid": true' in machine.run("data", "validate", "hub/SpatialReward", "--json")

    def test_what_is_in_the_cache_needs_no_network(self, trip):
        _, machine, _ = trip  # which has trained on it
        assert '"is_valid": true' in machine.run("data", "validate", "hub/SpatialReward", "--json", HF_HUB_OFFLINE="1")

    def test_the_code_in_its_card_runs(self, trip):
        hub, machine, _ = trip
        text = hub.files["datasets/tester/SpatialReward"]["README.md"].decode()
        (program,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        assert "(32, 32)" in machine.python(program)

    def test_a_second_configuration_stands_beside_the_first(self, trip):
        hub, machine, _ = trip
        machine.run("data", "make", "--num_pairs", 3, "--image_size", 32, "--seed", 9, "--output", "few")
        machine.run("push", "few", "--to", "hub/both")
        machine.run("push", "pairs", "--to", "hub/both", "--config_name", "many")
        for name, rows in (("default", "train.* 3"), ("many", "train.* 12")):
            assert re.search(rows, machine.run("data", "validate", "hub/both", "--config_name", name))
        text = hub.files["datasets/tester/both"]["README.md"].decode()
        assert 'load_dataset("tester/both", "many"' in text

    def test_its_card(self, trip):
        hub, _, _ = trip
        files = hub.files["datasets/tester/SpatialReward"]
        card = DatasetCard(files["README.md"].decode())
        data = card.data.to_dict()
        assert data["license"] == "apache-2.0" and data["size_categories"] == ["n<1K"]
        # what the viewer needs, kept from the upload of the shards
        assert data["configs"][0]["data_files"][0] == {"split": "train", "path": "data/train-*"}
        assert {part["name"]: part["num_examples"] for part in data["dataset_info"]["splits"]} == {
            "train": 12,
            "test": 6,
        }
        assert "| train | 12 |" in card.text and 'load_dataset("tester/SpatialReward"' in card.text
        for name in ("samples.png", "statistics.png"):
            assert f"]({name})" in card.text and Image.open(io.BytesIO(files[name])).width > 300
        assert "{{" not in card.text.replace("{{Enhancing", "")


class TestModel:
    def test_it_was_trained_on_the_hub_s_dataset(self, trip):
        hub, machine, said = trip
        assert "Training completed" in said["reward"]
        card = json.loads((machine.folder / "trainer_output" / "card.json").read_text())
        assert card["dataset"] == "tester/SpatialReward" and card["base_model"] == BACKBONE
        assert hub.unknown == []

    def test_a_dry_run_lists_what_is_pushed(self, trip):
        hub, _, said = trip
        assert set(re.findall(r"B +(\S+)$", said["plan"], re.MULTILINE)) == set(hub.files["tester/SpatialScore"])

    def test_it_scores_the_same_elsewhere(self, trip, tmp_path):
        hub, machine, _ = trip
        here = scores(machine, "trainer_output")
        elsewhere = Machine(hub, tmp_path / "elsewhere")
        pinned = f"tester/SpatialScore@{hub.revision('tester/SpatialScore')}"
        assert np.abs(here).min() > 0
        assert np.array_equal(scores(elsewhere, "hub/SpatialScore", pinned), np.vstack([here, here]))
        # the warm cache is enough: offline, and without a network
        for gone in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
            assert np.array_equal(scores(elsewhere, "hub/SpatialScore", **gone), here)

    def test_a_merged_model_is_pushed_with_the_card_of_its_training(self, trip):
        hub, machine, _ = trip
        machine.run("merge", "--model", "hub/SpatialScore", "--output", "merged", "--dtype", "float32")
        machine.run("push", "merged", "--to", "hub/merged")
        files = hub.files["tester/merged"]
        assert "model.safetensors" in files and "adapter_config.json" not in files
        card = files["README.md"].decode()
        assert 'from_pretrained("tester/merged")' in card and "| updates | 1 |" in card
        here, merged = scores(machine, "trainer_output", "hub/merged")
        assert merged == pytest.approx(here, abs=1e-4)

    def test_its_card_holds_what_the_run_recorded(self, trip):
        hub, _, _ = trip
        card = ModelCard(hub.files["tester/SpatialScore"]["README.md"].decode())
        data = card.data.to_dict()
        assert data["base_model"] == BACKBONE and data["datasets"] == "tester/SpatialReward"
        assert data["license"] == "apache-2.0" and data["library_name"] == "trl_spatial"
        assert data["pipeline_tag"] == "image-text-to-text" and "reward-trainer" in data["tags"]
        assert "model-index" not in data  # it was not evaluated
        assert "not evaluated" in card.text and "| updates | 1 |" in card.text
        assert "| hardware | 1 × CPU |" in card.text and "| time | " in card.text

    def test_the_code_in_its_card_runs(self, trip, tmp_path):
        hub, _, _ = trip
        reader = Machine(hub, tmp_path / "reader")
        Image.new("RGB", (32, 32), "red").save(reader.folder / "image.png")
        (program,) = re.findall(
            r"^```python\n(.*?)^```", hub.files["tester/SpatialScore"]["README.md"].decode(), re.MULTILINE | re.DOTALL
        )
        assert re.search(r"\[[-\d.]+\] \[[\d.]+\]", reader.python(program))


def test_nothing_secret_or_local_was_uploaded(trip):
    hub, machine, _ = trip
    private = [
        str(machine.folder),
        str(machine.folder.parent),
        hub.environment["HF_TOKEN"],
        "/home/",
        str(machine.folder.home()),
    ]
    for repo, files in hub.files.items():
        for name, data in files.items():
            assert not re.search(r"\.(bin|pt|pth|pkl|pickle|ckpt)$", name), (repo, name)
            if repo != BACKBONE:
                for secret in private:
                    assert secret.encode() not in data, (repo, name, secret)


def test_tokens_are_not_printed(trip):
    hub, _, said = trip
    for text in said.values():
        assert hub.environment["HF_TOKEN"] not in text


def test_front_matter_is_what_the_hub_validates(trip):
    hub, _, _ = trip
    for files in hub.files.values():
        if "README.md" in files:
            front = re.match(r"---\n(.*?)\n---\n", files["README.md"].decode(), re.DOTALL)[1]
            assert isinstance(yaml.safe_load(front), dict)


def test_help_of_push_answers_at_once():
    code = "import sys, trl_spatial.cli; sys.argv = ['x']; from trl_spatial.hub import find_reference; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_dataset_that_was_built_goes_up_with_its_configurations_and_its_card(hub, tmp_path):
    machine = Machine(hub, tmp_path / "here")
    (machine.folder / "recipe.yaml").write_text(
        "store: built\nprompts: {num_prompts: 16, num_relations: {3: 1, 4: 1}}\n"
        "render: {generators: [{name: tabletop, image_size: 48}]}\n"
    )
    machine.run("data", "build", "recipe.yaml")
    assert "Would push a dataset" in machine.run("push", "built/dataset", "--to", "hub/Tabletop", "--dry-run")
    machine.run("push", "built/dataset", "--to", "hub/Tabletop")
    files = hub.files["datasets/tester/Tabletop"]
    card = files["README.md"].decode()
    assert "## How it was made" in card and "## Controls" in card and "tester/Tabletop" in card
    configs = yaml.safe_load(card.split("---")[1])["configs"]
    assert {config["config_name"] for config in configs} == {"default", "text", "preview"}
    counted = machine.python(
        "from datasets import load_dataset\n"
        "for name in ('default', 'text'):\n"
        "    rows = load_dataset('tester/Tabletop', name, split='train')\n"
        "    print(name, len(rows), 'chosen' in rows.column_names)\n"
    )
    default, text = (line.split()[1:] for line in counted.splitlines() if line.startswith(("default", "text")))
    assert default[0] == text[0] and (default[1], text[1]) == ("True", "False")
    assert str(tmp_path) not in card
