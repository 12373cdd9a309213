"""Faults that are planted in a good dataset are found, where they are and nowhere else."""

import json
from io import BytesIO

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from trl_spatial.data import KINDS, Place, format_report, validate_splits


def places(findings):
    return [(finding.kind, finding.place) for finding in findings]


def noise(seed, size=(40, 30)):
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def test_a_good_dataset_has_no_finding(good):
    report = validate_splits(good)
    assert report.findings == [] and report.to_dict()["is_valid"]
    assert format_report(report, "pairs").startswith("pairs: 50 rows in 2 splits; 0 errors, 0 warnings, 0 notes\n")


def damaged(form):
    """A file that opens as an image, and is not whole."""
    file = BytesIO()
    noise(0).save(file, "JPEG" if form == "cut JPEG" else "PNG")
    data = bytearray(file.getvalue())
    if form == "wrong checksum":
        data[-13] ^= 1  # the last byte of the checksum of the pixels; the last chunk has 12
        return {"bytes": bytes(data), "path": None}
    return {"bytes": bytes(data[:-40]), "path": None}


EXCHANGED = (
    ("chosen", "rejected"), ("rejected", "chosen"), ("prompt", "perturbed_prompt"), ("perturbed_prompt", "prompt"),
)  # fmt: skip
# What is planted: the values of a row, the kind of the finding, its column and words of its reason.
FAULTS = {
    "no prompt": ({"prompt": None}, "bad_prompt", "prompt", "is missing"),
    "empty prompt": ({"prompt": ""}, "bad_prompt", "prompt", "is empty"),
    "blank prompt": ({"prompt": " \n"}, "bad_prompt", "prompt", "is empty"),
    "empty perturbed prompt": ({"perturbed_prompt": ""}, "bad_prompt", "perturbed_prompt", "is empty"),
    "no perturbed prompt": ({"perturbed_prompt": None}, "bad_prompt", "perturbed_prompt", "is missing"),
    "no image": ({"chosen": None}, "bad_image", "chosen", "is missing"),
    "empty file": ({"rejected": {"bytes": b"", "path": None}}, "bad_image", "rejected", "is not a PNG, JPEG"),
    "no image file": ({"rejected": {"bytes": b"GIF8?", "path": None}}, "bad_image", "rejected", "is not a PNG, JPEG"),
    "no such file": ({"chosen": {"bytes": None, "path": "no/such.png"}}, "bad_image", "chosen", "cannot be opened"),
    "cut PNG": ({"chosen": damaged("cut PNG")}, "bad_image", "chosen", "cannot be decoded"),
    "cut JPEG": ({"rejected": damaged("cut JPEG")}, "bad_image", "rejected", "truncated"),
    "wrong checksum": ({"rejected": damaged("wrong checksum")}, "bad_image", "rejected", "cannot be decoded"),
    "wrong level": ({"level": 7}, "wrong_level", "level", "not the number of operations"),
    "no operations": ({"operations": []}, "wrong_level", "level", "not the number of operations, 0"),
    "no relations": ({"relations": []}, "no_relations", "relations", "is empty"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_in_its_row(name, good, plant):
    values, kind, column, words = FAULTS[name]
    rng = np.random.default_rng(list(FAULTS).index(name))
    split = ("train", "test")[rng.integers(2)]
    row = int(rng.integers(len(good[split])))
    report = validate_splits(plant(good, split, row, **values))
    assert places(report.findings) == [(kind, Place(split, row, column))]
    (finding,) = report.errors
    assert words in finding.reason
    assert f"{split}, row {row}, `{column}`: " in format_report(report, "pairs")
    assert not report.to_dict()["is_valid"]


def test_each_image_is_opened_once_and_its_faults_are_found_in_every_row(good, rows_of, monkeypatch):
    rows = []
    for number, row in enumerate(rows_of(good["train"])):
        row |= {"chosen": damaged("wrong checksum")} if number == 7 else {}
        rows += [row, row | {name: row[other] for name, other in EXCHANGED}]
    opened = []
    open_file = PILImage.open
    monkeypatch.setattr(PILImage, "open", lambda *args, **options: opened.append(1) or open_file(*args, **options))
    splits = DatasetDict({"train": Dataset.from_list(rows, features=good["train"].features)})
    report = validate_splits(splits)
    assert places(report.findings) == [
        ("bad_image", Place("train", 14, "chosen")),
        ("bad_image", Place("train", 15, "rejected")),
    ]
    assert len(opened) == 2 * len(good["train"])
    statistics = report.statistics["train"]
    assert statistics.num_images == 2 * len(good["train"]) - 1
    assert statistics.counts["image_sizes"] == {"32x32": 4 * len(good["train"]) - 2}


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "same file"])
def test_a_pair_of_one_picture_is_found_whatever_its_files(format, good, plant, rows_of, encode):
    file = rows_of(good["train"])[33]["chosen"]
    image = file if format == "same file" else encode(good["train"][33]["chosen"], format)
    assert format == "same file" or image["bytes"] != file["bytes"]
    report = validate_splits(plant(good, "train", 33, rejected=image))
    assert places(report.errors) == [("same_images", Place("train", 33, "rejected"))]


