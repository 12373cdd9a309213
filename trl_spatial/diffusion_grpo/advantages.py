import math
from collections.abc import Sequence

import torch


def combine_rewards(
    rewards: torch.Tensor,
    num_generations: int,
    weights: Sequence[float] | torch.Tensor | None = None,
    multi_objective_aggregation: str = "sum_then_normalize",
) -> torch.Tensor:
    """
    Weighted sum of the rewards of several reward functions: one per image, by which images are selected and advantages
    computed.

    A reward may be missing (NaN). It is never counted as 0, which would rank an image by the scale of the missing reward:

    - An image without a reward that others in its group have cannot be compared with them: it has no sum, and is not
      trained on.
    - A function that gave no reward to a whole group cannot rank it. It counts there as its mean over the other groups,
      so that the sums of all groups have the same scale.

    Adding a constant to all rewards of one function therefore changes no advantage.

    Args:
        rewards (`torch.Tensor` of shape `(num_prompts * num_generations, num_funcs)`):
            Rewards, group-contiguous: the images of a prompt follow each other. NaN where there is none.
        num_generations (`int`):
            Number of images per prompt.
        weights (sequence of `num_funcs` `float` or `torch.Tensor`, *optional*):
            Weight of each reward function; one of weight 0 may be missing. 1 if not given.
        multi_objective_aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            When rewards are normalized, as in TRL.

            - `"sum_then_normalize"`: Weighted sum of the rewards.
            - `"normalize_then_sum"`: Weighted sum of the advantages of each reward function over the images of the group
              that have a sum, so that each function counts by its weight whatever its scale
              ([GDPO](https://huggingface.co/papers/2601.05242)). A function that gives nearly equal rewards to a group
              adds 0.

    Returns:
        `torch.Tensor` of shape `(num_prompts * num_generations,)`:
            Reward per image, in float32. NaN for images that are not trained on.

    Raises:
        `ValueError`: If the number of rewards is no multiple of `num_generations`, there is not one weight per
            function, `multi_objective_aggregation` is not one of the above, or a sum is beyond float32.
    """
    rewards = rewards.float()
    num_funcs = rewards.shape[1]
    weights = torch.ones(num_funcs) if weights is None else torch.as_tensor(weights)
    if weights.shape != (num_funcs,):
        raise ValueError(
            f"There are {weights.numel()} reward weights for {num_funcs} reward functions: pass one for each."
        )
    weights = weights.to(rewards)
    _by_group(rewards[:, 0], num_generations)  # whole groups
    is_missing = (rewards.isnan() | (weights == 0)).unflatten(0, (-1, num_generations))
    is_absent = is_missing.all(1, keepdim=True)  # (num_prompts, 1, num_funcs)
    is_unknown = ((is_missing & ~is_absent & (weights != 0)).any(2) | is_absent.all(2)).flatten()  # per image
    rewards = rewards.masked_fill(is_unknown[:, None], math.nan)
    if multi_objective_aggregation == "normalize_then_sum":
        rewards = torch.stack(
            [group_advantages(of_one, num_generations, clip=math.inf) for of_one in rewards.unbind(1)], dim=1
        )
    elif multi_objective_aggregation == "sum_then_normalize":
        rewards = torch.where(rewards.isnan(), rewards.nanmean(0), rewards)
    else:
        raise ValueError(
            f"Unknown multi_objective_aggregation {multi_objective_aggregation!r}: use 'sum_then_normalize' or "
            "'normalize_then_sum'."
        )
    # Only a function that is missing everywhere is still NaN in a known image: it adds nothing.
    combined = (rewards.nan_to_num(0) * weights).sum(1)
    if not combined.isfinite().all():
        raise ValueError(
            f"The weighted sum of rewards up to {rewards.nan_to_num(0).abs().max().item():g} with the weights "
            f"{weights.tolist()} exceeds the range of float32. Use smaller `reward_weights`, or scale the rewards."
        )
    return combined.masked_fill(is_unknown, math.nan)


