"""Which columns a preference dataset has, and what they hold."""

import pytest
from datasets import Dataset, Features, Image, List, Value

from trl_spatial.data import COLUMNS, check_columns
from trl_spatial.scenes import make_preference_dataset


USUAL = [name for name in COLUMNS if name != "margin"]  # scenes have no margin, and that is not worth a note


def test_our_own_pairs_have_every_column_and_no_other():
    usable, findings = check_columns(make_preference_dataset(1).features, "train")
    assert usable == USUAL and findings == []


def test_a_preference_dataset_needs_three_columns():
    features = Features({"prompt": Value("string"), "chosen": Image(), "rejected": Image()})
    usable, findings = check_columns(features, "train")
    assert usable == ["prompt", "chosen", "rejected"]
    assert {finding.severity for finding in findings} == {"note"}
    assert {finding.place.column for finding in findings} == set(USUAL) - set(usable)


@pytest.mark.parametrize("missing", ["prompt", "chosen", "rejected"])
def test_a_missing_column_is_named_with_the_way_out(missing):
    features = {"prompt": Value("string"), "chosen": Image(), "rejected": Image(), "caption": Value("string")}
    del features[missing]
    usable, findings = check_columns(Features(features), "test")
    (error,) = (finding for finding in findings if finding.severity == "error")
    assert error.kind == "missing_column" and missing not in usable
    assert str(error).startswith(f"test, `{missing}`: the column is missing")
    assert "caption" in str(error) and f"rename_column(..., '{missing}')" in str(error)
    (unknown,) = (finding for finding in findings if finding.kind == "unknown_column")
    assert unknown.place.column == "caption" and unknown.severity == "note"


@pytest.mark.parametrize(
    ("column", "feature"),
    [
        ("prompt", Value("int64")),
        ("prompt", Value("null")),
        ("chosen", List(Image())),
        ("rejected", Value("float32")),
        ("rejected", {"bytes": Value("binary"), "width": Value("int64")}),
        ("perturbed_prompt", List(Value("string"))),
        ("level", Value("string")),
        ("operations", List(Value("int64"))),
        ("operations", List({"relation": Value("string")})),
        ("relations", Value("string")),
        ("relations", {"relation": Value("string")}),
        ("scene", Value("int64")),
        ("generator", Value("int64")),
        ("seed", Value("float64")),
    ],
)
def test_a_column_of_a_wrong_type_is_an_error_and_not_read(column, feature):
    features = make_preference_dataset(1).features
    features[column] = feature
    usable, findings = check_columns(features, "train")
    (error,) = findings
    assert (error.kind, error.severity, error.place.column) == ("wrong_type", "error", column)
    assert str(feature) in error.reason and COLUMNS[column].holds in error.reason
    assert usable == [name for name in USUAL if name != column]


@pytest.mark.parametrize(
    ("column", "feature"),
    [
        ("prompt", Value("large_string")),
        ("chosen", Value("string")),
        ("chosen", Value("binary")),
        ("chosen", Image(decode=False)),
        ("chosen", {"bytes": Value("binary"), "path": Value("string")}),
        ("level", Value("uint8")),
        ("relations", List(Value("string"))),
        ("relations", List(Value("null"))),  # of a file in which every list is empty
        ("operations", {"operation": List(Value("string")), "before": List(Value("string"))}),  # of an old dataset
    ],
)
def test_other_ways_to_store_the_same_are_taken(column, feature):
    features = make_preference_dataset(1).features
    features[column] = feature
    assert check_columns(features, "train") == (USUAL, [])


def test_an_optional_column_of_nulls_is_as_good_as_none():
    features = Dataset.from_list(
        [{"prompt": "a cube", "chosen": "a.png", "rejected": "b.png", "level": None}]
    ).features
    usable, findings = check_columns(features, "train")
    assert "level" not in usable and all(finding.severity == "note" for finding in findings)