def test_images_are_compared_as_training_sees_them(good, plant, encode):
    # turned by its EXIF orientation, and with an alpha channel, the rejected image shows what the chosen one shows
    picture = noise(3)
    exif = PILImage.Exif()
    exif[0x0112] = 3  # upside down
    turned = encode(picture.convert("RGBA").rotate(180), exif=exif)
    splits = plant(good, "test", 4, chosen=encode(picture), rejected=turned)
    assert places(validate_splits(splits).errors) == [("same_images", Place("test", 4, "rejected"))]
    splits = plant(good, "test", 4, chosen=encode(picture), rejected=encode(picture.rotate(180)))
    assert validate_splits(splits).findings == []


def test_the_prompt_as_perturbed_prompt_is_found(good, plant):
    report = validate_splits(plant(good, "test", 9, perturbed_prompt=good["test"][9]["prompt"]))
    assert places(report.findings) == [("same_prompts", Place("test", 9, "perturbed_prompt"))]


def test_several_faults_are_found_in_the_order_of_the_rows(good, plant):
    splits = plant(good, "train", 21, prompt="", chosen=None, level=9)
    splits = plant(splits, "train", 3, relations=[])
    splits = plant(splits, "test", 0, rejected=None)
    assert places(validate_splits(splits, num_threads=3).findings) == [
        ("no_relations", Place("train", 3, "relations")),
        ("bad_prompt", Place("train", 21, "prompt")),
        ("bad_image", Place("train", 21, "chosen")),
        ("wrong_level", Place("train", 21, "level")),
        ("bad_image", Place("test", 0, "rejected")),
    ]


def test_a_row_that_is_there_twice_is_a_warning(good, plant, rows_of):
    rows = rows_of(good["train"])
    report = validate_splits(plant(good, "train", 30, **rows[5]))
    assert report.errors == [] and report.to_dict()["is_valid"]
    (finding,) = report.warnings
    assert (finding.kind, finding.place, finding.other) == ("duplicate_row", Place("train", 30), Place("train", 5))
    # one prompt with other images, or the same images for another prompt, is another pair
    changed = plant(good, "train", 30, prompt=rows[5]["prompt"])
    assert validate_splits(changed).findings == []
    changed = plant(good, "train", 30, chosen=rows[5]["chosen"], rejected=rows[5]["rejected"])
    assert validate_splits(changed).findings == []


@pytest.mark.parametrize(("column", "other"), [("chosen", "chosen"), ("rejected", "chosen"), ("chosen", "rejected")])
def test_an_image_in_two_splits_is_an_error(column, other, good, plant, encode):
    leaked = encode(good["train"][17][other], "BMP")
    report = validate_splits(plant(good, "test", 6, **{column: leaked}))
    (finding,) = report.findings
    assert (finding.kind, finding.severity) == ("shared_image", "error")
    assert (finding.place, finding.other) == (Place("test", 6, column), Place("train", 17, other))
    assert f"test, row 6, `{column}`: the image is also at train, row 17, `{other}`." in format_report(report, "pairs")
    assert finding.to_dict()["other_row"] == 17


def test_a_prompt_in_two_splits_is_a_warning(good, plant):
    splits = plant(good, "test", 2, prompt=good["train"][11]["prompt"])
    report = validate_splits(splits)
    (finding,) = report.findings
    assert (finding.kind, finding.severity) == ("shared_prompt", "warning")
    assert (finding.place, finding.other) == (Place("test", 2, "prompt"), Place("train", 11, "prompt"))
    assert "WARNING: prompts that are in two splits (1)" in format_report(report, "pairs")


@pytest.mark.parametrize("rows", [(0, 0), (0, 39), (9, 0), (9, 39)])
def test_what_is_in_two_splits_is_found_at_their_first_and_last_rows(rows, good, plant):
    test_row, train_row = rows
    for column in ("prompt", "chosen", "rejected"):
        value = good["train"].cast_column("chosen", Image(decode=False)).cast_column("rejected", Image(decode=False))
        splits = plant(good, "test", test_row, **{column: value[train_row][column]})
        (finding,) = validate_splits(splits).findings
        assert finding.kind == ("shared_prompt" if column == "prompt" else "shared_image")
        assert (finding.place, finding.other) == (Place("test", test_row, column), Place("train", train_row, column))


def test_every_two_splits_are_compared(good, rows_of):
    features = good["test"].features
    rows = rows_of(good["test"])
    splits = {"a": rows[:2], "b": rows[2:5], "c": [rows[6], rows[4], rows[1]]}
    splits = {split: Dataset.from_list(some, features=features) for split, some in splits.items()}
    shared = [(f.kind, f.place, f.other) for f in validate_splits(splits).findings]
    assert shared == [
        (kind, Place("c", row, column), Place(other, other_row, column))
        for other, row, other_row in (("a", 2, 1), ("b", 1, 2))
        for kind, column in (("shared_image", "chosen"), ("shared_image", "rejected"), ("shared_prompt", "prompt"))
    ]


