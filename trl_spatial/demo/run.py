"""The stages of the demo, from the preference pairs to the report."""

import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from .. import SpatialScore
from ..diffusion_grpo.reward_functions import RewardFunction
from ..evaluation.scorers.spatialscore import SpatialScorer
from ..judges.scenes import check_images
from ..store import Stages, write_record
from . import generator, reward_model
from .cards import update_generator_card, update_reward_card
from .report import save_image, write_report
from .settings import DemoSettings


TITLES = {
    "pairs": "Preference pairs: rendering scenes that differ in one to three relations",
    "reward": "SpatialScore: training the reward model on them",
    "measure": "SpatialScore: measuring on held-out pairs",
    "before": "Base images: drawing held-out prompts with the tiny FLUX",
    "grpo": "Spatial-RL: training the tiny FLUX, with SpatialScore as the only reward",
    "after": "Evaluation: drawing the same prompts again; the exact rules judge both",
}
NUM_SHOWN_PROMPTS = 8
_SHOWN_VERSIONS = ("torch", "transformers", "trl", "diffusers", "peft", "datasets", "trl-spatial")


def run_demo(settings: DemoSettings) -> dict[str, Any]:
    """
    Run the demo, or continue an interrupted run: preference pairs → SpatialScore → base images → reinforcement learning with
    SpatialScore as the only reward → evaluation by the rules of the scenes → report.

    Returns all results, which are also in `results.json` in the output folder, next to `report.html`. Raises a `ValueError` if that
    folder holds a run with other settings, or something else, or is in use.
    """
    output_dir = Path(settings.output_dir)
    arguments = asdict(settings) | {"output_dir": None}
    stages = Stages(output_dir, TITLES, arguments)
    results: dict[str, Any] = {"arguments": arguments, "environment": describe_machine()}

    def run(name: str, function: Callable[..., Any], *outputs: str) -> Any:
        paths = [output_dir / file for file in outputs]
        return stages.run(name, partial(function, settings, output_dir), outputs=paths)

    run("pairs", _make_pairs, "pairs/train/dataset_info.json", "pairs/test/dataset_info.json")
    run("reward", _train_reward_model, "reward/config.json", "reward/adapter_model.safetensors")
    results["reward_model"] = run("measure", _measure_reward_model, "images")
    draw_base = partial(_draw_and_judge, name="base_images", adapter=None)
    before = run("before", draw_base, "base_images/dataset_info.json")
    results["training"] = run("grpo", _train_generator, "grpo/pytorch_lora_weights.safetensors")
    draw_tuned = partial(_draw_and_judge, name="tuned_images", adapter=output_dir / "grpo")
    after = run("after", draw_tuned, "tuned_images/dataset_info.json")
    num_images = settings.num_prompts * generator.IMAGES_PER_PROMPT
    update_generator_card(output_dir / "grpo", before, after, num_images)
    results["generator"] = {
        "num_prompts": settings.num_prompts,
        "num_images": num_images,
        "num_inference_steps": generator.NUM_INFERENCE_STEPS,
        "before": before,
        "after": after,
    }
    results["examples"] = _save_examples(output_dir)
    results["stages"] = stages.times()
    results["seconds"] = round(sum(stage["seconds"] for stage in results["stages"]), 1)
    write_record(output_dir / "results.json", results)
    write_report(results, output_dir)
    return results


