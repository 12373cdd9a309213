from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from PIL.Image import Image

from ..generation.seeds import image_generator
from .config import DiffusionGRPOConfig
from .losses import ScoredStep, policy_objective, reference_kl, velocity_ratio
from .online_trainer import OnlineTrainer
from .rollout import Rollout, sample_rollout
from .runtime.activations import reusing
from .runtime.buffer import StepsBuffer, TrainingStep
from .runtime.monitoring import setup_warnings
from .sde import sde_step, sde_window


class DiffusionGRPOTrainer(OnlineTrainer):
    """
    Trainer for online reinforcement learning of text-to-image models with Group Relative Policy Optimization
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
            Dataset to use for training, with a `"prompt"` column.
        eval_dataset ([`~datasets.Dataset`], `list[dict]` or a `dict` of them, *optional*):
            Dataset to use for evaluation. It must meet the same requirements as `train_dataset`.
        eval_reward_funcs (`Callable` or `list[Callable]`, *optional*):
            Additional reward functions that only score the evaluation images and are not trained on. `eval_reward` is the
            weighted sum of the trained ones; a warning is issued if it rises while one of these falls.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            List of callbacks to customize the training loop.
        optimizers (`tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]`, *optional*, defaults to `(None, None)`):
            A tuple containing the optimizer and the scheduler to use.
        peft_config ([`~peft.LoraConfig`], *optional*):
            Adapters to train. If `None` and the transformer has none, all of its weights are trained, which requires
            `beta=0.0`.
    """

    _tag_names = ["diffusion-grpo", *OnlineTrainer._tag_names]
    _method = (
        "Trained by online reinforcement learning (GRPO with flow-SDE rollouts): the model draws groups of images, reward "
        "functions score them, and training makes the better ones more likely."
    )
    _citation = """\
@article{liu2025flowgrpo,
  title   = {{Flow-GRPO: Training Flow Matching Models via Online RL}},
  author  = {Liu, Jie and others},
  journal = {arXiv preprint arXiv:2505.05470},
  year    = {2025}
}"""
    _config_class = DiffusionGRPOConfig
    _buffer_class = StepsBuffer
    _run_suffix = "GRPO"
    _rollout_arguments = (
        *OnlineTrainer._rollout_arguments, "dynamics", "noise_level", "sde_window_size", "sde_window_range", "ratio_norm", "kl_mask",
        "bf16", "dtype", "attention_backend", "quantization_config",
    )  # fmt: skip
    _counted = (*OnlineTrainer._counted, "num_old_log_prob_passes")

    def _setup_warnings(self) -> list[str]:
        args = self.args
        return setup_warnings(
            dynamics=args.dynamics,
            noise_level=args.noise_level,
            trains_first_step=args.sde_window_range is None or args.sde_window_range[0] == 0,
            epsilon=args.epsilon,
            num_latent_elements=self.policy.prepare_latents([image_generator(args.seed)], self._options).numel(),
            num_updates_per_rollout=args.num_updates_per_rollout,
            is_ratio_corrected=args.needs_old_means,
            num_groups_per_update=self._num_groups_per_update,
        )

    @cached_property
    def _device_sigmas(self) -> torch.Tensor:
        return self._sigmas.to(self.args.device)

    def _trained_steps(self, rollout_index: int) -> tuple[int, ...]:
        """The stochastic denoising steps of a rollout."""
        args = self.args
        return sde_window(
            args.num_inference_steps,
            args.sde_window_size,
            args.sde_window_range,
            seed=args.seed,
            rollout_index=rollout_index,
        )

    def _sample(
        self,
        rollout_index: int,
        embeds: dict[str, torch.Tensor],
        generators: list[torch.Generator],
        on_batch: Callable[[int, list[Image]], None] | None,
    ) -> Rollout:
        args = self.args
        return sample_rollout(
            self.policy,
            self.model,
            embeds,
            generators,
            self._options,
            sigmas=self._sigmas,
            trained_steps=self._trained_steps(rollout_index),
            noise_level=args.noise_level,
            dynamics=args.dynamics,
            batch_size=args.sampling_batch_size,
            on_batch=on_batch,
            keep_activations=args.reuses_activations,
        )

    def _make_buffer(self, rollout_index: int, rollout: Rollout, kept: torch.Tensor, **common: Any) -> StepsBuffer:
        args = self.args
        kept = kept.to(rollout.latents.device)
        latents = rollout.latents[kept]  # (num_kept, K, image_seq_len, num_channels)
        has_old_policy = args.num_updates_per_rollout > 1
        old_log_probs = rollout.log_probs[kept]  # (num_kept, K)
        if not self._samples_as_it_trains:
            old_log_probs.fill_(torch.nan)
        self._num_unlike_rollout = torch.zeros((), dtype=torch.long, device=latents.device)
        if rollout.activations is not None and len(kept) < len(rollout.latents):
            rollout.activations.select(kept)
        return StepsBuffer(
            trained_steps=self._trained_steps(rollout_index),
            latents=latents,
            next_latents=rollout.next_latents[kept],
            old_log_probs=old_log_probs if has_old_policy else None,
            old_means=torch.full_like(latents, torch.nan) if has_old_policy and args.needs_old_means else None,
            activations=rollout.activations,
            **common,
        )

    @property
    def _samples_as_it_trains(self) -> bool:
        """
        Whether a rollout's log-probs can equal those of training bit for bit: all batches of both have the same number of
        images, all of one prompt, and use the same kernels.
        """
        args = self.args
        return (
            args.sampling_batch_size == args.per_device_train_batch_size
            and args.num_drawn % args.sampling_batch_size == 0
            and args.num_kept % args.sampling_batch_size == 0
            and not args.torch_compile
            and not args.needs_old_means  # a rollout does not keep them
        )

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        buffer = self._buffer
        assert isinstance(buffer, StepsBuffer)
        if buffer.position >= buffer.num_batches_on_policy:
            buffer.activations = None
        is_last_on_policy = buffer.position == buffer.num_batches_on_policy < buffer.num_batches
        # If training has reproduced every log-prob of the rollout so far, the others hold, too.
        if is_last_on_policy and self.accelerator.gather(self._num_unlike_rollout).sum() > 0:
            self._score_old_policy(buffer)
        return loss

    def _score_old_policy(self, buffer: StepsBuffer) -> None:
        """Scores, in the same batches, what will be trained on after the policy has changed."""
        # Without gradients, compiled blocks use another graph than in training, whose bfloat16 rounding differs by more than `epsilon`.
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
        with reusing(inputs.block_outputs):
            scored = self._score(model, inputs)
        # forward, unless the rollout's is reused, a second time with checkpointing, and backward
        num_passes = 3 if args.gradient_checkpointing and inputs.block_outputs is None else 2
        self._count_passes("policy", num_passes * len(inputs.latents))

        old_log_probs, old_mean = inputs.old_log_probs, inputs.old_mean
        if inputs.is_on_policy:
            # The policy is the old policy: the ratio is exactly 1
            old_log_probs, old_mean = scored.log_probs.detach(), scored.mean.detach()
            if inputs.old_log_probs is not None:
                self._num_unlike_rollout += (inputs.old_log_probs != old_log_probs).sum()
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
            metrics["velocity_ratio"] = velocity_ratio(scored.velocity, reference.velocity)
            loss = loss + args.beta * metrics["kl"]
        self._metrics.add_per_image(metrics)
        return (loss.mean(), scored) if return_outputs else loss.mean()

    def _score(self, model: torch.nn.Module, inputs: TrainingStep) -> ScoredStep:
        sigma, sigma_next = self._sigmas[inputs.step], self._sigmas[inputs.step + 1]
        with self.accelerator.autocast():
            velocity = self.policy.predict_velocity(
                model, inputs.latents, self._device_sigmas[inputs.step], inputs.embeds, self._options
            )
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

    def _score_reference(self, inputs: TrainingStep) -> ScoredStep:
        self._count_passes("reference", len(inputs.latents))
        with self._reference_policy():
            return self._score(self.model, inputs)

    def _step_weight(self, step: int) -> float:
        # GRPO-Guard divides the loss by the step size. Taken relative to the mean, it stays comparable to `beta`.
        step_sizes = self._sigmas[:-2] - self._sigmas[1:-1]  # of all but the last step
        return (step_sizes.mean() / step_sizes[step]).item()

    def _card_settings(self) -> dict[str, Any]:
        args, window = self.args, None
        if args.sde_window_size is not None:
            window = f"{args.sde_window_size} of {args.sde_window_range or 'the first half'}"
        return super()._card_settings() | {
            "trained steps": window,
            "dynamics": args.dynamics,
            "noise level": args.noise_level,
            "clip range": args.epsilon,
        }
