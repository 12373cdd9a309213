"""The tiny FLUX of the demo: drawing with it, judging its images by the rules of scenes, and training it on rewards."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from diffusers import FluxPipeline
from PIL import Image as PILImage
from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..diffusion_grpo.config import DiffusionGRPOConfig
from ..diffusion_grpo.online_config import OnlineConfig
from ..diffusion_grpo.policies.lora import attention_lora_config
from ..diffusion_grpo.reward_functions import RewardFunction, RewardFunctions
from ..diffusion_grpo.runtime.callbacks import RolloutProgressCallback
from ..diffusion_grpo.runtime.evaluation import reward_images
from ..diffusion_grpo.trainer import DiffusionGRPOTrainer
from ..generation.drawing import draw_rows
from ..generation.generators import PipelineGenerator
from ..judges.scenes import check_images, has_objects, pairwise_distance, summarize_checks
from ..scenes import SceneCheck, SceneGraph, check_scene, make_prompt_dataset, parse_description


Config = TypeVar("Config", bound=OnlineConfig)

# The tiny FLUX that ships with the package: see its card in the same folder.
TINY_FLUX = Path(__file__).parents[1] / "tiny_models" / "flux"
# What it was pretrained on: two objects of these kinds and one of these relations, in captions of at most this many tokens.
PALETTE = ("red", "orange", "yellow", "green", "blue", "purple")
OUTLINES = ("circle", "square", "triangle")
DIRECTIONS = ("left_of", "right_of", "above", "below")
IMAGE_SIZE = 32
MAX_SEQUENCE_LENGTH = 16
# In evaluation, as in the paper; training takes fewer.
NUM_INFERENCE_STEPS = 28
IMAGES_PER_PROMPT = 4
SAMPLING: dict[str, Any] = {
    "height": IMAGE_SIZE,
    "width": IMAGE_SIZE,
    "num_inference_steps": NUM_INFERENCE_STEPS,
    "guidance_scale": 1.0,
    "max_sequence_length": MAX_SEQUENCE_LENGTH,
}
LORA_RANK = 32
# Maximum number of prompts for evaluation during training, from another split than those of the demo's results
NUM_MONITORED_PROMPTS = 192
# The demo's settings that differ from the defaults of training on rewards
_SETTINGS: dict[str, Any] = {
    "height": IMAGE_SIZE,
    "width": IMAGE_SIZE,
    "max_sequence_length": MAX_SEQUENCE_LENGTH,
    # 8 prompts × 12 kept images, in one batch
    "per_device_train_batch_size": 96,
    "gradient_accumulation_steps": 1,
    "rollout_batch_size": 192,
    "per_device_eval_batch_size": 192,
    "eval_num_inference_steps": NUM_INFERENCE_STEPS,
    # SpatialScore hardly notices when objects lose their shape: a stronger pull to the reference keeps the shapes
    "beta": 0.1,
    # a tiny model learns with rates that would ruin a large one, and within the span of the average's defaults
    "learning_rate": 1.5e-3,
    "ema_steps": 1,
    # activations of such a small model need not be recomputed
    "gradient_checkpointing": False,
    "bf16": False,  # on by default with a GPU, but the README's numbers are in float32
    "eval_strategy": "steps",
    "eval_on_start": True,
    "logging_steps": 1,
    "save_total_limit": 1,
    "report_to": "none",
}


def make_prompts(num_prompts: int, *, split: str, seed: int) -> Dataset:
    """
    Prompts of the kind that the tiny FLUX was pretrained on, in the columns `prompt` and `scene`. The split is `"train"`,
    `"validation"` or `"test"`: no set of colored shapes is in two splits, and pretraining used those of `"train"`.
    """
    return make_prompt_dataset(
        num_prompts,
        split=split,
        seed=seed,
        num_objects=(2, 2),
        num_relations=(1, 1),
        relations=DIRECTIONS,
        colors=PALETTE,
        shapes=OUTLINES,
        length="short",
    )


def load_generator(adapter: Path | None = None) -> FluxPipeline:
    """Load the tiny FLUX, with the LoRA weights in the folder `adapter`, as the trainer saves them."""
    pipeline = FluxPipeline.from_pretrained(TINY_FLUX, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipeline.load_lora_weights(adapter)
    return pipeline


def draw_images(
    pipeline: FluxPipeline,
    prompts: Dataset,
    scorer: RewardFunction,
    *,
    images_per_prompt: int = IMAGES_PER_PROMPT,
    seed: int = 0,
    show_progress: bool = True,
) -> Dataset:
    """
    Draw images of the prompts from [`make_prompts`] and score them. Image `j` of prompt `i` starts from the noise of `(seed, i, j)`,
    so that two generators can be compared image by image. Returns the columns `prompt`, `scene`, `image` and `score`, the images of
    a prompt next to each other.
    """
    batches = draw_rows(
        PipelineGenerator(pipeline, **SAMPLING),
        prompts,
        batch_size=192,
        seed=seed,
        num_images=images_per_prompt,
        progress="Drawing" if show_progress else None,
    )
    output = reward_images(batches, RewardFunctions(scorer), num_kept_images=len(prompts) * images_per_prompt)
    scenes = [scene for scene in prompts["scene"] for _ in range(images_per_prompt)]
    return Dataset.from_dict(
        {"prompt": output.prompts, "scene": scenes, "image": output.images, "score": output.rewards[:, 0].tolist()},
        features=Features(
            {"prompt": Value("string"), "scene": Value("string"), "image": Image(), "score": Value("float32")}
        ),
    )


def judge(drawn: Dataset, images_per_prompt: int = IMAGES_PER_PROMPT) -> dict[str, Any]:
    """
    Judge images from [`draw_images`] by the rules of their scenes.

    Returns:
        `dict`: `spatial_accuracy`, `objects_present` and `relations_correct` as [`~judges.scenes.summarize_checks`]
        gives them, with intervals that resample whole prompts; `relations`, the spatial accuracy for each relation; the mean
        `reward`; and the `diversity` of the images of a prompt.
    """
    graphs, images = read_graphs(drawn["scene"]), list(drawn["image"])
    checks = check_images(images, graphs)
    clusters = np.arange(len(drawn)) // images_per_prompt
    names = np.array([graph.relations[0].name for graph in graphs])
    relations = {}
    for name in DIRECTIONS:
        (rows,) = np.nonzero(names == name)
        if len(rows):
            summary = summarize_checks([checks[row] for row in rows], clusters[rows])
            relations[name] = {**asdict(summary["spatial_accuracy"]), "num_images": len(rows)}
    return {
        **{name: asdict(interval) for name, interval in summarize_checks(checks, clusters).items()},
        "relations": relations,
        "reward": float(np.mean(drawn["score"])),
        "diversity": pairwise_distance(images, images_per_prompt),
    }


def read_graphs(scenes: Sequence[str]) -> list[SceneGraph]:
    """The scene graphs that the column `scene` describes."""
    return [parse_description(scene) for scene in scenes]


def spatial_accuracy(
    prompts: list[str], images: list[PILImage.Image], scene: list[str], **columns: Any
) -> list[float]:
    """Reward function, the ground truth: 1 if every object is there exactly once and every relation holds, else 0."""
    return [float(_check(image, text).is_correct) for image, text in zip(images, scene, strict=True)]


def objects_present(prompts: list[str], images: list[PILImage.Image], scene: list[str], **columns: Any) -> list[float]:
    """Reward function: 1 if every object is there exactly once, wherever it is, else 0."""
    return [float(has_objects(_check(image, text))) for image, text in zip(images, scene, strict=True)]


def _check(image: PILImage.Image, scene: str) -> SceneCheck:
    return _check_pixels(image.tobytes(), image.size, scene)


# Both functions above check the same images one after the other, and a check takes milliseconds.
@lru_cache(maxsize=1024)
def _check_pixels(pixels: bytes, size: tuple[int, int], scene: str) -> SceneCheck:
    return check_scene(PILImage.frombytes("RGB", size, pixels), parse_description(scene))


def grpo_config(output_dir: Path, *, max_steps: int, seed: int, **changes: Any) -> DiffusionGRPOConfig:
    """Configuration of the tiny FLUX's reinforcement learning, with ten evaluations; `changes` are further fields."""
    changes = {"noise_level": 0.7} | changes
    return training_config(DiffusionGRPOConfig, output_dir, max_steps=max_steps, seed=seed, **changes)


