"""The card of trained weights."""

import math
from typing import Any

from ...hub.cards import Card, Result
from .base_config import DiffusionConfig


def build_card(
    args: DiffusionConfig,
    log_history: list[dict[str, Any]],
    *,
    method: str,
    citation: str,
    settings: dict[str, Any],
    is_lora: bool,
    pipeline_name: str,
    guidance: dict[str, Any],
    trained_rewards: dict[str, float],
    eval_datasets: dict[str, tuple[int, str | None, str | None]],
    base_model: str | None,
) -> Card:
    """
    Makes the card of trained weights from a run's settings and measurements, including the first and the last evaluation
    in `log_history`. `method` is a sentence on how they were trained, `citation` the method's paper in BibTeX, and `settings`
    the training settings by their names on the card. `is_lora` says whether adapters were trained or all weights. `guidance`
    uses the argument names of the pipeline's own call, from [`~policies.DiffusionPolicy.pipeline_guidance`].
    `trained_rewards` are weights by name, and `eval_datasets` maps the prefix of the logged metrics, such as `"eval"`, to the
    number of prompts, Hub id and split. `base_model` is a Hub id or a folder.
    """
    evaluations = [log for log in log_history if any(f"{prefix}_reward" in log for prefix in eval_datasets)]
    step = evaluations[-1]["step"] if evaluations else None
    last = {name: value for log in evaluations if log["step"] == step for name, value in log.items()}
    first = {name: value for log in evaluations if log["step"] == 0 for name, value in log.items()}
    results = [
        result
        for prefix, source in eval_datasets.items()
        for result in _reward_results(last, prefix, *source, trained_rewards)
    ]
    before = _reward_results(first, "eval", 0, None, None, trained_rewards) if step else []
    return Card(
        template="diffusion.md",
        front_matter={
            "library_name": "diffusers",
            "pipeline_tag": "text-to-image",
            "tags": ["lora"] if is_lora else [],
        },
        values={
            "is_lora": is_lora,
            "method": method,
            "citation": citation,
            "pipeline_name": pipeline_name,
            "sampling": {  # as in evaluation: keyword arguments of the pipeline
                "height": args.eval_height or args.height,
                "width": args.eval_width or args.width,
                "num_inference_steps": args.eval_num_inference_steps,
                **guidance,
                "max_sequence_length": args.max_sequence_length,
            },
            "before": {result.metric: result.value for result in before},
            "metrics_step": step,
            "settings": settings,
            "versions": ("trl", "transformers", "diffusers", "peft", "torch", "datasets"),
        },
        results=results,
        base_model=base_model,
    )


def _reward_results(
    metrics: dict[str, Any],
    prefix: str,
    num_prompts: int,
    dataset_id: str | None,
    split: str | None,
    trained_rewards: dict[str, float],
) -> list[Result]:
    """Mean of every reward in an evaluation, with the 95 % interval of a mean of that many images, one per prompt."""
    results = []
    start, end = f"{prefix}_rewards/", "/mean"
    for name in (key[len(start) : -len(end)] for key in metrics if key.startswith(start) and key.endswith(end)):
        mean, std = metrics[f"{start}{name}{end}"], metrics[f"{start}{name}/std"]
        number = round(num_prompts * (1 - metrics.get(f"{start}{name}/frac_none", 0.0)))
        half = 1.96 * std / math.sqrt(number) if number > 1 else None
        role = "trained on" if name in trained_rewards else "not trained on"
        results.append(
            Result(
                metric=f"mean reward {name} ({role})",
                value=mean,
                num_samples=number or None,
                unit="images",
                interval=None if half is None else (mean - half, mean + half),
                dataset=prefix.removeprefix("eval").removeprefix("_") or None,
                dataset_id=dataset_id,
                split=split,
            )
        )
    return results