def describe_machine() -> dict[str, Any]:
    """Device, threads and versions of this machine."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"
    return {
        "device": device,
        "num_cores": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in _SHOWN_VERSIONS},
    }


def _load_pairs(settings: DemoSettings, output_dir: Path, split: str) -> Dataset:
    number = settings.num_train_pairs if split == "train" else settings.num_test_pairs
    return reward_model.load_pairs(output_dir / "pairs" / split, number, split=split, seed=settings.seed)


def _make_pairs(settings: DemoSettings, output_dir: Path) -> dict[str, int]:
    numbers = {split: len(_load_pairs(settings, output_dir, split)) for split in ("train", "test")}
    # makes the two folders one dataset for `datasets` and for `trl_spatial push`
    write_record(output_dir / "pairs" / "dataset_dict.json", {"splits": list(numbers)})
    return numbers


def _train_reward_model(settings: DemoSettings, output_dir: Path) -> None:
    reward_model.train_reward_model(
        _load_pairs(settings, output_dir, "train"),
        output_dir / "reward",
        max_steps=settings.reward_steps,
        seed=settings.seed,
    )


def _measure_reward_model(settings: DemoSettings, output_dir: Path) -> dict[str, Any]:
    pairs = _load_pairs(settings, output_dir, "test")
    scorer = SpatialScorer(str(output_dir / "reward"))
    results, scores = reward_model.measure(scorer, pairs, output_dir / "measured_pairs")
    update_reward_card(output_dir / "reward", results, pairs, scores)
    return results | {"examples": reward_model.save_examples(pairs, scores, output_dir)}


def _draw_and_judge(settings: DemoSettings, output_dir: Path, name: str, adapter: Path | None) -> dict[str, Any]:
    drawn = generator.draw_images(
        generator.load_generator(adapter),
        generator.make_prompts(settings.num_prompts, split="test", seed=settings.seed),
        make_reward(output_dir / "reward"),
        seed=settings.seed,
    )
    shutil.rmtree(output_dir / name, ignore_errors=True)
    drawn.save_to_disk(output_dir / name)
    return generator.judge(drawn)


def make_reward(folder: Path) -> RewardFunction:
    """Returns the reward model in a folder as a reward function that scores the images of a rollout in one batch."""
    scorer = SpatialScore.from_pretrained(folder)

    def spatial_score(prompts: list[str], images: list[Any], **columns: Any) -> list[float]:
        return scorer.score(prompts, images, batch_size=192, show_progress=False).mean.tolist()

    spatial_score.__name__ = "SpatialScore"  # its name in the logs
    return spatial_score


def _train_generator(settings: DemoSettings, output_dir: Path) -> dict[str, Any]:
    args = generator.grpo_config(
        output_dir / "grpo",
        max_steps=settings.grpo_steps,
        seed=settings.seed,
        # better than all steps at equal cost, with every seed: see recipes/ablations/README.md
        sde_window_size=None if settings.all_steps else 2,
    )
    # at most as many images as in the final evaluation
    num_prompts = min(generator.NUM_MONITORED_PROMPTS, settings.num_prompts * generator.IMAGES_PER_PROMPT)
    reward = make_reward(output_dir / "reward")
    return generator.train_generator(generator.make_trainer(args, reward, num_monitored_prompts=num_prompts))


def _save_examples(output_dir: Path) -> list[dict[str, Any]]:
    """Saves the pictures of the first prompts, before and after training, with their verdicts."""
    size = generator.IMAGES_PER_PROMPT
    drawn = {
        when: Dataset.load_from_disk(output_dir / name)
        for when, name in (("before", "base_images"), ("after", "tuned_images"))
    }
    examples = []
    for number in range(min(NUM_SHOWN_PROMPTS, len(drawn["before"]) // size)):
        parts = {when: dataset.select(range(number * size, (number + 1) * size)) for when, dataset in drawn.items()}
        verdicts = {when: _describe_images(part, output_dir) for when, part in parts.items()}
        examples.append({"prompt": parts["before"][0]["prompt"], **verdicts})
    return examples


def _describe_images(drawn: Dataset, output_dir: Path) -> list[dict[str, Any]]:
    images = list(drawn["image"])
    checks = check_images(images, generator.read_graphs(drawn["scene"]))
    return [
        {
            "image": save_image(image, output_dir),
            "is_correct": check.is_correct,
            "score": score,
            "reasons": check.reasons,
        }
        for image, score, check in zip(images, drawn["score"], checks, strict=True)
    ]
