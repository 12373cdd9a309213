"""Files of rows are read as they are written; what is damaged, empty or names other files is an error in one line."""

import json
import os
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value

from trl_spatial.preferences.files import load_files
from trl_spatial.scripts.datasets import load_dataset_dict, load_prompts


PROMPTS = ["a red circle", "NA", "null", "nan", "None", "007", "true", "a\u2028b", "1e5"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.json", "a.jsonl", "A.TXT", "folder/a.csv"])
def test_prompts_are_read_as_they_are_written(here, name, encoding):
    rows = [{"prompt": f" {prompt}\t", "number": 1} for prompt in PROMPTS]
    text = {
        "txt": "\r\n".join([f" {prompt}" for prompt in PROMPTS] + ["", " "]),
        "csv": "prompt,number\n" + "".join(f'" {prompt} ",1\n' for prompt in PROMPTS),
        "json": json.dumps(rows, indent=1),
        "jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
    }[name.lower().rpartition(".")[2]]
    (here / name).parent.mkdir(exist_ok=True)
    (here / name).write_bytes(text.encode(encoding))
    prompts = load_prompts(name, "train")
    assert prompts["prompt"][:] == PROMPTS
    assert name.lower().endswith("txt") or prompts["number"][:] == [1] * len(PROMPTS)


@pytest.mark.parametrize(
    ("end", "number"), [("\n", 2), ("\r\n", 2), ("\r", 2), ("\x0b", 1), ("\x0c", 1), ("\x85", 1), ("\u2029", 1)]
)
def test_lines_of_text_end_where_editors_end_them(here, end, number):
    (here / "a.txt").write_bytes(f"a cat{end}a dog{end}".encode())
    assert len(load_prompts("a.txt", "train")) == number


def test_a_missing_number_in_a_csv_is_null():
    with open("a.csv", "w") as file:
        file.write("prompt,level\na,1\nb,\n")
    assert load_files(Path("a.csv"))["train"]["level"][:] == [1, None]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": null}\n', "a.jsonl, row 1, column `prompt`: None is missing"),
        ("a.jsonl", b'{"prompt": "a"}\n{"other": "b"}\n', "a.jsonl, row 1, column `prompt`: None is missing"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": 7}\n', "a.jsonl, row 1, column `prompt`: 7 is a int"),
        ("a.csv", b'prompt\na\n" "\n', "a.csv, row 1, column `prompt`: ' ' is empty"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": \n', "a.jsonl, line 2: '{\"prompt\": ' is not JSON"),
        ("a.jsonl", b'{"prompt": "a \\ud800"}\n', "a.jsonl, line 1: .* half of a surrogate pair"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xe9"}\n', "a.jsonl, line 2: is not UTF-8"),
        ("a.json", b'[\n{"prompt": "a"},\n{"prompt" "b"}\n]', "a.json, line 3: .* is not JSON"),
        ("a.csv", "prompt\na\né\n".encode("latin-1"), "a.csv, line 3: is not UTF-8"),
        ("a.csv", b"prompt,n\na,1\nb,2,3\n", "a.csv cannot be read as a dataset: .* line 3, saw 3"),
        ("a.txt", "a\né\n".encode("latin-1"), "a.txt, line 2 is not UTF-8"),
        ("a.txt", b"a\n" + b"b" * 20_001, "a.txt, row 1, column `prompt`: 'bbb.*bbb' has 20,001 characters"),
        ("a.parquet", b"PAR1 hello PAR1", "a.parquet is damaged"),
        ("a.tsv", b"prompt\na\n", "a.tsv is not a .parquet, .json, .jsonl or .csv file"),
    ]
    + [(f"a.{kind}", b"", f"a.{kind} (is empty|has 0 rows)") for kind in ("parquet", "json", "jsonl", "csv", "txt")]
    + [("a.jsonl", b"\n\n", "a.jsonl has no rows"), ("a.json", b"[]", "a.json has no rows"), ("a.csv", b"prompt\n", "a.csv has no rows")],
)  # fmt: skip
def test_a_damaged_file_is_named_with_its_line_alone_and_in_a_folder(here, name, content, words):
    (here / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        load_prompts(name, "train")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    if name.endswith((".txt", ".tsv")):
        return
    (here / "folder").mkdir()
    shutil.move(name, "folder/train" + name[1:])
    with pytest.raises(ValueError, match=re.escape("folder")):
        load_prompts("folder", "train")


@pytest.mark.parametrize("content", [None, b"", b"junk", b"null", b"[]"])
@pytest.mark.parametrize("file", ["dataset_dict.json", "train/state.json", "train/dataset_info.json", "train/*.arrow"])
def test_a_saved_dataset_that_is_damaged_is_named(here, file, content):
    DatasetDict({"train": Dataset.from_dict({"prompt": ["a"]})}).save_to_disk("saved")
    if (file, content) == ("dataset_dict.json", None):
        return  # datasets finds the rows without the list
    (file,) = (here / "saved").glob(file)
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"saved.* (is empty|is not JSON|cannot be read as a dataset: .)"):
        load_prompts("saved", "train")


def test_a_cut_parquet_file_is_named(here):
    Dataset.from_dict({"prompt": ["a"] * 100}).to_parquet("whole.parquet")
    data = (here / "whole.parquet").read_bytes()
    (here / "cut.parquet").write_bytes(data[:-20])
    assert len(load_prompts("whole.parquet", "train")) == 100
    with pytest.raises(ValueError, match=r"cut.parquet is damaged"):
        load_prompts("cut.parquet", "train")


@pytest.mark.parametrize("kind", ["README.md", ".huggingface.yaml"])
@pytest.mark.parametrize(
    "files",
    ["../secret.csv", "http://127.0.0.1:9/a.csv", "hf://datasets/a/b/c.csv", "zip://a.csv::http://127.0.0.1:9/a.zip",
     "file:///etc/hostname", "HERE/secret.csv", "[{split: train, path: [a.csv, ../secret.csv]}]"],
)  # fmt: skip
def test_a_card_cannot_name_files_elsewhere(here, kind, files):
    (here / "folder").mkdir()
    for file in ("secret.csv", "folder/a.csv"):
        (here / file).write_text("prompt\na\n")
    fence = "---\n" if kind.endswith("md") else ""
    for names in (files, "a.csv"):
        text = f"configs:\n- config_name: default\n  data_files: {names.replace('HERE', str(here))}\n"
        (here / "folder" / kind).write_text(f"{fence}{text}{fence}")
        if names == files:
            with pytest.raises(ValueError, match=r"names .* not in its folder"):
                load_prompts("folder", "train")
        else:
            assert load_prompts("folder", "train")["prompt"][:] == ["a"]


def test_a_saved_dataset_cannot_name_files_elsewhere(here):
    rows = Dataset.from_dict({"prompt": ["a"]})
    rows.save_to_disk("secret")
    rows.save_to_disk("saved")
    state = json.loads((here / "saved/state.json").read_text())
    state["_data_files"][0]["filename"] = "../secret/" + state["_data_files"][0]["filename"]
    (here / "saved/state.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"state.json names '\.\./secret"):
        load_prompts("saved", "train")
    DatasetDict({"train": rows}).save_to_disk("splits")
    (here / "splits/dataset_dict.json").write_text('{"splits": ["../secret"]}')
    with pytest.raises(ValueError, match=r"dataset_dict.json names '\.\./secret'"):
        load_prompts("splits", "train")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    "named", ["inside.png", "outside.png", "../outside.png", "/etc/hostname", "http://127.0.0.1:9/a.png"]
)
def test_cells_of_images_name_only_files_of_the_folder(here, named, nested):
    (here / "folder").mkdir()
    path = (
        str(here / "folder" / named)
        if named == "inside.png"
        else str(here / named)
        if named == "outside.png"
        else named
    )
    cell = {"bytes": None, "path": path}
    # a column beside the pairs' own, which publishing would embed too
    feature = List({"picture": Image(decode=False)}) if nested else Image(decode=False)
    features = Features({"prompt": Value("string"), "extra": feature})
    rows = Dataset.from_list([{"prompt": "a", "extra": [{"picture": cell}] if nested else cell}], features=features)
    pq.write_table(rows.data.table, here / "folder/train.parquet")  # `to_parquet` would embed the file
    if named == "inside.png":
        assert len(load_prompts("folder", "train")) == 1
        assert len(list(load_dataset_dict("folder/train.parquet", streaming=True)["train"])) == 1
    else:
        with pytest.raises(ValueError, match=re.escape(f"{path!r} is not in the dataset's folder")):
            load_prompts("folder/train.parquet", "train")
        with pytest.raises(ValueError, match=re.escape(f"{path!r} is not in the dataset's folder")):
            list(load_dataset_dict("folder/train.parquet", streaming=True)["train"])


@pytest.mark.parametrize("name", ["train.csv", "README.md", "state.json"])
def test_a_pipe_is_not_waited_for(here, name):
    (here / "folder").mkdir()
    (here / "folder/test.csv").write_text("prompt\na\n")
    os.mkfifo(here / "folder" / name)
    with pytest.raises(ValueError, match="is not a regular file"):
        load_prompts("folder", "test")
    with pytest.raises(ValueError, match=f"{name} is neither a regular file nor a folder"):
        load_prompts(f"folder/{name}", "test")


def test_a_cell_that_has_only_a_path_is_checked_too(here):
    (here / "a.jsonl").write_text(json.dumps({"prompt": "a", "extra": {"path": "/etc/hostname"}}))
    with pytest.raises(ValueError, match="'/etc/hostname' is not in the dataset's folder"):
        load_prompts("a.jsonl", "train")


def test_the_folder_that_one_is_in_is_a_dataset_and_an_empty_name_none(here, monkeypatch):
    (here / "inner").mkdir()
    (here / "train.csv").write_text("prompt\na red circle\n")
    assert load_dataset_dict(".")["train"]["prompt"][:] == ["a red circle"]
    monkeypatch.chdir(here / "inner")
    assert load_dataset_dict("..")["train"]["prompt"][:] == ["a red circle"]
    for load in (load_dataset_dict, lambda name: load_prompts(name, "train")):
        with pytest.raises(ValueError, match=r"no file or folder with an empty name. Name a dataset by a local path"):
            load("")


def test_two_folders_of_one_name_are_two_datasets(here):
    """Datasets caches a folder with configurations by its name alone."""
    for place, number in (("first", 2), ("second", 3)):
        folder = here / place / "dataset"
        folder.mkdir(parents=True)
        Dataset.from_dict({"prompt": [f"{place} {i}" for i in range(number)]}).to_parquet(folder / "train.parquet")
        (folder / "README.md").write_text(
            "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.parquet\n---\n"
        )
        assert load_dataset_dict(str(folder))["train"]["prompt"][:] == [f"{place} {i}" for i in range(number)]
