"""Settings for training on images that the model draws itself."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from .runtime.base_config import DiffusionConfig, Ranges, option


@dataclass
class OnlineConfig(DiffusionConfig):
    r"""
    Configuration class for a [`~online_trainer.OnlineTrainer`]: the parameters of any training on rewards, whatever its loss.

    This class includes only the parameters that are specific to it. For a full list, please refer to
    [`~runtime.base_config.DiffusionConfig`] and the [`~transformers.TrainingArguments`] documentation.

    Sizes: a training forward pass takes `per_device_train_batch_size` kept images at one noise level. A rollout samples
    `per_device_train_batch_size * steps_per_generation / num_kept` prompts per device with `num_generations` images each, and
    trains on `num_kept` of these: `2 * top_k` or all. With `num_scouts`, only these `2 * top_k` images are drawn.

    Parameters:
        > Parameters that control the rollout

        num_generations (`int`, *optional*, defaults to `24`):
            Number of images per prompt, the size of a group.
        steps_per_generation (`int`, *optional*):
            Number of forward passes per trained denoising step over which the kept images of a rollout are spread, a
            multiple of `gradient_accumulation_steps`. If `None`, it defaults to `gradient_accumulation_steps`: one
            update per rollout.
        rollout_batch_size (`int`, *optional*):
            Number of images that a device samples at a time. If `None`, `per_device_train_batch_size`: with the same batches,
            later updates can use the rollout's log-probs of the old policy, which GRPO would otherwise compute again. Evaluation
            samples at most `per_device_eval_batch_size` at a time, and fewer if they would have more pixels together.
        num_inference_steps (`int`, *optional*, defaults to `6`):
            Number of denoising steps in training.
        num_scouts (`int`, *optional*):
            Number of scouts per prompt, instead of its `num_generations` images: cheap images with `scout_steps` steps
            without noise, ranked by the same rewards ([Sol-RL](https://huggingface.co/papers/2604.06916)). Only the seeds of the
            `top_k` best and the `top_k` worst are drawn with all their steps, and all of these images are trained on. An image
            depends only on its seed, so it is the one that would have been drawn without scouts. `scout_rank_correlation` in
            the logs says how reliable the scouts are. Every scout is rewarded too, so they only pay off if a reward is cheaper
            than an image. If `None`, there are no scouts.
        scout_steps (`int`, *optional*):
            Number of denoising steps of a scout, at most `num_inference_steps`. Required with `num_scouts`.

        > Parameters that control the rewards and advantages

        top_k (`int`, *optional*, defaults to `6`):
            Only the `top_k` best and the `top_k` worst images of a group are trained on. If `None`, all are.
        advantage_scope (`str`, *optional*, defaults to `"kept"`):
            Which images of a group the mean and std of the rewards are computed over: the `"kept"` ones, as in the paper,
            or the whole `"group"`, as in DanceGRPO.
        reward_weights (`list[float]`, *optional*):
            Weights for each reward function. Must match the number of reward functions. If `None`, all rewards are
            weighted equally with weight `1.0`. Images without a reward that others in their group have are not trained on,
            see [`~advantages.combine_rewards`].
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            What the centered rewards are divided by: the std of their `"group"`, of the `"batch"`, or `"none"` for nothing.
        multi_objective_aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            How to combine several rewards: `"sum_then_normalize"` sums them into one reward first;
            `"normalize_then_sum"` computes advantages for each, so that an easy reward does not drown out a hard one.
        overlap_rewards (`bool`, *optional*, defaults to `False`):
            Whether to score the images of a batch in a thread while the next batch of the rollout is drawn. This
            helps if rewards are computed elsewhere: by a server, on another device or on the CPU. A function is then
            called once per `rollout_batch_size` images instead of once per rollout, so an image's reward must not depend
            on the other images. `time/reward` is the time that the rollout waits for its rewards.

        > Parameters that control the loss

        num_iterations (`int`, *optional*, defaults to `1`):
            Number of times each kept image is trained on (denoted as μ in the algorithm).
    """

    _ranges: ClassVar[Ranges] = {
        **DiffusionConfig._ranges,
        **dict.fromkeys(("num_generations", "num_scouts"), (2, math.inf, None)),
        **dict.fromkeys(("num_inference_steps", "scout_steps", "num_iterations"), (1, math.inf, None)),
        **dict.fromkeys(("steps_per_generation", "rollout_batch_size"), (1, math.inf, None)),
    }

    # Parameters that control the rollout
    num_generations: int = option(24, "Number of images per prompt, the size of a group.")
    steps_per_generation: int | None = option(
        None,
        "Number of forward passes per trained denoising step over which the kept images of a rollout are spread. If "
        "`None`, it defaults to `gradient_accumulation_steps`.",
    )
    rollout_batch_size: int | None = option(
        None,
        "Number of images that a device samples at a time. If `None`, it defaults to `per_device_train_batch_size`. An "
        "evaluation batch never has more pixels.",
    )
    num_inference_steps: int = option(6, "Number of denoising steps in training.")
    num_scouts: int | None = option(
        None,
        "Number of cheap images per prompt, instead of `num_generations`: only the seeds of the `top_k` best and worst of "
        "them are drawn with all their steps. If `None`, there are no scouts.",
    )
    scout_steps: int | None = option(None, "Number of denoising steps of a scout.")

    # Parameters that control the rewards and advantages
    top_k: int | None = option(
        6, "Only the `top_k` best and the `top_k` worst images of a group are trained on. If `None`, all are."
    )
    advantage_scope: str = option(
        "kept", "Which images of a group the mean and std of the rewards are computed over.", ["kept", "group"]
    )
    reward_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Weights for each reward function. If `None`, all rewards are weighted equally."},
    )
    scale_rewards: str = option(
        "group",
        "What the centered rewards are divided by: the std of their group, of the batch, or nothing.",
        ["group", "batch", "none"],
    )
    multi_objective_aggregation: str = option(
        "sum_then_normalize",
        "Whether several rewards are summed before or after they are normalized.",
        ["sum_then_normalize", "normalize_then_sum"],
    )
    overlap_rewards: bool = option(
        False,
        "Whether to score images while the next batch of the rollout is drawn: for rewards computed by a server, on another"
        " device or on the CPU.",
    )

    # Parameters that control the loss
    num_iterations: int = option(1, "Number of times each kept image is trained on (μ in the algorithm).")

    @property
    def num_batches_per_rollout(self) -> int:
        """Number of training batches of a rollout: `steps_per_generation`, or its default."""
        if self.steps_per_generation is None:
            return self.gradient_accumulation_steps
        return self.steps_per_generation

    @property
    def sampling_batch_size(self) -> int:
        """Number of images that a device samples at a time: `rollout_batch_size`, or its default."""
        return self.per_device_train_batch_size if self.rollout_batch_size is None else self.rollout_batch_size

    @property
    def num_kept(self) -> int:
        """Number of images of a group that are trained on."""
        return self.num_generations if self.top_k is None else 2 * self.top_k

    @property
    def num_drawn(self) -> int:
        """Number of images of a group that are drawn with all their steps."""
        return self.num_generations if self.num_scouts is None else self.num_kept

    @property
    def num_prompts_per_device(self) -> int:
        """Number of prompts that a device samples in a rollout."""
        return self.per_device_train_batch_size * self.num_batches_per_rollout // self.num_kept

    @property
    def num_prompts(self) -> int:
        """Number of prompts in a rollout, over all processes."""
        return self.num_prompts_per_device * self.world_size

    @property
    def num_updates_per_rollout(self) -> int:
        """Number of updates of the policy between two rollouts."""
        return self.num_batches_per_rollout // self.gradient_accumulation_steps * self.num_iterations

    def _check_fields(self):
        super()._check_fields()
        weights = self.reward_weights or []
        if not all(math.isfinite(weight) for weight in weights) or (weights and not any(weights)):
            raise ValueError(
                f"`reward_weights` is {weights}. Use one finite number per reward function, at least one of them not 0."
            )
        self._check_scouts()
        size = self.num_scouts or self.num_generations
        if self.top_k is not None and not 1 <= self.top_k <= size // 2:
            name, others = (
                ("num_scouts", "") if self.num_scouts else ("num_generations", ", or `None` to train on all images")
            )
            raise ValueError(
                f"`top_k` is {self.top_k} and `{name}` is {size}. Use `top_k` between 1 and {size // 2}, half of a group{others}."
            )
        self._check_batch_sizes()

    def _check_scouts(self):
        if (self.num_scouts is None) != (self.scout_steps is None):
            raise ValueError(
                f"`num_scouts` is {self.num_scouts} and `scout_steps` is {self.scout_steps}. Set both, such as 96 and 2, or "
                "leave both `None` for no scouts."
            )
        if self.num_scouts is None or self.scout_steps is None:
            return
        if self.top_k is None:
            raise ValueError(
                f"`num_scouts` is {self.num_scouts} and `top_k` is None. Scouts choose the `top_k` best and worst seeds: set "
                "`top_k`, or leave `num_scouts` `None`."
            )
        if self.scout_steps > self.num_inference_steps:
            raise ValueError(
                f"`scout_steps` is {self.scout_steps} and `num_inference_steps` is {self.num_inference_steps}. A scout is a "
                f"cheap image: use at most {self.num_inference_steps}."
            )

    def _check_batch_sizes(self):
        # Smallest change to `gradient_accumulation_steps` that still gives whole groups
        whole = self.num_kept // math.gcd(self.num_kept, self.per_device_train_batch_size)
        num_batches, name = self.num_batches_per_rollout, "gradient_accumulation_steps"
        if self.steps_per_generation is not None:
            name, whole = "steps_per_generation", math.lcm(whole, self.gradient_accumulation_steps)
            if num_batches % self.gradient_accumulation_steps:
                raise ValueError(
                    f"`steps_per_generation` is {num_batches} and `gradient_accumulation_steps` is "
                    f"{self.gradient_accumulation_steps}. Use a multiple of that, so that a rollout is a whole number "
                    f"of updates: {' or '.join(map(str, _nearest_multiples(num_batches, whole)))}."
                )
        if self.per_device_train_batch_size * num_batches % self.num_kept:
            legal = _nearest_multiples(num_batches, whole)
            prompts = [
                self.per_device_train_batch_size * number // self.num_kept * self.world_size for number in legal
            ]
            raise ValueError(
                f"`{name}` is {num_batches} and `per_device_train_batch_size` is {self.per_device_train_batch_size}: a "
                f"rollout would keep {self.per_device_train_batch_size * num_batches} images per device, which is not "
                f"a whole number of groups of {self.num_kept} kept images. Use `{name}` {' or '.join(map(str, legal))} "
                f"({' or '.join(map(str, prompts))} prompts per rollout of {self.world_size} processes), or change "
                "`per_device_train_batch_size`, `num_generations` or `top_k`."
            )


def _nearest_multiples(value: int, of: int) -> list[int]:
    below, above = value // of * of, -(-value // of) * of
    return [below, above] if below and below != above else [above]
