"""The ablations of reinforcement learning: they run, resume, and count what they cost."""

import json
from types import SimpleNamespace

import pytest
import torch

from recipes.ablations.spatial_rl import (
    _REWARDS,
    _TRAINERS,
    STUDIES,
    VARIANTS,
    RandomFilterTrainer,
    brightness,
    collect,
    format_table,
    main,
)
from trl_spatial.demo.reward_model import train_reward_model
from trl_spatial.diffusion_grpo.advantages import group_advantages
from trl_spatial.scenes import make_preference_dataset


@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory):
    """A SpatialScore that has hardly been trained."""
    folder = tmp_path_factory.mktemp("reward")
    train_reward_model(make_preference_dataset(4), folder, max_steps=1, seed=0)
    return folder


def test_every_variant_answers_a_question_and_has_its_settings():
    assert {variant for variants in STUDIES.values() for variant in variants} == set(VARIANTS)
    assert {*_TRAINERS, *_REWARDS} <= set(VARIANTS)


def test_random_filter_keeps_as_many_of_each_group_whatever_their_rewards():
    trainer = SimpleNamespace(args=SimpleNamespace(num_generations=24, num_kept=12, seed=3))
    rewards = torch.arange(48.0)
    kept = RandomFilterTrainer._select_kept(trainer, rewards, 5)
    assert kept.tolist() == RandomFilterTrainer._select_kept(trainer, -rewards, 5).tolist()
    assert kept.tolist() != RandomFilterTrainer._select_kept(trainer, rewards, 6).tolist()
    assert len(set(kept.tolist())) == 24 and (kept < 24).sum() == 12
    assert group_advantages(rewards, 24, kept=kept).shape == (24,)
    # in the long run every image is kept equally often
    counts = torch.zeros(48)
    for index in range(400):
        counts[RandomFilterTrainer._select_kept(trainer, rewards, index)] += 1
    assert (counts / 400 - 0.5).abs().max() < 0.12


def test_runs_go_on_and_the_table_says_what_has_not_run(tmp_path, reward_folder, capsys):
    options = ["--output_dir", str(tmp_path), "--reward_model", str(reward_folder)]
    options += ["--max_steps", "1", "--num_prompts", "2", "--seeds", "0", "--studies", "filter", "reward"]
    main([*options, "--variants", "k = 4"])
    (file,) = tmp_path.glob("k_4-0/result.json")
    written = file.stat().st_mtime_ns
    main([*options, "--variants", "k = 4", "brightness as reward"])
    assert file.stat().st_mtime_ns == written
    results = collect(tmp_path)
    assert set(results) == {"base", "k = 4", "brightness as reward"}
    assert results["k = 4"][0]["evaluations_per_image"] == pytest.approx(6 + 2 * 5 * 8 / 24)
    assert results["k = 4"][0]["num_policy_passes"] == 8 * 24 * 6 + 2 * 5 * 8 * 8
    assert "| filter | no filter | not run |" in capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() == format_table(results)
    with pytest.raises(SystemExit, match=r"'max_steps': '1'.*'max_steps': '2'"):
        main([*options, "--max_steps", "2"])


def test_the_table_is_mean_and_deviation_over_the_seeds(tmp_path):
    common = {"objects_present": 0.9, "relations_correct": 0.8, "reward": 1.0, "diversity": 0.2}
    for seed, accuracy in enumerate((0.5, 0.6, 0.7)):
        folder = tmp_path / f"default-{seed}"
        folder.mkdir()
        result = common | {"spatial_accuracy": accuracy, "num_policy_passes": 5000, "evaluations_per_image": 11.0}
        (folder / "result.json").write_text(json.dumps(result))
    rows = [line for line in format_table(collect(tmp_path)).splitlines() if "| default |" in line]
    assert rows and all(
        "| 0.600 ± 0.100 | 0.900 ± 0.000 |" in row and row.endswith("| 11.0 | 5 | 3 |") for row in rows
    )


def test_brightness_is_the_mean_of_the_pixels():
    from PIL import Image

    images = [Image.new("RGB", (4, 4), color) for color in ("black", "white", (255, 0, 0))]
    assert brightness(["a", "b", "c"], images) == pytest.approx([0, 1, 1 / 3])
