"""The card of weights that were trained by reinforcement learning."""

import math
from typing import Any

from peft import LoraConfig

from ...hub.cards import Card, Result
from ..config import DiffusionGRPOConfig


def build_card(
    args: DiffusionGRPOConfig,
    log_history: list[dict[str, Any]],
    *,
    lora_config: LoraConfig | None,
    pipeline_name: str,
    guidance: dict[str, Any],
    num_updates: int,
    trained_rewards: dict[str, float],
    eval_datasets: dict[str, tuple[int, str | None, str | None]],
    base_model: str | None,
) -> Card:
    """
    Makes the card of trained weights from what was set and measured; the first and the last evaluation of
    `log_history` go into it. `lora_config` is `None` if all weights were trained. `guidance` is in the names of the
    pipeline's own call, from [`~policies.DiffusionPolicy.pipeline_guidance`]. `trained_rewards` are weights by name,
    and `eval_datasets` leads from the prefix of the logged metrics, such as `"eval"`, to number of prompts, Hub id and
    split. `base_model` is a Hub id or a folder.
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
    is_lora = lora_config is not None
    return Card(
        template="diffusion.md",
        front_matter={
            "library_name": "diffusers",
            "pipeline_tag": "text-to-image",
            "tags": ["lora"] if is_lora else [],
        },
        values={
            "is_lora": is_lora,
            "pipeline_name": pipeline_name,
            "sampling": {  # of the evaluation: keyword arguments of the pipeline
                "height": args.eval_height or args.height,
                "width": args.eval_width or args.width,
                "num_inference_steps": args.eval_num_inference_steps,
                **guidance,
                "max_sequence_length": args.max_sequence_length,
            },
            "before": {result.metric: result.value for result in before},
            "metrics_step": step,
            "settings": _settings(args, lora_config, num_updates, trained_rewards),
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
    """Mean of every reward of an evaluation, with the interval of a mean of so many images, one per prompt."""
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


def _settings(
    args: DiffusionGRPOConfig, lora_config: LoraConfig | None, num_updates: int, rewards: dict[str, float]
) -> dict[str, Any]:
    """What a reader of the card wants to know about a training run, under the names of the card."""
    window = None
    if args.sde_window_size is not None:
        window = f"{args.sde_window_size} of {args.sde_window_range or 'the first half'}"
    return {
        "rewards": ", ".join(f"{name} ({weight:g})" for name, weight in rewards.items()),
        "adapters": None if lora_config is None else f"LoRA, rank {lora_config.r}, alpha {lora_config.lora_alpha}",
        "updates": num_updates,
        "prompts per rollout": args.num_prompts,
        "images per prompt": args.num_generations,
        "kept of them, best and worst": None if args.top_k is None else f"{args.top_k} and {args.top_k}",
        "denoising steps in training": args.num_inference_steps,
        "trained steps": window,
        "dynamics": args.dynamics,
        "noise level": args.noise_level,
        "learning rate": args.learning_rate,
        "clip range": args.epsilon,
        "KL coefficient": args.beta,
        "moving average of the weights": args.ema_decay or None,
        "precision": "fp32" if args.mixed_precision == "no" else args.mixed_precision,
        "image size in training": f"{args.width} × {args.height}",
        "seed": args.seed,
    }
