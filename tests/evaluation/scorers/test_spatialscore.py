"""SpatialScore as a scorer, against itself."""

import pytest

from trl_spatial import SpatialScore
from trl_spatial.evaluation.scorers import make_scorer


def test_mean_and_std_are_spatialscores(make_reward_model, processor, prompts, images, tmp_path):
    scorer = SpatialScore(make_reward_model(), processor)
    scorer.save_pretrained(tmp_path)
    mean, std = scorer.score(prompts, images)
    scores = make_scorer(f"spatialscore:{tmp_path}", device="cpu").score(prompts, images)
    assert [score.mean for score in scores] == pytest.approx(list(mean), abs=1e-6)
    assert [score.std for score in scores] == pytest.approx(list(std), abs=1e-6)
    assert len({round(score.mean, 6) for score in scores}) == len(prompts)
