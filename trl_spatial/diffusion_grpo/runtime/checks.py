"""Checks for bad input before training."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from ..policies import DiffusionPolicy, SamplingOptions
from ..reward_functions import RewardFunction, RewardFunctions


def with_held_out(trained: RewardFunctions, held_out: RewardFunction | list[RewardFunction] | None) -> RewardFunctions:
    """Returns the reward functions for evaluation: the trained ones, then the held-out ones with weight 0."""
    if held_out is None:
        return trained
    others = list(held_out) if isinstance(held_out, list) else [held_out]
    return RewardFunctions([*trained.functions, *others], [*trained.weights.tolist(), *[0.0] * len(others)])


def check_evaluation(
    policy: DiffusionPolicy,
    eval_dataset: Dataset | Sequence[dict[str, Any]] | dict[str, Any],
    reward_functions: RewardFunctions | None,
    options: SamplingOptions,
    metric: str | None,
) -> None:
    """
    Checks a trainer's evaluation: reward functions, sizes and steps of the images, datasets, and the metric that decides which
    checkpoint is best. Raises `TypeError` if a dataset cannot be indexed, and a `ValueError` that names the problem for anything
    else.
    """
    if reward_functions is None:
        raise ValueError(
            "Evaluation draws images for the prompts of `eval_dataset`, but there is no reward function to score them. Pass "
            "`eval_reward_funcs` (`--eval_rewards`), or leave `eval_dataset` `None` (`--eval_strategy no`)."
        )
    check_images(policy, options)
    if isinstance(eval_dataset, dict):
        for name, dataset in eval_dataset.items():
            check_data(dataset, f"eval_dataset[{name!r}]", policy, reward_functions)
        datasets = list(eval_dataset)
    else:
        check_data(eval_dataset, "eval_dataset", policy, reward_functions)
        datasets = [None]
    check_metric(metric, datasets, reward_functions)


def check_images(policy: DiffusionPolicy, options: SamplingOptions) -> None:
    """Checks the size and the number of steps of evaluation images."""
    try:
        policy.check_size(options.height, options.width)
    except ValueError as error:
        raise ValueError(f"`eval_height` and `eval_width`: {error}") from None
    try:
        policy.check_num_inference_steps(options.num_inference_steps)
    except ValueError as error:
        raise ValueError(f"`eval_num_inference_steps`: {error}") from None


def check_data(
    dataset: Dataset | Sequence[dict[str, Any]],
    name: str,
    policy: DiffusionPolicy,
    reward_functions: RewardFunctions | None = None,
) -> None:
    """
    Checks that a dataset can be trained or evaluated on: it can be indexed, has rows, the model accepts its prompts, and
    the reward functions, if any, accept its other columns. `name` is its name in errors.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"`{name}` is a `{type(dataset).__name__}`, which cannot be indexed. Use a `datasets.Dataset` or a list of "
            "rows; `Dataset.from_list(list(stream))` makes one from a stream."
        )
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty. It needs at least one row with a `prompt`.")
    columns = dataset.column_names if isinstance(dataset, Dataset) else list(dataset[0])
    if "prompt" not in columns:
        raise ValueError(
            f"`{name}` has the columns {sorted(columns)} but no `prompt`. Rename the column that holds the text."
        )
    if isinstance(dataset, Dataset):
        # read in batches: there may be millions
        prompts = (prompt for batch in dataset.select_columns("prompt").iter(10_000) for prompt in batch["prompt"])
    else:
        for index, row in enumerate(dataset):
            if set(row) != set(columns):
                raise ValueError(f"Row {index} of `{name}` has the keys {sorted(row)}, row 0 {sorted(columns)}.")
        prompts = (row["prompt"] for row in dataset)
    try:
        policy.check_prompts(prompts)
        if reward_functions is not None:
            reward_functions.check_columns([column for column in columns if column != "prompt"])
    except ValueError as error:
        raise ValueError(f"`{name}`: {error}") from None


def check_metric(metric: str | None, dataset_names: list[str | None], reward_functions: RewardFunctions) -> None:
    """
    Checks that evaluation will report the metric that decides which checkpoint is best, named with or without `eval_`. A
    single dataset has the name `None`.
    """
    names = ["reward", *(f"rewards/{name}/mean" for name in reward_functions.names)]
    metrics = [name if dataset is None else f"{dataset}_{name}" for dataset in dataset_names for name in names]
    if metric is not None and metric.removeprefix("eval_") not in metrics:
        raise ValueError(
            f"`metric_for_best_model` is {metric!r}, but the evaluation will report {', '.join(metrics)}. Use one of them, "
            "or `None`."
        )
