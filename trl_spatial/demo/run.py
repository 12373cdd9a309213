"""The demo from its first pair to its report."""

import json
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
from ..judges.scenes import check_images
from ..scenes import SceneCheck
from ..store import Stages
from . import generator, reward_model
from .cards import update_generator_card, update_reward_card
from .report import write_report
from .settings import DemoSettings


TITLES = {
    "pairs": "Preference pairs: rendering scenes that differ in one to three relations",
    "reward": "SpatialScore: training the reward model on them",
    "measure": "SpatialScore: measuring on held-out pairs",
    "before": "Base images: drawing held-out prompts with the tiny FLUX",
    "grpo": "Spatial-RL: training the tiny FLUX, with SpatialScore as the only reward",
    "after": "Evaluation: drawing the same prompts again; the rules of the scenes judge both",
}
NUM_SHOWN_PROMPTS = 8
_SHOWN_VERSIONS = ("torch", "transformers", "trl", "diffusers", "peft", "datasets", "trl-spatial")


def run_demo(settings: DemoSettings) -> dict[str, Any]:
    """
    Run the demo, or go on with an interrupted run: preference pairs → SpatialScore → base images → reinforcement
    learning with SpatialScore as the only reward → evaluation by the rules of the scenes → report.

    Args:
        settings ([`DemoSettings`]):
            How large it is and where it is kept.

    Returns:
        `dict`: everything that was measured; also in `results.json` in the output folder, beside `report.html`.

    Raises:
        `ValueError`: If the output folder holds a run with other settings.
    """
    output_dir = Path(settings.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    _check_same_run(settings, output_dir)
    stages = Stages(output_dir / "stages", TITLES)
    results: dict[str, Any] = {"arguments": asdict(settings) | {"output_dir": None}, "environment": describe_machine()}

    stages.run("pairs", partial(_make_pairs, settings, output_dir))
    stages.run("reward", partial(_train_reward_model, settings, output_dir))
    results["reward_model"] = stages.run("measure", partial(_measure_reward_model, settings, output_dir))
    draw = partial(_draw_and_judge, settings, output_dir)
    before = stages.run("before", partial(draw, "base_images", None))
    results["training"] = stages.run("grpo", partial(_train_generator, settings, output_dir))
    after = stages.run("after", partial(draw, "tuned_images", output_dir / "grpo"))
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
    (output_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_report(results, output_dir)
    return results


def _check_same_run(settings: DemoSettings, output_dir: Path) -> None:
    """An interrupted run goes on with its own settings; other settings belong into another folder."""
    file = output_dir / "arguments.json"
    arguments = asdict(settings) | {"output_dir": None}
    if file.exists() and (found := json.loads(file.read_text())) != arguments:
        changed = {key: (found.get(key), value) for key, value in arguments.items() if found.get(key) != value}
        raise ValueError(
            f"{output_dir} holds a run with other arguments (there, here): {changed}. Choose another --output_dir or "
            "remove that folder."
        )
    file.write_text(json.dumps(arguments, indent=1) + "\n")


def describe_machine() -> dict[str, Any]:
    """What a run ran on: kind of processor, threads, versions."""
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
    # so that the two folders are one dataset for `datasets`, and for `trl_spatial push`
    (output_dir / "pairs" / "dataset_dict.json").write_text(json.dumps({"splits": list(numbers)}), encoding="utf-8")
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
    results, scores = reward_model.measure(SpatialScore.from_pretrained(output_dir / "reward"), pairs)
    update_reward_card(output_dir / "reward", results, pairs, scores)
    return results | {"examples": reward_model.save_examples(pairs, scores, output_dir)}


def _draw_and_judge(settings: DemoSettings, output_dir: Path, name: str, adapter: Path | None) -> dict[str, Any]:
    drawn = generator.draw_images(
        generator.load_generator(adapter),
        generator.make_prompts(settings.num_prompts, split="test", seed=settings.seed),
        make_reward(output_dir / "reward"),
        seed=settings.seed,
    )
    _replace_folder(output_dir / name, drawn.save_to_disk)
    return generator.judge(drawn)


def make_reward(folder: Path) -> RewardFunction:
    """The trained reward model of a folder as a reward function that scores the images of a rollout in one batch."""
    scorer = SpatialScore.from_pretrained(folder)

    def spatial_score(prompts: list[str], images: list[Any], **columns: Any) -> list[float]:
        return scorer.score(prompts, images, batch_size=192, show_progress=False).mean.tolist()

    spatial_score.__name__ = "SpatialScore"  # under which it is logged
    return spatial_score


def _replace_folder(folder: Path, save: Callable[[Path], Any]) -> None:
    partial_folder = folder.with_suffix(".partial")
    for path in (partial_folder, folder):
        shutil.rmtree(path, ignore_errors=True)
    save(partial_folder)
    partial_folder.rename(folder)


def _train_generator(settings: DemoSettings, output_dir: Path) -> dict[str, Any]:
    args = generator.grpo_config(output_dir / "grpo", max_steps=settings.grpo_steps, seed=settings.seed)
    # no more images on the way than at the end
    num_prompts = min(generator.NUM_MONITORED_PROMPTS, settings.num_prompts * generator.IMAGES_PER_PROMPT)
    reward = make_reward(output_dir / "reward")
    return generator.train_generator(generator.make_trainer(args, reward, num_monitored_prompts=num_prompts))


def _save_examples(output_dir: Path) -> list[dict[str, Any]]:
    """Pictures and verdicts of the first prompts, before and after."""
    folder = output_dir / "example_images"
    folder.mkdir(exist_ok=True)
    size = generator.IMAGES_PER_PROMPT
    drawn = {
        when: Dataset.load_from_disk(output_dir / name)
        for when, name in (("before", "base_images"), ("after", "tuned_images"))
    }
    examples = []
    for number in range(min(NUM_SHOWN_PROMPTS, len(drawn["before"]) // size)):
        rows = range(number * size, (number + 1) * size)
        example: dict[str, Any] = {"prompt": drawn["before"][rows[0]]["prompt"]}
        for when, dataset in drawn.items():
            part = dataset.select(rows)
            example[when] = [
                _save_example(image, score, check, output_dir, f"example_images/{when}_{row:03d}.png")
                for image, score, check, row in zip(
                    part["image"],
                    part["score"],
                    check_images(list(part["image"]), generator.read_graphs(part["scene"])),
                    rows,
                    strict=True,
                )
            ]
        examples.append(example)
    return examples


def _save_example(image: Any, score: float, check: SceneCheck, output_dir: Path, file: str) -> dict[str, Any]:
    image.save(output_dir / file)
    return {"image": file, "is_correct": check.is_correct, "score": score, "reasons": check.reasons}
