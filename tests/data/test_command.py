"""`trl_spatial data validate`."""

import json
import sys

import pytest
from datasets import DatasetDict
from PIL import Image

import trl_spatial.data
from trl_spatial.cli import main


@pytest.fixture
def folder(good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good.save_to_disk("good")
    return tmp_path


def save(splits, name):
    DatasetDict(splits).save_to_disk(name)
    return name


def test_a_good_dataset_ends_with_0(folder, capsys):
    assert main(["data", "validate", "good"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("good: 50 rows in 2 splits; 0 errors") and "kinds of relations" in out
    assert out.isascii()


def test_errors_end_with_1_after_the_report(folder, good, plant, capsys):
    bad = plant(plant(good, "train", 4, prompt=""), "test", 2, prompt=good["train"][11]["prompt"])
    assert main(["data", "validate", save(bad, "bad")]) == 1
    captured = capsys.readouterr()
    assert "train, row 4, `prompt`: '' is empty." in captured.out
    assert captured.out.index("ERROR") < captured.out.index("WARNING") < captured.out.index("split  ")
    assert "trl_spatial data: error: bad has 1 error; the report lists them." in captured.err


def test_warnings_end_with_0(folder, good, plant, capsys):
    doubtful = plant(good, "test", 2, prompt=good["train"][11]["prompt"])
    assert main(["data", "validate", save(doubtful, "doubtful")]) == 0
    assert "WARNING: prompts that are in two splits (1)" in capsys.readouterr().out


def test_json_is_all_that_is_printed(folder, good, plant, capsys):
    bad = save(plant(good, "test", 3, chosen=None), "bad")
    assert main(["data", "validate", bad, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["is_valid"] and report["warnings"] == report["notes"] == []
    (error,) = report["errors"]
    assert error == {
        "kind": "bad_image", "split": "test", "row": 3, "column": "chosen", "value": "None", "reason": "is missing.",
    }  # fmt: skip
    assert report["splits"]["test"]["image_sizes"]["counts"] == {"32x32": 19}

    assert main(["data", "validate", bad, "--json", "--splits", "train"]) == 0
    assert list(json.loads(capsys.readouterr().out)["splits"]) == ["train"]
    assert main(["data", "validate", bad, "--json", "--max_rows", "3"]) == 0
    assert [split["num_checked"] for split in json.loads(capsys.readouterr().out)["splits"].values()] == [3, 3]


def test_output_holds_what_json_prints_and_a_picture(folder, good, plant, capsys):
    bad = save(plant(good, "test", 3, chosen=None), "bad")
    assert main(["data", "validate", bad, "--json", "--output", "out/bad"]) == 1  # written though there are errors
    assert (folder / "out/bad/statistics.json").read_text() == capsys.readouterr().out
    with Image.open(folder / "out/bad/statistics.png") as image:
        image.load()
        assert image.format == "PNG" and image.width > 1000
    assert main(["data", "validate", "good", "--output", "out/bad"]) == 1
    assert "out/bad exists and is not an empty folder" in capsys.readouterr().err


def test_without_matplotlib_output_names_what_to_install(folder, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "trl_spatial.data.charts", raising=False)
    monkeypatch.delattr(trl_spatial.data, "charts", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["data", "validate", "good", "--output", "out"]) == 1
    captured = capsys.readouterr()
    assert 'pip install "trl-spatial[data]"' in captured.err and captured.out == ""
    assert not (folder / "out").exists()
    assert main(["data", "validate", "good"]) == 0


def test_other_forms_of_a_dataset(folder, good, capsys):
    (folder / "files").mkdir()
    for split, rows in good.items():
        rows.to_parquet(f"files/{split}-00000-of-00001.parquet")
    assert main(["data", "validate", "files", "--json"]) == 0
    splits = json.loads(capsys.readouterr().out)["splits"]
    assert {split: found["num_images"] for split, found in splits.items()} == {"train": 80, "test": 20}
    rows = [{"prompt": "a cube", "chosen": "a.png", "rejected": "b.png", "relations": [{"relation": "on"}]}]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    Image.new("RGB", (8, 8)).save("a.png")
    assert main(["data", "validate", "rows.jsonl"]) == 1
    out = capsys.readouterr().out
    assert "train, row 0, `rejected`: 'b.png' cannot be opened" in out and "a relative path starts at" in out
    assert "kinds of relations: on" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["good", "--splits", "dev"], "good has no split 'dev'; it has 'train', 'test'. Name one with --splits."),
        (["nowhere"], "nowhere"),
        (["good", "--max_rows", "0"], "max_rows=0 must be at least 1"),
    ],
)
def test_mistakes_are_named(arguments, message, folder, capsys):
    assert main(["data", "validate", *arguments]) == 1
    assert message in capsys.readouterr().err