def training_config(
    config_class: type[Config], output_dir: Path, *, max_steps: int, seed: int, **changes: Any
) -> Config:
    """[`grpo_config`] for training on rewards with another loss."""
    every = -(-max_steps // 10)
    own = {"output_dir": str(output_dir), "max_steps": max_steps, "seed": seed}
    return config_class(**(_SETTINGS | own | {"eval_steps": every, "save_steps": every} | changes))


def make_trainer(
    args: DiffusionGRPOConfig,
    reward_funcs: RewardFunction,
    *,
    num_monitored_prompts: int = NUM_MONITORED_PROMPTS,
    trainer_class: type = DiffusionGRPOTrainer,
) -> DiffusionGRPOTrainer:
    """
    Makes the trainer of the tiny FLUX. It evaluates [`spatial_accuracy`] and [`objects_present`] on one image for each of
    `num_monitored_prompts` prompts; neither these rewards nor these prompts are trained on. The seed of `args` is also that of the
    prompts.
    """
    trainer = trainer_class(
        pipeline=load_generator(),
        reward_funcs=reward_funcs,
        args=args,
        train_dataset=make_prompts(2048, split="train", seed=args.seed),
        eval_dataset=make_prompts(num_monitored_prompts, split="validation", seed=args.seed),
        eval_reward_funcs=[spatial_accuracy, objects_present],
        peft_config=attention_lora_config(rank=LORA_RANK, alpha=2 * LORA_RANK),
    )
    if trainer.pop_callback(RolloutProgressCallback) is not None:
        trainer.add_callback(_ProgressCallback)
    return trainer


class _ProgressCallback(RolloutProgressCallback):
    """A progress bar with a short line for each evaluation."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" in logs:
            super().on_log(args, state, control, logs=logs, **kwargs)
        elif "eval_reward" in logs:
            shown = _pick(logs | {"step": state.global_step}, _EVALUATION_NAMES)
            line = "     update {step}: reward {reward:.2f}, spatial accuracy {spatial_accuracy:.3f}, objects present {objects_present:.3f}"
            tqdm.write(line.format(**shown))


def train_generator(trainer: DiffusionGRPOTrainer) -> dict[str, Any]:
    """
    Train the tiny FLUX, or resume an interrupted run, and save its weights. Returns the `steps`, `evaluations`, `settings` and
    `cost` of the run as JSON values.
    """
    args = trainer.args
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    history = trainer.state.log_history
    # a resumed run evaluates again where it resumes
    evaluations = {
        log["step"]: _pick(log, _EVALUATION_NAMES) | {"num_images": len(trainer.eval_dataset)}
        for log in history
        if "eval_reward" in log
    }
    return {
        "steps": [
            _pick(log, _STEP_NAMES) for log in history if "reward" in log
        ],  # updates with a rollout of their own
        "evaluations": list(evaluations.values()),
        "settings": {name: getattr(args, name) for name in _SETTING_NAMES} | {"lora_rank": LORA_RANK},
        "cost": _cost(args, history),
    }


# names in the trainer's logs: names in the results
_STEP_NAMES = {name: name for name in ("step", "reward", "reward_std", "num_policy_passes")}
_EVALUATION_NAMES = {
    "step": "step",
    "eval_reward": "reward",
    "eval_rewards/spatial_accuracy/mean": "spatial_accuracy",
    "eval_rewards/objects_present/mean": "objects_present",
}
_SETTING_NAMES = (
    "num_generations",
    "top_k",
    "num_inference_steps",
    "dynamics",
    "noise_level",
    "sde_window_size",
    "learning_rate",
    "beta",
    "epsilon",
    "advantage_scope",
    "scale_rewards",
    "max_steps",
    "seed",
)


def _pick(log: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {short: log[name] for name, short in names.items()}


def _cost(args: DiffusionGRPOConfig, history: list[dict[str, Any]]) -> dict[str, float]:
    last = [log for log in history if "num_images" in log][-1]
    counts = {name: last[name] for name in ("num_images", "num_policy_passes", "num_reference_passes")}
    num_trained = args.num_inference_steps - 1 if args.sde_window_size is None else args.sde_window_size
    return counts | {
        "evaluations_per_image": last["num_policy_passes"] / last["num_images"],
        # a forward and a backward pass of every trained step of every image
        "evaluations_per_image_unfiltered": float(args.num_inference_steps + 2 * num_trained),
        "seconds": sum(log["time/step"] for log in history if "time/step" in log),
    }
