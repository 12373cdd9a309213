"""The ablations of reinforcement learning: they run, resume, and count what they cost."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.ablations import methods
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
    options += ["--max_steps", "1", "--num_prompts", "2", "--seeds", "0", "--studies", "filter", "reward", "clip"]
    main([*options, "--variants", "k = 4"])
    (file,) = tmp_path.glob("k_4-0/result.json")
    written = file.stat().st_mtime_ns
    main([*options, "--variants", "k = 4", "brightness as reward", "two updates, clip"])
    assert file.stat().st_mtime_ns == written
    results = collect(tmp_path)
    assert set(results) == {"base", "k = 4", "brightness as reward", "two updates, clip"}
    assert results["k = 4"][0]["evaluations_per_image"] == pytest.approx(6 + 2 * 5 * 8 / 24)
    assert results["k = 4"][0]["num_policy_passes"] == 8 * 24 * 6 + 2 * 5 * 8 * 8
    assert results["two updates, clip"][0]["num_policy_passes"] == 8 * 24 * 6 + 2 * 2 * 5 * 8 * 12
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
    images = [Image.new("RGB", (4, 4), color) for color in ("black", "white", (255, 0, 0))]
    assert brightness(["a", "b", "c"], images) == pytest.approx([0, 1, 1 / 3])


# ---------------------------------------------------------------------------------------------------- methods at equal cost


def test_every_method_is_in_a_panel_and_its_settings_are_those_of_its_configuration(tmp_path):
    assert {name for names in methods.PANELS.values() for name in names} == set(methods.METHODS)
    args = SimpleNamespace(budget=1000)
    for name, method in methods.METHODS.items():
        config = methods.make_config(method, tmp_path / name, 1, args)
        assert isinstance(config, method.trainer._config_class) and config.num_prompts == 8
        # 24 images of a prompt, 12 of them trained on, but for the filters that are compared
        expected = {"no filter": 24, "k = 4": 8}.get(name, 12)
        assert (config.num_generations, config.num_kept) == (24, expected)


def methods_options(folder, reward_folder, **changes):
    options = {"budget": 3000, "num_points": 2, "num_prompts": 2, "num_validation_prompts": 3} | changes
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return ["--output_dir", str(folder), "--reward_model", str(reward_folder), "--seeds", "0", *words]


def test_methods_end_with_the_update_that_reaches_the_budget(tmp_path, reward_folder, capsys):
    options = methods_options(tmp_path, reward_folder)
    methods.main([*options, "--methods", "k = 4"])
    (file,) = tmp_path.glob("k_4-0/result.json")
    result = json.loads(file.read_text())
    per_update = 8 * 24 * 6 + (2 + 1) * 5 * 8 * 8  # drawn; forward, backward and reference of 5 steps of the kept ones
    assert result["passes"] == 2 * per_update >= 3000 > per_update
    assert [point["passes"] for point in result["curve"]] == [0, per_update, 2 * per_update]
    assert result["spatial_accuracy"] == np.mean(result["by_prompt"]["spatial_accuracy"])
    assert 0 < result["curve"][1]["seconds"] < result["seconds"]
    written = file.stat().st_mtime_ns
    methods.main([*options, "--methods", "k = 4"])
    assert file.stat().st_mtime_ns == written
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out and "| NFT | not run |" in table
    assert Image.open(tmp_path / "curves.png").size == (1210, 880)
    with pytest.raises(SystemExit, match=r"'budget': '3000'.*'budget': '4000'"):
        methods.main(methods_options(tmp_path, reward_folder, budget=4000))


def test_preference_training_comes_out_of_the_same_budget(tmp_path, reward_folder):
    methods.main([*methods_options(tmp_path, reward_folder, budget=4000), "--methods", "DPO → GRPO"])
    (file,) = tmp_path.glob("DPO_GRPO-0/result.json")
    curve = json.loads(file.read_text())["curve"]
    drawn = 1000 // 2 // (8 * 6) * 8 * 6
    # 10 pairs in an update, of 2 images each, which pass twice through the policy and once through the reference
    after_dpo = drawn + 9 * 10 * 2 * 3
    assert [point["passes"] for point in curve] == [drawn, after_dpo, after_dpo + 2592, after_dpo + 2 * 2592]
    log = json.loads(next((file.parent / "dpo").glob("checkpoint-*/trainer_state.json")).read_text())["log_history"]
    assert any("rewards/margins" in entry for entry in log)


def test_pairs_are_best_and_worst_images_with_their_noise(reward_folder):
    pipeline = methods.load_generator()
    rows, _ = methods.make_pairs(pipeline, brightness, 2, seed=3)
    assert len(rows) == 2
    for row in rows:
        assert np.asarray(row["chosen"]).mean() > np.asarray(row["rejected"]).mean()
        for side in ("chosen", "rejected"):
            seed = json.loads(row[f"{side}_recipe"])["torch_seed"]
            settings = methods.SAMPLING | {"num_inference_steps": methods.NUM_PAIR_STEPS}
            again = pipeline([row["prompt"]], generator=[torch.Generator().manual_seed(seed)], **settings).images[0]
            difference = np.asarray(again, dtype=int) - np.asarray(row[side], dtype=int)
            assert np.abs(difference).max() <= 1


def made_up(by_prompt, seconds, truth):
    curve = [{"passes": 100 * n, "seconds": seconds * n, "spatial_accuracy": truth * n} for n in range(3)]
    values = {"spatial_accuracy": by_prompt, "objects_present": by_prompt}
    return {"by_prompt": values, **{name: float(np.mean(by_prompt)) for name in values}, "reward": 1.0, "diversity": 0.2,
            "curve": curve, "passes": 200, "seconds": 2 * seconds}  # fmt: skip


def test_the_table_compares_prompt_by_prompt_and_at_equal_time():
    easy = np.linspace(0, 1, 40)
    results = {
        "base": [
            {key: value for key, value in made_up([0.5] * 40, 1, 0.1).items() if key not in ("curve", "seconds")}
        ],
        "k = 6": [made_up(easy.tolist(), 10, 0.3), made_up(easy.tolist(), 10, 0.3)],
        "NFT": [made_up((easy * 0.5 + 0.3).tolist(), 5, 0.2)],
    }
    table = methods.format_table(results)
    rows = {line.split(" | ")[0].strip("| "): line for line in table.splitlines()}
    assert "at 10 s" in table  # as long as the quickest one took
    assert rows["k = 6"].endswith("| 0.300 | 2 |") and rows["NFT"].endswith("| 0.400 | 1 |")
    estimate, low, high = map(float, re.search(r"([+-][.\d]+) \[([+-][.\d]+), ([+-][.\d]+)\]", rows["NFT"]).groups())
    assert estimate == pytest.approx(0.05, abs=1e-3)
    # the spread of the difference is half of that of the easier prompts, not that of two independent samples
    half = 1.96 * np.std(easy * 0.5) / 40**0.5
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)
    assert "± 0.000" in rows["k = 6"] and "±" not in rows["NFT"]
    assert rows["CPS"].startswith("| CPS | not run |")