def select_top_k(rewards: torch.Tensor, num_generations: int, top_k: int | None) -> torch.Tensor:
    """
    Indices of the images with the `top_k` best and the `top_k` worst rewards of every group.

    Only these are trained on ([Spatial-RL](https://huggingface.co/papers/2602.24233)). Equal rewards are ranked by
    their index. Images without a reward (NaN) rank in the middle, so that they are taken only if a group has fewer than
    `2 * top_k` others.

    Args:
        rewards (`torch.Tensor` of shape `(num_prompts * num_generations,)`):
            Rewards, group-contiguous: the images of a prompt follow each other.
        num_generations (`int`):
            Number of images per prompt.
        top_k (`int` or `None`):
            Number of images to keep at each end. If `None`, all are kept.

    Returns:
        `torch.LongTensor` of shape `(num_prompts * 2 * top_k,)`:
            Indices into `rewards`, ascending and thus group-contiguous.

    Raises:
        `ValueError`: If the number of rewards is no multiple of `num_generations`, or `top_k` is not in
            `1 … num_generations // 2`.

    Example:

    ```python
    >>> import torch
    >>> from trl_spatial.diffusion_grpo.advantages import select_top_k

    >>> select_top_k(torch.tensor([0.3, 0.9, 0.1, 0.2, 5.0, 8.0, 7.0, 6.0]), num_generations=4, top_k=1)
    tensor([1, 2, 4, 5])
    ```
    """
    grouped = _by_group(rewards, num_generations)  # (num_prompts, num_generations)
    if top_k is None:
        return torch.arange(rewards.numel(), device=rewards.device)
    if not 1 <= top_k <= num_generations // 2:
        raise ValueError(
            f"top_k is {top_k} with num_generations={num_generations}: use 1 to {num_generations // 2}, or None to "
            "train on all."
        )
    ranking = grouped.argsort(dim=1, stable=True)  # NaN last
    rank = torch.arange(num_generations, device=rewards.device)
    num_known = (~grouped.isnan()).sum(1, keepdim=True)
    # lower half of the images with a reward, images without, upper half
    third = torch.where(rank >= num_known, 1, torch.where(rank < num_known // 2, 0, 2))
    ranking = ranking.gather(1, third.argsort(dim=1, stable=True))
    kept = torch.cat([ranking[:, :top_k], ranking[:, -top_k:]], dim=1).sort(dim=1).values
    first = num_generations * torch.arange(len(grouped), device=rewards.device)
    return (first[:, None] + kept).flatten()


def group_advantages(
    rewards: torch.Tensor,
    num_generations: int,
    scale_rewards: str = "group",
    *,
    kept: torch.Tensor | None = None,
    advantage_scope: str = "kept",
    clip: float = 5.0,
) -> torch.Tensor:
    """
    Advantage of each image: its reward, less the mean of its group, in units of a standard deviation.

    A group whose rewards are equal up to the rounding of float32 gets advantages of exactly 0: dividing by a small
    constant instead would turn rounding errors into a signal. The standard deviation is that of the population
    (divided by the count), as in [Flow-GRPO](https://huggingface.co/papers/2505.05470), so that the advantages of a
    group have mean square 1.

    Args:
        rewards (`torch.Tensor` of shape `(num_prompts * num_generations,)`):
            Rewards, group-contiguous: the images of a prompt follow each other. NaN means unknown: it does not
            enter mean and standard deviation, and its advantage is 0.
        num_generations (`int`):
            Number of images per prompt.
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            What the differences from the group mean are divided by, as in TRL: the standard deviation of the
            `"group"`, that of all rewards of the `"batch"`, or nothing (`"none"`).
        kept (`torch.LongTensor` of shape `(num_prompts * num_kept,)`, *optional*):
            Indices of the images to train on, from [`select_top_k`]: equally many of each group. If not given, all.
        advantage_scope (`str`, *optional*, defaults to `"kept"`):
            Rewards that mean and standard deviation are computed over: those of the `"kept"` images
            ([Spatial-RL](https://huggingface.co/papers/2602.24233)) or those of the whole `"group"`
            ([DanceGRPO](https://huggingface.co/papers/2505.07818)).
        clip (`float`, *optional*, defaults to `5.0`):
            Maximum absolute value of an advantage.

    Returns:
        `torch.Tensor` of shape `(num_prompts * num_kept,)`:
            Advantages of the kept images, in their order, in float32.

    Raises:
        `ValueError`: If the number of rewards is no multiple of `num_generations`, `kept` does not hold equally many
            of each group, or `scale_rewards` or `advantage_scope` is not one of the above.

    Example:

    ```python
    >>> import torch
    >>> from trl_spatial.diffusion_grpo.advantages import group_advantages

    >>> group_advantages(torch.tensor([0.0, 1.0, 2.0, 1.0, 0.7, 0.7, 0.7, 0.7]), num_generations=4)
    tensor([-1.4142,  0.0000,  1.4142,  0.0000,  0.0000,  0.0000,  0.0000,  0.0000])
    ```
    """
    rewards = rewards.float()
    in_group = _by_group(rewards, num_generations)  # (num_prompts, num_generations)
    in_kept = in_group if kept is None else _kept_by_group(rewards, num_generations, kept)  # (num_prompts, num_kept)
    if advantage_scope not in ("kept", "group"):
        raise ValueError(f"Unknown advantage_scope {advantage_scope!r}: use 'kept' or 'group'.")
    scope = in_kept if advantage_scope == "kept" else in_group
    group_std = _std(scope)  # (num_prompts, 1)
    if scale_rewards == "group":
        scale = group_std
    elif scale_rewards == "batch":
        scale = _std(scope.reshape(1, -1))
    elif scale_rewards == "none":
        scale = torch.ones_like(group_std)
    else:
        raise ValueError(f"Unknown scale_rewards {scale_rewards!r}: use 'group', 'batch' or 'none'.")
    advantages = (in_kept - scope.nanmean(1, keepdim=True)) / scale
    advantages = advantages.masked_fill(_is_nearly_zero(group_std, scope) | in_kept.isnan(), 0)
    return advantages.clamp(-clip, clip).flatten()


def _by_group(rewards: torch.Tensor, num_generations: int) -> torch.Tensor:
    if rewards.ndim != 1 or rewards.numel() % num_generations:
        raise ValueError(
            f"rewards has shape {tuple(rewards.shape)}: with num_generations={num_generations}, use one dimension whose "
            "size is a multiple of that, so that all groups are whole."
        )
    return rewards.view(-1, num_generations)


def _kept_by_group(rewards: torch.Tensor, num_generations: int, kept: torch.Tensor) -> torch.Tensor:
    num_groups = rewards.numel() // num_generations
    group = (kept // num_generations).reshape(num_groups, -1) if kept.numel() % num_groups == 0 else None
    if group is None or (group != torch.arange(num_groups, device=kept.device)[:, None]).any():
        raise ValueError(
            f"kept must hold equally many images of each of the {num_groups} groups, group by group, as "
            "select_top_k returns them."
        )
    return rewards[kept].view(num_groups, -1)


def _std(rewards: torch.Tensor) -> torch.Tensor:
    return (rewards - rewards.nanmean(1, keepdim=True)).square().nanmean(1, keepdim=True).sqrt()


def _is_nearly_zero(std: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    # A float32 model scores equal images differently from batch to batch, by about 1e-6 of the score. The absolute part
    # is for rewards that are 0 up to rounding, such as the difference of two others or a saturated sigmoid.
    size = rewards.abs().nan_to_num(0).amax(1, keepdim=True)
    return std <= 1e-5 * size + 1e-8
