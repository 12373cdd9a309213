from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from ..generation.seeds import image_generator
from .advantages import combine_rewards, group_advantages, select_top_k
from .config import DiffusionGRPOConfig
from .losses import ScoredStep, policy_objective, reference_kl
from .reward_functions import OverlappedRewards, RewardFunction
from .rollout import Rollout, num_rollouts_per_epoch, rollout_prompts, sample_rollout
from .runtime.base_trainer import DiffusionTrainer, Rows
from .runtime.buffer import RolloutBuffer, TrainingStep
from .runtime.checks import warn_about_settings
from .runtime.model_setup import freeze_idle_modules
from .runtime.monitoring import RewardsMonitor
from .runtime.processes import fail_together
from .sde import sde_step, sde_window


logger = get_logger(__name__)

# A grid of a rollout's images is saved every so many rollouts
ROLLOUTS_PER_GRID = 10


class DiffusionGRPOTrainer(DiffusionTrainer):
    """
    Trainer for the online reinforcement learning of text-to-image models by Group Relative Policy Optimization
    ([Flow-GRPO](https://huggingface.co/papers/2505.05470)), with the filter for the best and worst images of
    [Enhancing Spatial Understanding in Image Generation via Reward
    Modeling](https://huggingface.co/papers/2602.24233).

    This class is a [`~transformers.Trainer`] and inherits all of its attributes and methods.

    Example:

    ```python
    >>> import numpy as np
    >>> from datasets import Dataset
    >>> from peft import LoraConfig
    >>> from trl_spatial import DiffusionGRPOConfig, DiffusionGRPOTrainer


    >>> def redness(prompts, images, **columns):
    ...     return [float(np.asarray(image)[..., 0].mean()) for image in images]


    >>> trainer = DiffusionGRPOTrainer(
    ...     pipeline="black-forest-labs/FLUX.1-dev",
    ...     reward_funcs=redness,
    ...     args=DiffusionGRPOConfig("flux-redness"),
    ...     train_dataset=Dataset.from_dict({"prompt": ["a cat to the left of a dog"]}),
    ...     peft_config=LoraConfig(r=32, lora_alpha=64, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
    ... )
    >>> trainer.train()
    ```

    Args:
        pipeline (`str` or [`~diffusers.DiffusionPipeline`]):
            Pipeline whose transformer is trained. Can be either:

            - A string, being the *model id* of a pipeline on huggingface.co, or a path to a *directory* with one. It
              is loaded in bfloat16 if `args.bf16`, else in float32.
            - A [`~diffusers.DiffusionPipeline`] object. It is changed in place.

            If its transformer already has adapters, they are trained further.
        reward_funcs (`Callable` or `list[Callable]`):
            Reward functions, called as `reward_func(prompts=..., images=..., **columns)` with lists of one entry per
            image; `columns` are the other columns of the dataset. Each returns a list of one number, or `None`, per image.
        args ([`DiffusionGRPOConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset ([`~datasets.Dataset`] or `list[dict]`):
            Dataset to use for training, with a column `"prompt"`.
        eval_dataset ([`~datasets.Dataset`], `list[dict]` or a `dict` of them, *optional*):
            Dataset to use for evaluation. It must meet the same requirements as `train_dataset`.
        eval_reward_funcs (`Callable` or `list[Callable]`, *optional*):
            Further reward functions that only score the images of evaluation and are not trained on. `eval_reward` is the
            weighted sum of the trained ones; a warning is issued if it rises while one of these falls.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            List of callbacks to customize the training loop.
        optimizers (`tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]`, *optional*, defaults to `(None, None)`):
            A tuple containing the optimizer and the scheduler to use.
        peft_config ([`~peft.LoraConfig`], *optional*):
            Adapters to train. If `None`, and the transformer has none, all of its weights are trained, which needs
            `beta=0.0`.
    """

    def __init__(
        self,
        pipeline: str | DiffusionPipeline,
        reward_funcs: RewardFunction | list[RewardFunction],
        args: DiffusionGRPOConfig | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        eval_reward_funcs: RewardFunction | list[RewardFunction] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: LoraConfig | None = None,
    ):
        if args is None:
            name = pipeline if isinstance(pipeline, str) else pipeline.config.get("_name_or_path", "")
            args = DiffusionGRPOConfig(f"{name.split('/')[-1]}-GRPO".removeprefix("-"))
        elif not isinstance(args, DiffusionGRPOConfig):
            raise TypeError(f"`args` must be a `DiffusionGRPOConfig`, got `{type(args).__name__}`.")
        super().__init__(
            pipeline=pipeline,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            eval_reward_funcs=eval_reward_funcs,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        self._sigmas = self.policy.prepare_sigmas(self._options)  # (num_inference_steps + 1,), on the CPU
        self._buffer: RolloutBuffer | None = None
        self._rewards_monitor = RewardsMonitor()
        warn_about_settings(args, self.policy, self._options)

    # The prompts of a rollout are a function of its index (see `rollout_prompts`), so that a resumed run continues with
    # the right ones whatever was skipped. The loader only counts the batches of an epoch.
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
        is_boundary = self.accelerator.sync_gradients  # of the last batch of an update
        total_loss = torch.zeros((), device=self.args.device)
        with self._timer.phase("train"):
            # Backward after every denoising step: memory holds the graph of one.
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

    def _prepare_inputs(self, inputs) -> list[TrainingStep]:
        """The next batch of the rollout, one entry per trained denoising step; a new rollout if it is used up."""
        if self._buffer is None or self._buffer.is_used_up:
            self._buffer = self._generate_and_score(self.state.global_step // self.args.num_updates_per_rollout)
        steps = self._buffer.batch_steps(self._buffer.position, self.prompt_cache)
        self._buffer.position += 1
        return steps

    def _generate_and_score(self, rollout_index: int) -> RolloutBuffer:
        """Samples images, rewards them, and keeps those to train on, with their advantages."""
        args, functions = self.args, self.reward_functions
        rows = self._rollout_rows(rollout_index)
        prompts = [row["prompt"] for row in rows]  # n of them
        trained_steps = sde_window(
            args.num_inference_steps,
            args.sde_window_size,
            args.sde_window_range,
            seed=args.seed,
            rollout_index=rollout_index,
        )
        rollout, rewards = self._sample_and_reward(rows, prompts, trained_steps, rollout_index)
        if rollout_index % ROLLOUTS_PER_GRID == 0:
            self._log_images("rollout", rollout_index, rollout.images, prompts, rewards)

        # Selected and normalised over all processes, of which each takes its part
        rewards = self.accelerator.gather(rewards.to(args.device)).cpu()  # (num_processes * n, num_funcs)
        combined = combine_rewards(
            rewards, args.num_generations, functions.weights, args.multi_objective_aggregation
        )  # (num_processes * n,)
        kept = self._select_kept(combined, rollout_index)  # (num_processes * num_kept,)
        advantages = group_advantages(
            combined, args.num_generations, args.scale_rewards, kept=kept, advantage_scope=args.advantage_scope
        )  # (num_processes * num_kept,)
        self._metrics.add_rollout(rewards, combined, functions, args.num_generations)
        for warning in self._rewards_monitor.update(functions.names, rewards, combined):
            logger.warning(warning)
        kept = kept.view(args.world_size, -1)[args.process_index] - args.process_index * len(prompts)  # (num_kept,)
        advantages = advantages.view(args.world_size, -1)[args.process_index]  # (num_kept,)

        latents = rollout.latents[kept.to(rollout.latents.device)]  # (num_kept, K, image_seq_len, num_channels)
        has_old_policy = args.num_updates_per_rollout > 1
        buffer = RolloutBuffer(
            prompts=[prompts[index] for index in kept.tolist()],
            trained_steps=trained_steps,
            latents=latents,
            next_latents=rollout.next_latents[kept.to(latents.device)],
            advantages=advantages.to(latents.device),
            old_log_probs=latents.new_full(latents.shape[:2], torch.nan) if has_old_policy else None,
            old_means=torch.full_like(latents, torch.nan) if has_old_policy and args.needs_old_means else None,
            batch_size=args.per_device_train_batch_size,
            num_iterations=args.num_iterations,
            num_batches_on_policy=args.gradient_accumulation_steps,
        )
        if has_old_policy:
            self._score_old_policy(buffer)
        return buffer

    def _rollout_rows(self, rollout_index: int) -> list[dict[str, Any]]:
        """Rows of this process's prompts, each once per image: group-contiguous."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        indices = rollout_prompts(len(self.train_dataset), self.args.num_prompts, rollout_index, seed=seed)
        start = self.args.process_index * self.args.num_prompts_per_device
        rows = [self.train_dataset[index] for index in indices[start : start + self.args.num_prompts_per_device]]
        return [row for row in rows for _ in range(self.args.num_generations)]

    def _sample_and_reward(
        self, rows: list[dict[str, Any]], prompts: list[str], trained_steps: tuple[int, ...], rollout_index: int
    ) -> tuple[Rollout, torch.Tensor]:
        """A rollout of this process, and its rewards, `(n, num_funcs)`."""
        args = self.args
        columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
        first = args.process_index * len(rows)
        generators = [
            image_generator(args.seed, rollout_index, *divmod(index, args.num_generations))  # its group, its image
            for index in range(first, first + len(rows))
        ]
        overlapped = (
            OverlappedRewards(self.reward_functions, prompts, columns, args.device) if args.overlap_rewards else None
        )
        with nullcontext() if overlapped is None else overlapped:
            with fail_together(self.accelerator, "Sampling images", is_collective=self.is_fsdp_enabled):
                with self._timer.phase("encode"):
                    embeds = self.prompt_cache.get(prompts)
                with self._timer.phase("sample"), self.accelerator.autocast():
                    rollout = sample_rollout(
                        self.policy,
                        self.model,
                        embeds,
                        generators,
                        self._options,
                        sigmas=self._sigmas,
                        trained_steps=trained_steps,
                        noise_level=args.noise_level,
                        dynamics=args.dynamics,
                        batch_size=args.sampling_batch_size,
                        on_batch=None if overlapped is None else overlapped.add,
                    )
            with fail_together(self.accelerator, "Rewarding images"), self._timer.phase("reward"):
                if overlapped is None:
                    rewards = self.reward_functions(prompts, rollout.images, **columns)
                else:
                    rewards = overlapped.collect()
        self._metrics.totals["num_images"] += len(rows)
        self._count_passes("policy", len(rows) * args.num_inference_steps)
        return rollout, rewards

    def _select_kept(self, rewards: torch.Tensor, rollout_index: int) -> torch.Tensor:
        """Which images of a rollout are trained on, of all processes: `(num_prompts * num_kept,)` indices."""
        return select_top_k(rewards, self.args.num_generations, self.args.top_k)

    def _score_old_policy(self, buffer: RolloutBuffer) -> None:
        """Scores, in the batches of training, what will be trained on when the policy has changed."""
        # Without gradient, compiled blocks are another graph than in training, and in bfloat16 round by more than `epsilon`.
        with self._timer.phase("train"), torch.set_grad_enabled(self.args.torch_compile):
            for position in range(buffer.num_batches_on_policy, buffer.num_batches):
                for step in buffer.batch_steps(position, self.prompt_cache):
                    old = self._score(self.model, step)
                    step.store_old_policy(old.log_probs.detach(), old.mean.detach())
                    self._count_passes("old_log_prob", len(step.latents))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of one trained denoising step of a batch: a [`TrainingStep`]."""
        args = self.args
        # The reference comes first: no adapter may be switched between the policy's forward and its backward.
        reference = self._score_reference(inputs) if args.beta > 0 else None
        scored = self._score(model, inputs)
        # forward, again with checkpointing, backward
        self._count_passes("policy", (3 if args.gradient_checkpointing else 2) * len(inputs.latents))

        old_log_probs, old_mean = inputs.old_log_probs, inputs.old_mean
        if inputs.is_on_policy:
            # The policy is the old policy: the ratio is exactly 1
            old_log_probs, old_mean = scored.log_probs.detach(), scored.mean.detach()
            inputs.store_old_policy(old_log_probs, old_mean)
        output = policy_objective(
            scored,
            old_log_probs,
            old_mean,
            inputs.advantages,
            epsilon=args.epsilon,
            epsilon_high=args.epsilon_high,
            ratio_norm=args.ratio_norm,
            mask_threshold=args.kl_mask,
            step_weight=self._step_weight(inputs.step),
        )
        loss = output.loss  # (batch_size,)
        metrics = {
            "ratio": output.ratio,
            "clip_ratio/low": output.is_clipped_low,
            "clip_ratio/high": output.is_clipped_high,
        }
        if reference is not None:
            metrics["kl"] = reference_kl(scored, reference, args.kl_estimator)  # (batch_size,)
            loss = loss + args.beta * metrics["kl"]
        self._metrics.add_per_image(metrics)
        return (loss.mean(), scored) if return_outputs else loss.mean()

    def _score(self, model: torch.nn.Module, inputs: TrainingStep) -> ScoredStep:
        sigma, sigma_next = self._sigmas[inputs.step], self._sigmas[inputs.step + 1]
        with self.accelerator.autocast():
            velocity = self.policy.predict_velocity(model, inputs.latents, sigma, inputs.embeds, self._options)
        output = sde_step(
            velocity,
            inputs.latents,
            sigma,
            sigma_next,
            self.args.noise_level,
            dynamics=self.args.dynamics,
            sigma_max=self._sigmas[1] if inputs.step == 0 else None,
            next_latents=inputs.next_latents,
        )
        return ScoredStep(velocity, output.mean, output.std, output.log_probs)

    @torch.no_grad()
    def _score_reference(self, inputs: TrainingStep) -> ScoredStep:
        self._count_passes("reference", len(inputs.latents))
        self.model.disable_adapters()
        try:
            return self._score(self.model, inputs)
        finally:
            self.model.enable_adapters()
            freeze_idle_modules(self.policy)

    def _step_weight(self, step: int) -> float:
        # GRPO-Guard divides the loss by the size of the step. Relative to the mean size, it stays comparable to `beta`.
        step_sizes = self._sigmas[:-2] - self._sigmas[1:-1]  # of all but the last step
        return (step_sizes.mean() / step_sizes[step]).item()

    def _count_passes(self, kind: str, num_velocities: int) -> None:
        """Counts passes of one image through the transformer, of which guidance may take two for a velocity."""
        self._metrics.totals[f"num_{kind}_passes"] += num_velocities * self.policy.num_passes(self._options)

    def _training_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        buffer = self._buffer
        tensors, rest = ({}, None) if buffer is None or buffer.is_used_up else buffer.state()
        return tensors, {"buffer": rest, "totals": self._metrics.totals}

    def _merge_training_states(self, states: list[tuple[dict[str, torch.Tensor], dict[str, Any]]]) -> dict[str, Any]:
        num_processes = self.args.world_size
        if any(extra["buffer"] is not None for _, extra in states):
            raise ValueError(
                f"The checkpoint is from the middle of a rollout of {len(states)} processes, each with images of its own; "
                f"now there are {num_processes}. Resume with {len(states)}, or from a checkpoint at the end of a rollout."
            )
        # The counts of all processes are added up in the logs.
        totals: Counter[str] = Counter()
        for _, extra in states if self.args.process_index == 0 else states[:0]:
            totals.update(extra["totals"])
        return {"buffer": None, "totals": totals}

    def _load_training_state(self, tensors: Mapping[str, torch.Tensor], extra: dict[str, Any]) -> None:
        self._metrics.load_totals(extra["totals"])
        if extra["buffer"] is None:
            return
        args = self.args
        buffer = RolloutBuffer.from_state(tensors, extra["buffer"], args.device)
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
