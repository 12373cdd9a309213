"""The card of a trained reward model."""

from typing import Any

import numpy as np
from peft import LoraConfig, PeftModel, PeftType
from transformers import SchedulerType

from ..hub.cards import Card, Result
from ..statistics import accuracy_interval
from .config import GaussianRewardConfig
from .kinds import TEMPLATE
from .modeling import GaussianRewardModel
from .processing import SpatialScoreProcessor


def build_card(
    settings: dict[str, Any],
    log_history: list[dict[str, Any]],
    *,
    evaluated: dict[str, tuple[int | None, str | None]],
    eval_dataset: str | None,
    base_model: str | None,
) -> Card:
    """
    Makes the card of a reward model from the `settings` of its training and the last evaluation in `log_history`.

    `evaluated` maps a prefix of logged metrics, such as `"eval"`, to the number of pairs (not counting reverse pairs, which show
    the same images) and the split of that dataset; `eval_dataset` is its id on the Hub.
    """
    step, metrics = _last_evaluation(log_history)
    results = [
        Result(
            metric="accuracy",
            value=metrics[f"{prefix}_accuracy"],
            num_samples=num_rows,
            unit="pairs",
            interval=_interval(metrics[f"{prefix}_accuracy"], num_rows),
            dataset=prefix.removeprefix("eval").removeprefix("_") or None,
            dataset_id=eval_dataset,
            split=split,
        )
        for prefix, (num_rows, split) in evaluated.items()
        if f"{prefix}_accuracy" in metrics
    ]
    shown = {name.removeprefix("eval_"): value for name, value in metrics.items() if not name.endswith("_accuracy")}
    packages = ("trl", "transformers", "peft", "torch", "datasets", "tokenizers")
    return Card(
        template=TEMPLATE,
        front_matter={"library_name": "trl_spatial", "pipeline_tag": "image-text-to-text"},
        values={"metrics": shown, "metrics_step": step, "settings": settings, "versions": packages},
        results=results,
        base_model=base_model,
    )


def training_settings(
    args: GaussianRewardConfig,
    model: GaussianRewardModel | PeftModel,
    processor: SpatialScoreProcessor,
    *,
    num_updates: int,
) -> dict[str, Any]:
    """Collects the settings of a training run for the card, by their names there."""
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
    Wilson's 95 % interval. A pair and its reverse show the same images, so their mean counts as one sample: the interval is a
    little too wide if they are independent, but never too narrow.
    """
    if not num_rows:
        return None
    interval = accuracy_interval(np.full(num_rows, accuracy))
    return interval.low, interval.high


def _last_evaluation(log_history: list[dict[str, Any]]) -> tuple[int | None, dict[str, float]]:
    """Step and metrics of the last evaluation, over all of its datasets."""
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
