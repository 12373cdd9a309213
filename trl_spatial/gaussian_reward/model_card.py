from dataclasses import dataclass
from typing import Any

import numpy as np
from peft import LoraConfig, PeftModel, PeftType
from transformers import SchedulerType

from ..hub.cards import Card, Result, training_values
from ..statistics import accuracy_interval
from .config import GaussianRewardConfig
from .kinds import TEMPLATE
from .modeling import GaussianRewardModel
from .processing import SpatialScoreProcessor


@dataclass(frozen=True)
class EvaluatedDataset:
    """
    What a card says of a dataset that was evaluated on.

    Args:
        num_rows (`int`, *optional*):
            Number of its pairs; with reverse pairs, which show the same images, of the rows that they were made of.
        split (`str`, *optional*):
            Its split.
    """

    num_rows: int | None = None
    split: str | None = None


def build_card(
    settings: dict[str, Any],
    log_history: list[dict[str, Any]],
    *,
    evaluated: dict[str, EvaluatedDataset],
    tags: list[str],
    trainer_name: str,
    hardware: str,
    training_time: str | None = None,
    base_model: str | None = None,
    dataset: str | None = None,
    eval_dataset: str | None = None,
) -> Card:
    """
    Makes the card of a trained reward model from what was set and measured.

    Args:
        settings (`dict[str, Any]`):
            What the training was set to; entries that are `None` are left out.
        log_history (`list[dict[str, Any]]`):
            Logs of the training. The last evaluation goes into the card.
        evaluated (`dict[str, EvaluatedDataset]`):
            Prefix of the logged metrics, such as `"eval"`, → the dataset.
        tags (`list[str]`):
            Tags of the repository.
        trainer_name (`str`):
            Name of the trainer.
        hardware (`str`):
            What it ran on.
        training_time (`str`, *optional*):
            How long it took.
        base_model (`str`, *optional*):
            Hub id of the backbone.
        dataset (`str`, *optional*):
            Hub id of the training dataset.
        eval_dataset (`str`, *optional*):
            Hub id of the dataset that was evaluated on.
    """
    step, metrics = _last_evaluation(log_history)
    results = [
        Result(
            metric="accuracy",
            value=metrics[f"{prefix}_accuracy"],
            num_samples=source.num_rows,
            unit="pairs",
            interval=_interval(metrics[f"{prefix}_accuracy"], source.num_rows),
            dataset=prefix.removeprefix("eval").removeprefix("_") or None,
            dataset_id=eval_dataset,
            split=source.split,
        )
        for prefix, source in evaluated.items()
        if f"{prefix}_accuracy" in metrics
    ]
    shown = {name.removeprefix("eval_"): value for name, value in metrics.items() if not name.endswith("_accuracy")}
    return Card(
        template=TEMPLATE,
        front_matter={
            "library_name": "trl_spatial",
            "pipeline_tag": "image-text-to-text",
            "tags": sorted({"generated_from_trainer", *tags}),
        },
        values={
            "metrics": shown,
            "metrics_step": step,
            **training_values(
                settings,
                trainer_name=trainer_name,
                hardware=hardware,
                training_time=training_time,
                packages=("trl", "transformers", "peft", "torch", "datasets", "tokenizers"),
            ),
        },
        results=results,
        base_model=base_model,
        dataset=dataset,
    )


def training_settings(
    args: GaussianRewardConfig,
    model: GaussianRewardModel | PeftModel,
    processor: SpatialScoreProcessor,
    *,
    num_updates: int,
) -> dict[str, Any]:
    """Collects what a reader of the card wants to know about a training run, under the names of the card."""
    adapters = None
    if isinstance(model, PeftModel):
        config = model.active_peft_config
        is_lora = isinstance(config, LoraConfig)
        adapters = f"LoRA, rank {config.r}, alpha {config.lora_alpha}" if is_lora else PeftType(config.peft_type).value
    size = processor.image_processor.size
    return {
        "objective": args.objective,
        "estimator": args.estimator,
        "adapters": adapters,
        "quantized backbone": "yes" if getattr(model, "is_quantized", False) else None,
        "pairs per update": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "updates": num_updates,
        "learning rate": args.learning_rate,
        "learning rate of head and reward token": args.head_learning_rate,
        "schedule": SchedulerType(args.lr_scheduler_type).value,
        "precision": "fp32" if args.mixed_precision == "no" else args.mixed_precision,
        "pixels of an image": f"{size['shortest_edge']} to {size['longest_edge']}",
        "seed": args.seed,
    }


def _interval(accuracy: float, num_rows: int | None) -> tuple[float, float] | None:
    """
    Wilson's 95 % interval. A pair and its reverse show the same images, and their mean counts as one: a little too wide
    where they are independent, never too narrow.
    """
    if not num_rows:
        return None
    interval = accuracy_interval(np.full(num_rows, accuracy))
    return interval.low, interval.high


def _last_evaluation(log_history: list[dict[str, Any]]) -> tuple[int | None, dict[str, float]]:
    """Step and metrics of the last evaluation, of all its datasets if there were several."""
    is_about_speed = ("_runtime", "_per_second", "_time", "_num_tokens")
    steps = [log["step"] for log in log_history if any(key.startswith("eval_") for key in log)]
    metrics = {
        key: float(value)
        for log in log_history
        if steps and log["step"] == steps[-1]
        for key, value in log.items()
        if key.startswith("eval_") and not key.endswith(is_about_speed)
    }
    return (steps[-1] if steps else None), metrics
