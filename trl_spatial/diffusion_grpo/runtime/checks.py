"""Bad input that can be known before training."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from ..policies import DiffusionPolicy, SamplingOptions
from ..reward_functions import RewardFunction, RewardFunctions


def with_held_out(trained: RewardFunctions, held_out: RewardFunction | list[RewardFunction] | None) -> RewardFunctions:
    """Reward functions of evaluation: the trained ones, then those that have no weight."""
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
    Checks what a trainer is to be evaluated by: rewards, sizes and steps of the images, datasets, and the metric by which the
    best checkpoint is chosen. It is a `TypeError` if a dataset cannot be indexed; the `ValueError` of anything else names
    it.
    """
    if reward_functions is None:
        raise ValueError(
            "`eval_dataset` is set, but no reward function that could judge its images. Pass `eval_reward_funcs`, or leave "
            "`eval_dataset` `None`."
        )
    try:
        policy.check_size(options.height, options.width)
    except ValueError as error:
        raise ValueError(f"`eval_height` and `eval_width`: {error}") from None
    try:
        policy.check_num_inference_steps(options.num_inference_steps)
    except ValueError as error:
        raise ValueError(f"`eval_num_inference_steps`: {error}") from None
    if isinstance(eval_dataset, dict):
        for name, dataset in eval_dataset.items():
            check_data(dataset, f"eval_dataset[{name!r}]", policy, reward_functions)
        datasets = list(eval_dataset)
    else:
        check_data(eval_dataset, "eval_dataset", policy, reward_functions)
        datasets = [None]
    check_metric(metric, datasets, reward_functions)


def check_data(
    dataset: Dataset | Sequence[dict[str, Any]],
    name: str,
    policy: DiffusionPolicy,
    reward_functions: RewardFunctions | None = None,
) -> None:
    """
    Checks that a dataset can be trained or evaluated on: it can be indexed, has rows, and the model takes its prompts
    and the reward functions, if there are any, its other columns. `name` is what errors call it.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"`{name}` is a `{type(dataset).__name__}`, which cannot be indexed. Use a `datasets.Dataset` or a list of "
            "rows; `Dataset.from_list(list(stream))` makes one of a stream."
        )
    if len(dataset) == 0:
        raise ValueError(f"`{name}` is empty. It needs at least one row with a `prompt`.")
    columns = dataset.column_names if isinstance(dataset, Dataset) else list(dataset[0])
    if "prompt" not in columns:
        raise ValueError(
            f"`{name}` has the columns {sorted(columns)} but no `prompt`. Rename the column with the text."
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
    Checks that there will be the metric by which the best checkpoint is chosen, named with or without `eval_`. An
    evaluation's only dataset has the name `None`.
    """
    names = ["reward", *(f"rewards/{name}/mean" for name in reward_functions.names)]
    metrics = [name if dataset is None else f"{dataset}_{name}" for dataset in dataset_names for name in names]
    if metric is not None and metric.removeprefix("eval_") not in metrics:
        raise ValueError(
            f"`metric_for_best_model` is {metric!r}, but the evaluation will have {', '.join(metrics)}. Use one of them, "
            "or `None`."
        )