def test_only_the_first_rows_are_looked_at_if_asked(good, plant):
    splits = plant(good, "train", 20, prompt="")
    assert validate_splits(splits, max_rows=20).findings == []
    report = validate_splits(splits, max_rows=21)
    assert places(report.findings) == [("bad_prompt", Place("train", 20, "prompt"))]
    assert [(s.num_rows, s.num_checked) for s in report.statistics.values()] == [(40, 21), (10, 10)]
    assert "50 rows in 2 splits, 31 of them checked" in format_report(report, "pairs")


def test_a_dataset_of_three_columns_and_an_unknown_one_is_checked(tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(6)]
    for i, path in enumerate(paths):
        noise(i).save(path)
    rows = [{"prompt": f"prompt {i}", "chosen": paths[2 * i], "rejected": paths[2 * i + 1]} for i in range(3)]
    rows[1]["rejected"] = paths[1]
    rows[2]["rejected"] = paths[4]
    rows = [row | {"style": "oil"} for row in rows]
    for features in (
        None,
        Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image(), "style": Value("string")}),
    ):
        report = validate_splits({"train": Dataset.from_list(rows, features=features)})
        assert places(report.errors) == [("same_images", Place("train", 2, "rejected"))]
        assert {finding.kind for finding in report.notes} == {"absent_column", "unknown_column"}
        found = report.statistics["train"]
        assert (found.num_prompts, found.num_images, found.num_scenes) == (3, 4, None)
        assert found.counts["image_sizes"] == {"40x30": 6} and not found.counts["levels"]


def test_what_is_missing_keeps_nothing_else_from_being_checked(good, plant):
    splits = plant(good, "train", 7, prompt="")
    splits = DatasetDict({split: rows.remove_columns(["chosen", "operations"]) for split, rows in splits.items()})
    report = validate_splits(splits)
    assert [finding.kind for finding in report.errors] == ["missing_column", "bad_prompt", "missing_column"]
    # what is said of the same column of all splits is said once
    assert "ERROR: required columns that are missing (1)\n  train, test: `chosen` is missing" in format_report(
        report, "x"
    )


def test_a_null_in_an_optional_column_is_no_fault(good, plant):
    nulls = dict.fromkeys(("level", "operations", "relations", "scene", "generator", "seed"))
    report = validate_splits(plant(good, "test", 1, **nulls))
    assert report.findings == []
    assert report.statistics["test"].counts["levels"].total() == 9


@pytest.mark.parametrize("format", ["numpy", "arrow"])
def test_the_format_and_the_order_of_a_dataset_do_not_matter(format, good, plant):
    rows = plant(good, "train", 8, level=5)["train"].shuffle(seed=0)
    row = rows["level"][:].index(5)
    assert row != 8
    splits = {"train": rows.with_format(format)}
    assert places(validate_splits(splits).findings) == [("wrong_level", Place("train", row, "level"))]


def test_splits_without_rows_or_columns(good):
    report = validate_splits(DatasetDict(good | {"test": good["test"].select([])}))
    assert places(report.errors) == [("empty_split", Place("test"))]
    report = validate_splits({"train": Dataset.from_dict({"text": ["a"]})})
    assert [finding.kind for finding in report.errors] == ["missing_column"] * 3
    assert "train" in format_report(report, "x")


def test_the_report_shows_twenty_of_a_kind_errors_first(good, rows_of):
    rows = rows_of(good["train"])
    for number in range(25):
        rows[number]["relations"] = []
    rows[39] = rows[38] | {"style": "oil"}
    report = validate_splits({"train": Dataset.from_list(rows[:25] + rows[38:], features=good["train"].features)})
    lines = format_report(report, "pairs").splitlines()
    assert lines[2] == "ERROR: empty lists of relations (25)"
    assert [line.split(",")[1] for line in lines[3:23]] == [f" row {number}" for number in range(20)]
    assert lines[23] == "  ... and 5 more"
    assert lines[25] == "WARNING: rows that occur twice (1)"
    assert len(report.to_dict()["errors"]) == 25
    json.dumps(report.to_dict())


@pytest.mark.parametrize(
    ("splits", "options", "message"),
    [
        ({}, {}, "splits is empty"),
        ({"train": []}, {"max_rows": 0}, "max_rows=0"),
        ({"train": []}, {"num_threads": 0}, "=0"),
    ],
)
def test_bad_arguments_are_named(splits, options, message):
    with pytest.raises(ValueError, match=message):
        validate_splits(splits, **options)


def test_every_kind_has_a_severity():
    assert {severity for severity, _ in KINDS.values()} == {"error", "warning", "note"}
