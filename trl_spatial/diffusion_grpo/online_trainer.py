from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from peft import LoraConfig
from PIL.Image import Image
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from ..generation.seeds import image_generator
from ..training.processes import fail_together
from ..training.run_folder import num_updates_of
from .advantages import combine_rewards, group_advantages, select_top_k
from .online_config import OnlineConfig
from .policies import SamplingOptions
from .reward_functions import OverlappedRewards, RewardFunction, RewardFunctions
from .rollout import Rollout, num_rollouts_per_epoch, rollout_prompts, sample_rollout
from .runtime.base_trainer import DiffusionTrainer, Rows
from .runtime.buffer import RolloutBuffer
from .runtime.checks import check_data, with_held_out
from .runtime.metrics import group_diversity
from .runtime.monitoring import RewardsMonitor


logger = get_logger(__name__)

# Number of rollouts between saved grids of images
ROLLOUTS_PER_GRID = 10
# Number of rollouts whose prompts are encoded together: moving the text encoders to the device and back takes seconds
ROLLOUTS_PER_ENCODING = 32


class OnlineTrainer(DiffusionTrainer):
    """
    Trains on images drawn by the policy itself: rollout, rewards, filter and advantages, independent of the loss.

    A subclass implements `_make_buffer` and `compute_loss`, the warnings about its settings and, if it does not draw images as
    in evaluation, `_sample`. Its arguments are those of
    [`DiffusionGRPOTrainer`].
    """

    _config_class: ClassVar[type[OnlineConfig]]
    _buffer_class: ClassVar[type[RolloutBuffer]]
    _run_suffix: ClassVar[str]  # of the default output folder
    # Arguments that a rollout is drawn, rewarded and stored with: a change in its middle would only count from the next one on
    _rollout_arguments: ClassVar[tuple[str, ...]] = (
        "height", "width", "guidance_scale", "max_sequence_length", "num_inference_steps", "num_generations", "num_scouts",
        "scout_steps", "reward_weights", "scale_rewards", "advantage_scope", "multi_objective_aggregation",
    )  # fmt: skip
    eval_reward_functions: RewardFunctions
    _counted = (*DiffusionTrainer._counted, "num_trained_images", "num_scout_images")

    def __init__(
        self,
        pipeline: str | DiffusionPipeline,
        reward_funcs: RewardFunction | list[RewardFunction],
        args: OnlineConfig | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        eval_reward_funcs: RewardFunction | list[RewardFunction] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: LoraConfig | None = None,
    ):
        if args is None:
            name = pipeline if isinstance(pipeline, str) else pipeline.config.get("_name_or_path", "")
            args = self._config_class(f"{name.split('/')[-1]}-{self._run_suffix}".removeprefix("-"))
        elif not isinstance(args, self._config_class):
            raise TypeError(f"`args` must be a `{self._config_class.__name__}`, got `{type(args).__name__}`.")
        self.reward_functions = RewardFunctions(reward_funcs, args.reward_weights)
        super().__init__(
            pipeline=pipeline,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            eval_reward_functions=with_held_out(self.reward_functions, eval_reward_funcs),
            num_trained_rewards=len(self.reward_functions.names),
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        if args.scout_steps is not None:
            try:
                self.policy.check_num_inference_steps(args.scout_steps)
            except ValueError as error:
                raise ValueError(f"`scout_steps`: {error}") from None
        self._sigmas = self.policy.prepare_sigmas(self._options)  # (num_inference_steps + 1,), on the CPU
        self._buffer: RolloutBuffer | None = None
        self._rewards_monitor = RewardsMonitor()
        self._set_up()
        for warning in self._setup_warnings():
            logger.warning(warning)

    def _set_up(self) -> None:
        """Hook at the end of `__init__` for a subclass's own setup."""

    def _setup_warnings(self) -> list[str]:
        """Warnings about settings that are allowed but known to be harmful."""
        raise NotImplementedError

    @property
    def _num_groups_per_update(self) -> float:
        return self.args.num_prompts * self.args.num_iterations / self.args.num_updates_per_rollout

    def _check_train_dataset(self, dataset: Rows) -> None:
        check_data(dataset, "train_dataset", self.policy, self.reward_functions)

    # The prompts of a rollout are a function of its index (see `rollout_prompts`), so a resumed run continues with the
    # right ones, whatever was skipped. The loader only counts the batches of an epoch.
    def get_train_dataloader(self) -> DataLoader:
        if self.train_dataset is None:
            raise ValueError("`train_dataset` is `None`. Training needs prompts: pass a dataset.")
        num_rollouts = num_rollouts_per_epoch(len(self.train_dataset), self.args.num_prompts)
        num_batches = num_rollouts * self.args.num_batches_per_rollout * self.args.num_iterations
        return DataLoader(range(num_batches), collate_fn=list)  # type: ignore[arg-type]

    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None) -> TrainOutput:
        self._buffer = None
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        model.train()
        steps = self._prepare_inputs(inputs)
        is_boundary = self.accelerator.sync_gradients  # true for the last batch of an update
        total_loss = torch.zeros((), device=self.args.device)
        with self._timer.phase("train"):
            # Backward after every denoising step, so that memory holds only one step's graph.
            for step in steps:
                is_last = is_boundary and step is steps[-1]
                # DeepSpeed reads the flag, DDP and FSDP need the context.
                self.accelerator.gradient_state._set_sync_gradients(is_last)
                with self.accelerator.no_sync(model) if is_boundary and not is_last else nullcontext():
                    loss = self.compute_loss(model, step)
                    loss = loss / (len(steps) * self.current_gradient_accumulation_steps)
                    self.accelerator.backward(loss)
                total_loss += loss.detach()
        return total_loss

    def _prepare_inputs(self, inputs) -> list[Any]:
        """Returns the next batch of the rollout, one entry per backward pass. Draws a new rollout if it is used up."""
        if self._buffer is None or self._buffer.is_used_up:
            self._buffer = None  # or its latents would stay on the device next to the new ones
            self._buffer = self._generate_and_score(self.state.global_step // self.args.num_updates_per_rollout)
        steps = self._buffer.batch_steps(self._buffer.position, self.prompt_cache)
        self._buffer.position += 1
        return steps

    def _generate_and_score(self, rollout_index: int) -> RolloutBuffer:
        """Samples images, rewards them, and keeps those to train on, with their advantages."""
        args, functions = self.args, self.reward_functions
        rows = self._rollout_rows(rollout_index)
        chosen, scout_rewards = self._choose_images(rows, rollout_index)
        prompts = [row["prompt"] for row in rows for _ in range(args.num_drawn)]  # n of them
        rollout, own_rewards = self._draw(rows, chosen, rollout_index)  # (n, num_funcs)

        # Selected and normalized over all processes; then each takes its part
        rewards = self._gather(own_rewards)  # (num_processes * n, num_funcs)
        combined = combine_rewards(
            rewards, args.num_drawn, functions.weights, args.multi_objective_aggregation
        )  # (num_processes * n,)
        kept = self._select_kept(combined, rollout_index)  # (num_processes * num_kept,)
        advantages = group_advantages(
            combined, args.num_drawn, args.scale_rewards, kept=kept, advantage_scope=args.advantage_scope
        )  # (num_processes * num_kept,)
        self._metrics.add_rollout(rewards, combined, functions, args.num_drawn)
        if scout_rewards is not None:
            self._metrics.add_scouts(scout_rewards, combined, args.num_drawn)
        diversity = group_diversity(rollout.images, args.num_drawn)
        self._metrics.add_per_image({"group_diversity": diversity.to(args.device)})
        for warning in self._rewards_monitor.update(functions.names, rewards, combined):
            logger.warning(warning)
        kept = kept.view(args.world_size, -1)[args.process_index] - args.process_index * len(prompts)  # (num_kept,)
        advantages = advantages.view(args.world_size, -1)[args.process_index]  # (num_kept,)
        self._metrics.totals["num_trained_images"] += len(kept)
        if rollout_index % ROLLOUTS_PER_GRID == 0:
            of_all = torch.full((len(prompts),), torch.nan).index_put((kept,), advantages.float())
            self._log_images("rollout", rollout_index, rollout.images, prompts, own_rewards, of_all)

        return self._make_buffer(
            rollout_index,
            rollout,
            kept,
            prompts=[prompts[index] for index in kept.tolist()],
            advantages=advantages.to(rollout.final_latents.device),
            batch_size=args.per_device_train_batch_size,
            num_iterations=args.num_iterations,
            num_batches_on_policy=args.gradient_accumulation_steps,
        )

    def _choose_images(
        self, rows: list[dict[str, Any]], rollout_index: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Returns the numbers of the images to draw for each prompt of this process, `(num_prompts_per_device, num_drawn)`, and, if
        scouts chose them, the combined rewards of those scouts over all processes, `(num_prompts * num_drawn,)`.
        """
        args = self.args
        if args.num_scouts is None:
            return torch.arange(args.num_generations).expand(len(rows), -1), None
        scouts = torch.arange(args.num_scouts).expand(len(rows), -1)
        _, rewards = self._draw(rows, scouts, rollout_index, is_scout=True)
        combined = combine_rewards(
            self._gather(rewards), args.num_scouts, self.reward_functions.weights, args.multi_objective_aggregation
        )  # (num_prompts * num_scouts,)
        if num_blind := int(combined.view(-1, args.num_scouts).isnan().all(1).sum()):
            logger.warning(
                f"No scout of {num_blind} of the {args.num_prompts} prompts of this rollout has a reward, so the seeds drawn for them "
                "are arbitrary. If it persists, use more `scout_steps`, or no scouts."
            )
        kept = select_top_k(combined, args.num_scouts, args.top_k)  # (num_prompts * num_drawn,)
        own = kept.view(args.world_size, len(rows), -1)[args.process_index]
        return own % args.num_scouts, combined[kept]

    def _gather(self, rewards: torch.Tensor) -> torch.Tensor:
        return self.accelerator.gather(rewards.to(self.args.device)).cpu()

    def _make_buffer(self, rollout_index: int, rollout: Rollout, kept: torch.Tensor, **common: Any) -> RolloutBuffer:
        """
        Makes the training buffer from the kept images of this process's rollout, `(num_kept,)` indices. `common` holds the
        fields that every buffer has.
        """
        raise NotImplementedError

    def _rollout_rows(self, rollout_index: int) -> list[dict[str, Any]]:
        """Rows of this process's prompts."""
        return [self.train_dataset[index] for index in self._row_indices(rollout_index)]

    def _row_indices(self, rollout_index: int) -> list[int]:
        """Indices of the dataset rows that are this process's prompts in a rollout."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        indices = rollout_prompts(len(self.train_dataset), self.args.num_prompts, rollout_index, seed=seed)
        start = self.args.process_index * self.args.num_prompts_per_device
        return indices[start : start + self.args.num_prompts_per_device]

    def _next_prompts(self, rollout_index: int) -> Iterator[str]:
        """Yields the prompts of the next rollouts that are encoded together with this one's."""
        num_rollouts = -(-self.state.max_steps // self.args.num_updates_per_rollout)
        for index in range(rollout_index + 1, min(rollout_index + ROLLOUTS_PER_ENCODING, num_rollouts)):
            for row in self._row_indices(index):
                yield self.train_dataset[row]["prompt"]

    def _draw(
        self, rows: list[dict[str, Any]], numbers: torch.Tensor, rollout_index: int, *, is_scout: bool = False
    ) -> tuple[Rollout, torch.Tensor]:
        """
        Draws and rewards, for each row, the images or scouts with its `numbers`, `(len(rows), num_images)`. Returns a rollout of
        `n` images, group-contiguous, and their rewards, `(n, num_funcs)`.
        """
        args = self.args
        rows_of_images = [row for row in rows for _ in range(numbers.shape[1])]
        columns = {name: [row[name] for row in rows_of_images] for name in rows[0]}
        prompts = columns.pop("prompt")
        first = args.process_index * len(rows)
        generators = [
            image_generator(args.seed, rollout_index, group, number)
            for group, of_group in enumerate(numbers.tolist(), start=first)
            for number in of_group
        ]
        overlapped = None
        if args.overlap_rewards:
            overlapped = OverlappedRewards(
                self.reward_functions, prompts, columns, args.device, is_collective=self.is_fsdp_enabled
            )
        with nullcontext() if overlapped is None else overlapped:
            with fail_together("Sampling images", is_collective=self.is_fsdp_enabled):
                with self._timer.phase("encode"):
                    self.prompt_cache.expect(self._next_prompts(rollout_index))
                    # one row per image of the rollout is too much for the device, which gets them batch by batch
                    embeds = self.prompt_cache.get(prompts, device=torch.device("cpu"))
                with self._timer.phase("sample"), self._sampling_policy(), self.accelerator.autocast():
                    on_batch = None if overlapped is None else overlapped.add
                    if is_scout:  # from the same initial latents as the image, in few steps
                        options = replace(self._options, num_inference_steps=args.scout_steps)
                        rollout = self._sample_without_noise(options, embeds, generators, on_batch)
                    else:
                        rollout = self._sample(rollout_index, embeds, generators, on_batch)
            with fail_together("Rewarding images"), self._timer.phase("reward"):
                if overlapped is None:
                    rewards = self.reward_functions(prompts, rollout.images, **columns)
                else:
                    rewards = overlapped.collect()
        self._metrics.totals["num_scout_images" if is_scout else "num_images"] += len(prompts)
        self._count_passes("policy", len(prompts) * (args.scout_steps if is_scout else args.num_inference_steps))
        return rollout, rewards

    def _sample(
        self,
        rollout_index: int,
        embeds: dict[str, torch.Tensor],
        generators: list[torch.Generator],
        on_batch: Callable[[int, list[Image]], None] | None,
    ) -> Rollout:
        """Draws an image for every row of `embeds`, see [`~rollout.sample_rollout`]: without noise, as in evaluation."""
        return self._sample_without_noise(self._options, embeds, generators, on_batch)

    def _sample_without_noise(
        self,
        options: SamplingOptions,
        embeds: dict[str, torch.Tensor],
        generators: list[torch.Generator],
        on_batch: Callable[[int, list[Image]], None] | None,
    ) -> Rollout:
        return sample_rollout(
            self.policy,
            self.model,
            embeds,
            generators,
            options,
            sigmas=self.policy.prepare_sigmas(options),
            trained_steps=(),
            noise_level=0.0,
            dynamics="flow_sde",
            batch_size=self.args.sampling_batch_size,
            on_batch=on_batch,
        )

    def _sampling_policy(self) -> AbstractContextManager:
        """Context in which the transformer is the policy that draws images."""
        return nullcontext()

    def _select_kept(self, rewards: torch.Tensor, rollout_index: int) -> torch.Tensor:
        """Indices of a rollout's images to train on, over all processes: `(num_prompts * num_kept,)`."""
        return select_top_k(rewards, self.args.num_drawn, self.args.top_k)

    def _training_state(self) -> tuple[Mapping[str, torch.Tensor], dict[str, Any]]:
        buffer = self._buffer
        tensors, rest = ({}, None) if buffer is None or buffer.is_used_up else buffer.state()
        return tensors, {"buffer": rest, **super()._training_state()[1]}

    def _merge_training_states(self, states: list[tuple[dict[str, torch.Tensor], dict[str, Any]]]) -> dict[str, Any]:
        num_processes = self.args.world_size
        if any(extra["buffer"] is not None for _, extra in states):
            raise ValueError(
                f"The checkpoint is from the middle of a rollout of {len(states)} processes, each with its own images; "
                f"now there are {num_processes}. Resume with {len(states)}, or from a checkpoint at the end of a rollout."
            )
        return {"buffer": None, **super()._merge_training_states(states)}

    def _load_training_state(self, tensors: Mapping[str, torch.Tensor], extra: dict[str, Any]) -> None:
        super()._load_training_state(tensors, extra)
        if extra["buffer"] is None:
            return
        args = self.args
        self._check_rollout_arguments()
        buffer = self._buffer_class.from_state(tensors, extra["buffer"], args.device)
        sizes = (len(buffer.prompts), buffer.batch_size, buffer.num_iterations, buffer.num_batches_on_policy)
        expected = (
            args.num_prompts_per_device * args.num_kept,
            args.per_device_train_batch_size,
            args.num_iterations,
            args.gradient_accumulation_steps,
        )
        if sizes != expected:
            raise ValueError(
                f"The checkpoint is from the middle of a rollout whose (kept images, `per_device_train_batch_size`, "
                f"`num_iterations`, `gradient_accumulation_steps`) are {sizes}; now they are {expected}. Resume with the "
                "batch sizes of that run, or from a checkpoint at the end of a rollout."
            )
        self._buffer = buffer

    def _check_rollout_arguments(self) -> None:
        assert self._checkpoint is not None
        step = num_updates_of(self._checkpoint)
        for change in self._run["changes"]:
            if change["until"] == step and change["name"] in self._rollout_arguments:
                raise ValueError(
                    f"The checkpoint is from the middle of a rollout that was drawn with `{change['name']}` "
                    f"{change['value']}; now it is {self._run['arguments'][change['name']]}. Resume with the old value, or from a "
                    "checkpoint at the end of a rollout."
                )

    # Prompts are a function of the rollout's index: a resumed run has to count rollouts as before.
    def _position(self) -> dict[str, int]:
        return {
            "num_rows": len(self.train_dataset),
            "prompts per rollout": self.args.num_prompts,
            "updates per rollout": self.args.num_updates_per_rollout,
        }

    def _find_start(self, dataloader: Any, num_updates: int, updates_per_epoch: int) -> tuple[int, int]:
        then, now = self._run.get("position"), self._position()
        if then is not None:
            self._check_num_rows(then["num_rows"])
            if then != now:
                names = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "top_k")
                raise ValueError(
                    "Resuming like this would skip prompts or draw them twice: (prompts, updates) per rollout "
                    f"were {tuple(then.values())[1:]} and are {tuple(now.values())[1:]} now, with {self.args.world_size} "
                    f"processes{self._old_sizes((*names, 'num_generations', 'num_iterations'))}. Use the old values."
                )
        epoch, updates = divmod(num_updates, updates_per_epoch)
        return epoch, updates * self.args.gradient_accumulation_steps

    def _last_grids(self) -> dict[str, int]:
        return super()._last_grids() | {"rollout": self.state.global_step // self.args.num_updates_per_rollout}

    def _card_settings(self) -> dict[str, Any]:
        args, functions = self.args, self.reward_functions
        rewards = zip(functions.names, functions.weights.tolist(), strict=True)
        return {
            "rewards": ", ".join(f"{name} ({weight:g})" for name, weight in rewards),
            "prompts per rollout": args.num_prompts,
            "scouts per prompt": args.num_scouts and f"{args.num_scouts} of {args.scout_steps} steps",
            "images per prompt": args.num_drawn,
            "kept of them, best and worst": None if args.top_k is None else f"{args.top_k} and {args.top_k}",
            "denoising steps in training": args.num_inference_steps,
            **super()._card_settings(),
        }
