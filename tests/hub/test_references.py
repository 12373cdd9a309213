"""Names of datasets and models, and cards, without a Hub."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

import trl_spatial
from trl_spatial.hub import Card, Reference, Result, find_reference
from trl_spatial.hub.references import UnknownReferenceError, find_repository
from trl_spatial.training.hub import format_seconds


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRL_SPATIAL_NAMESPACE", "lab")


@pytest.mark.parametrize(
    ("name", "repository", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/Name-7B.v2@main", "org/Name-7B.v2", "main"),
        ("org/name@refs/pr/1", "org/name", "refs/pr/1"),
        ("hub/name", "lab/name", None),
        ("hub/name@v1.0", "lab/name", "v1.0"),
    ],
)
def test_names_on_the_hub(name, repository, revision):
    assert find_reference(name, kind="model") == Reference(repository, revision, is_local=False)


def test_what_is_here_is_local(tmp_path):
    (tmp_path / "hub" / "name").mkdir(parents=True)
    (tmp_path / "a@b").mkdir()
    for name in ("hub/name", "a@b", str(tmp_path), tmp_path):
        assert find_reference(name, kind="dataset") == Reference(str(tmp_path / name), None, is_local=True)


@pytest.mark.parametrize("installation", ["/gone/site-packages", ".", "~"])
def test_a_model_of_another_installation_is_the_one_that_ships_with_this(installation):
    here = Path(trl_spatial.__file__).parent / "tiny_models" / "flux"
    found = find_reference(f"{installation}/trl_spatial/tiny_models/flux", kind="model")
    assert found == Reference(str(here), None, is_local=True)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("/gone/trl_spatial/tiny_models/sd9", "model"),
        ("/gone/trl_spatial/tiny_models/", "model"),
        ("/gone/other/tiny_models/flux", "model"),
        ("/gone/trl_spatial/tiny_models/flux/vae", "model"),
        ("/gone/trl_spatial/tiny_models/flux", "dataset"),
    ],
)
def test_nothing_else_is_taken_for_a_model_that_ships(name, kind):
    with pytest.raises(UnknownReferenceError):
        find_reference(name, kind=kind)


@pytest.mark.parametrize(
    "name", ["", "name", "./org/name", "/org/name", "a/b/c", "org/na me", "org/", "~/name", "org/name@"]
)
def test_other_names_are_errors_with_a_way_out(name):
    with pytest.raises(UnknownReferenceError, match=r"no file or folder .* hub/NAME"):
        find_reference(name, kind="model")


def test_two_revisions_have_to_agree():
    assert find_reference("org/name@v1", kind="model", revision="v1").revision == "v1"
    assert find_reference("org/name", kind="model", revision="v1").revision == "v1"
    with pytest.raises(ValueError, match="'v1', but 'v2'"):
        find_reference("org/name@v1", kind="model", revision="v2")


def test_a_namespace_that_is_none(monkeypatch):
    monkeypatch.setenv("TRL_SPATIAL_NAMESPACE", "not a name")
    with pytest.raises(ValueError, match="not a name"):
        find_reference("hub/name", kind="model")


def test_where_to_push(tmp_path):
    (tmp_path / "org" / "name").mkdir(parents=True)  # a folder of the same name changes nothing
    assert [find_repository(name, kind="model") for name in ("org/name", "hub/x", "x")] == [
        "org/name",
        "lab/x",
        "lab/x",
    ]
    with pytest.raises(ValueError, match="not the name of a repository"):
        find_repository("org/name@v1", kind="model")


@pytest.fixture
def card():
    return Card(
        "spatial_score.md",
        {"library_name": "trl_spatial", "pipeline_tag": "image-text-to-text", "tags": ["trl"]},
        {"settings": {"updates": 3}, "trainer_name": "T"},
        [
            Result("accuracy", 0.912345, 1234, "pairs", (0.8953, 0.9271), None, "org/pairs", "test"),
            Result("accuracy", 0.5, dataset="easy ones"),
        ],
        base_model="org/base",
        dataset="org/pairs",
    )


class TestCard:
    def test_it_is_the_same_when_it_is_loaded(self, card, tmp_path):
        card.save(tmp_path)
        loaded = Card.load(tmp_path)
        assert loaded.results == card.results and loaded.render("a/b") == card.render("a/b")
        assert loaded.has_made(tmp_path / "README.md")
        (tmp_path / "README.md").write_text("mine")
        assert not loaded.has_made(tmp_path / "README.md")
        assert Card.load(tmp_path / "nowhere") is None

    def test_the_hub_reads_its_results(self, card):
        parsed = ModelCard(card.render("lab/scorer"))
        first, second = parsed.data.eval_results
        assert (first.dataset_type, first.dataset_split, first.metric_value) == ("org/pairs", "test", 0.9123)
        assert first.metric_args == {"num_samples": 1234, "confidence_interval_95": [0.8953, 0.9271]}
        assert second.metric_value == 0.5 and second.metric_args is None
        assert "| accuracy | 0.9123 | 0.8953 to 0.9271 | 1,234 pairs | org/pairs test |" in parsed.text
        assert "| accuracy | 0.5 |  |  | easy ones |" in parsed.text

    def test_the_newer_format_has_what_is_measured_on_datasets_of_the_hub(self, card):
        ((name, content),) = card.result_files().items()
        (entry,) = yaml.safe_load(content)
        assert name == ".eval_results/org_pairs_test_accuracy.yaml"
        assert entry["dataset"] == {"id": "org/pairs", "task_id": "test_accuracy"} and entry["value"] == 0.9123
        assert entry["notes"] == "1234 pairs, 95 % interval 0.8953 to 0.9271"

    def test_what_is_not_known_is_not_said(self, card):
        text = Card("spatial_score.md", {"tags": []}).render("lab/scorer")
        for word in ("None", "updates", "hardware", "base_model", "model-index", "95 % interval"):
            assert word not in text
        assert "not evaluated" in text and "not recorded" in text

    def test_one_of_something_else_is_an_error(self, tmp_path):
        for content in ("[]", "{", json.dumps({"name": "x"})):
            (tmp_path / "card.json").write_text(content)
            with pytest.raises(ValueError, match=r"card\.json is not the card"):
                Card.load(tmp_path)


def test_times_are_written_as_people_say_them():
    assert [format_seconds(value) for value in (0.4, 5, 60, 3725)] == ["0 s", "5 s", "1 min", "1 h 2 min 5 s"]
