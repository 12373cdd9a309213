"""What a run of the demo might have measured, and its pictures."""

import numpy as np
import pytest

from trl_spatial.scenes import check_scene, describe_changes, make_preference_dataset, parse_description, render_scene
from trl_spatial.statistics import accuracy_interval


def interval(rng, accuracy, number, **columns):
    found = accuracy_interval(rng.random(number) < accuracy)
    return {"estimate": found.estimate, "low": found.low, "high": found.high, **columns}


def _reward_model(rng, pairs, folder):
    def group(accuracies):
        return {name: interval(rng, accuracy, 400, num_pairs=400) for name, accuracy in accuracies.items()}

    examples = []
    for number, row in enumerate(pairs):
        files = {role: f"pair_images/{number}_{role}.png" for role in ("chosen", "rejected")}
        for role, file in files.items():
            row[role].save(folder / file)
        scores = {"chosen_score": [1.5 - number, 0.31], "rejected_score": [-0.44, 0.52]}
        change = describe_changes(row["operations"])
        examples.append({"prompt": row["prompt"], **files, **scores, "change": change})
    return {
        "accuracy": {
            "all": {"all": interval(rng, 0.93, 3000, num_pairs=3000)},
            "level": group({"1": 0.87, "2": 0.95, "3": 0.98}),
            "relation": group({"left_of": 0.9, "front_of": 0.8, "row_order": 0.7}),
            "operation": group({"swap": 0.91, "flip": 0.84}),
        },
        "expected_calibration_error": 0.0123,
        "reliability": [
            {"confidence": confidence, "accuracy": confidence + error, "num_pairs": num_pairs}
            for confidence, error, num_pairs in ((0.55, -0.07, 40), (0.71, 0.03, 90), (0.87, -0.02, 300), (0.99, 0, 2570))
        ],
        "flip_test": {"same_order": interval(rng, 0.96, 3000), "accuracy": interval(rng, 0.92, 3000)},
        "examples": examples,
    }  # fmt: skip


def _judged(rng, accuracy, reward):
    return {
        "spatial_accuracy": interval(rng, accuracy, 1024),
        "objects_present": interval(rng, 0.95, 1024),
        "relations_correct": interval(rng, accuracy / 0.95, 970),
        "relations": {
            name: interval(rng, accuracy, 256, num_images=256) for name in ("left_of", "right_of", "above", "below")
        },
        "reward": reward,
        "diversity": 0.2134,
    }


def _training(rng):
    learned = 1 - np.exp(-np.arange(151) / 40)
    return {
        "steps": [
            {
                "step": step,
                "reward": float(1.2 + 2 * learned[step] + rng.normal(0, 0.2)),
                "reward_std": 1.1,
                "num_policy_passes": 2592 * step,
            }
            for step in range(1, 151)
        ],
        "evaluations": [
            {
                "step": step,
                "reward": float(1.7 + 2 * learned[step]),
                "spatial_accuracy": float(0.51 + 0.35 * learned[step]),
                "objects_present": float(0.95 - 0.02 * learned[step]),
                "num_images": 192,
            }
            for step in range(0, 151, 25)
        ],
        "settings": {"num_generations": 24, "top_k": 6, "noise_level": 0.7, "learning_rate": 1e-3, "beta": 0.0},
        "cost": {
            "num_images": 11520,
            "num_policy_passes": 155520,
            "num_reference_passes": 86400,
            "evaluations_per_image": 13.5,
            "evaluations_per_image_unfiltered": 21.0,
            "seconds": 121.3,
        },
    }


def _shots(prompt, shown_prompts, when, number, folder):
    """Pictures of some prompts, judged as pictures of one."""
    shots = []
    for i, shown in enumerate(shown_prompts):
        image = render_scene(parse_description(shown), seed=100 * number + i)
        file = f"example_images/{when}_{number}_{i}.png"
        image.save(folder / file)
        check = check_scene(image, parse_description(prompt))
        shots.append({"image": file, "is_correct": check.is_correct, "score": 2.5 - i, "reasons": check.reasons})
    return shots


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory):
    """A folder with the pictures of a run, and its results. Treat both as read-only."""
    folder = tmp_path_factory.mktemp("run")
    for name in ("pair_images", "example_images"):
        (folder / name).mkdir()
    rng = np.random.default_rng(0)
    pairs = make_preference_dataset(4, split="test", seed=3)
    examples = []
    for number, row in enumerate(pairs):
        right, wrong = row["prompt"], row["perturbed_prompt"]
        before = _shots(right, [right, wrong, right, wrong], "before", number, folder)
        after = _shots(right, [right, right, right, (right, wrong)[number % 2]], "after", number, folder)
        examples.append({"prompt": right, "before": before, "after": after})
    results = {
        "arguments": {"seed": 0, "quick": False, "output_dir": None},
        "environment": {"device": "CPU, x86_64", "num_threads": 2, "python": "3.11.7", "torch": "2.13.0+cpu"},
        "stages": [
            {"name": "pairs", "title": "Preference pairs", "seconds": 21.04},
            {"name": "grpo", "title": "Spatial-RL", "seconds": 818.6},
        ],
        "seconds": 839.6,
        "reward_model": _reward_model(rng, pairs, folder),
        "generator": {
            "num_prompts": 256,
            "num_images": 1024,
            "num_inference_steps": 12,
            "before": _judged(rng, 0.51, 1.9),
            "after": _judged(rng, 0.84, 3.7),
        },
        "training": _training(rng),
        "examples": examples,
    }
    return folder, results
