"""A function of the user as a scorer, and how scorers are named."""

import pytest
from PIL import Image

from trl_spatial.evaluation.scorers import SCORERS, make_scorer


IMAGES = [Image.new("RGB", (8, 4)), Image.new("RGB", (6, 8))]


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_scorers.py").write_text(
        "def width(prompts, images):\n"
        "    return [None if prompt == 'skip' else image.width for prompt, image in zip(prompts, images)]\n\n"
        "def short(prompts, images):\n    return [1.0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


def test_numbers_are_scores_and_none_abstains(module):
    scores = make_scorer("my_scorers:width").score(["a", "skip"], IMAGES)
    assert scores[0].mean == 8.0 and isinstance(scores[0].mean, float)
    assert scores[1].mean is None and scores[1].raw


def test_every_image_needs_a_score(module):
    with pytest.raises(ValueError, match=r"my_scorers:short returned 1 scores for 2 images"):
        make_scorer("my_scorers:short").score(["a", "b"], IMAGES)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("clip", r"no scorer 'clip'.*clipscore.*vqascore"),
        ("", "no scorer ''"),
        ("my.scorers:no such name", "no scorer"),
        ("rules:folder", "takes no model, got 'folder'"),
        ("pixels:folder", "Write pixels alone"),
        ("clipscore", "clipscore needs a model. Write it after a colon: a folder, ORG/NAME"),
        ("hpsv2", r"needs a model.*HPS_v2.1_compressed.pt.*save_hpsv2.*hpsv2:FOLDER"),
        ("pickscore:no/such/folder", "no file or folder no/such/folder"),
    ],
)
def test_what_is_no_scorer_is_explained(spec, message):
    with pytest.raises(ValueError, match=message):
        make_scorer(spec)


def test_every_name_has_a_class_of_that_name():
    from trl_spatial.evaluation import scorers

    for name, path in SCORERS.items():
        assert scorers._load(path).name == name and scorers._load(path).trained_on
