"""Bad input and doubtful settings that can be known before training."""

from collections.abc import Sequence
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset

from ...generation.seeds import image_generator
from ..config import DiffusionGRPOConfig
from ..policies import DiffusionPolicy, SamplingOptions
from ..reward_functions import RewardFunction, RewardFunctions
from .monitoring import setup_warnings


logger = get_logger(__name__)


def with_held_out(trained: RewardFunctions, held_out: RewardFunction | list[RewardFunction] | None) -> RewardFunctions:
    """Reward functions of evaluation: the trained ones, then those that have no weight."""
    if held_out is None:
        return trained
    others = list(held_out) if isinstance(held_out, list) else [held_out]
    return RewardFunctions([*trained.functions, *others], [*trained.weights.tolist(), *[0.0] * len(others)])


def check_inputs(
    policy: DiffusionPolicy,
    train_dataset: Dataset | Sequence[dict[str, Any]] | None,
    eval_dataset: Dataset | Sequence[dict[str, Any]] | dict[str, Any] | None,
    reward_functions: RewardFunctions,
    eval_reward_functions: RewardFunctions,
    *,
    options: SamplingOptions,
    eval_options: SamplingOptions,
    metric: str | None,
) -> None:
    """
    Checks what a trainer is given: sizes, steps and guidance of the images, datasets, and the metric by which the best
    checkpoint is chosen. It is a `TypeError` if a dataset cannot be indexed; the `ValueError` of anything else names
    it.
    """
    policy.check_size(options.height, options.width)
    policy.check_num_inference_steps(options.num_inference_steps)
    policy.check_guidance(options)  # the same in evaluation
    if train_dataset is not None:
        check_data(train_dataset, "train_dataset", policy, reward_functions)
    if eval_dataset is None:
        return
    try:
        policy.check_size(eval_options.height, eval_options.width)
    except ValueError as error:
        raise ValueError(f"`eval_height` and `eval_width`: {error}") from None
    try:
        policy.check_num_inference_steps(eval_options.num_inference_steps)
    except ValueError as error:
        raise ValueError(f"`eval_num_inference_steps`: {error}") from None
    if isinstance(eval_dataset, dict):
        for name, dataset in eval_dataset.items():
            check_data(dataset, f"eval_dataset[{name!r}]", policy, eval_reward_functions)
        datasets = list(eval_dataset)
    else:
        check_data(eval_dataset, "eval_dataset", policy, eval_reward_functions)
        datasets = [None]
    check_metric(metric, datasets, eval_reward_functions)


def check_data(
    dataset: Dataset | Sequence[dict[str, Any]], name: str, policy: DiffusionPolicy, reward_functions: RewardFunctions
) -> None:
    """
    Checks that a dataset can be trained or evaluated on: it can be indexed, has rows, and the model takes its prompts
    and the reward functions its other columns. `name` is what errors call it.
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


def warn_about_settings(args: DiffusionGRPOConfig, policy: DiffusionPolicy, options: SamplingOptions) -> None:
    """Issues the warnings of [`setup_warnings`]."""
    num_updates = args.num_updates_per_rollout // args.num_iterations  # of an iteration
    warnings = setup_warnings(
        dynamics=args.dynamics,
        noise_level=args.noise_level,
        trains_first_step=args.sde_window_range is None or args.sde_window_range[0] == 0,
        epsilon=args.epsilon,
        num_latent_elements=policy.prepare_latents([image_generator(args.seed)], options).numel(),
        num_updates_per_rollout=args.num_updates_per_rollout,
        is_ratio_corrected=args.needs_old_means,
        num_groups_per_update=args.num_prompts / num_updates,
    )
    for warning in warnings:
        logger.warning(warning)
