import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from ..training.run_folder import check_arguments
from .sde import DYNAMICS, sde_window


# Fields with a fixed set of values
_CHOICES = {
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "advantage_scope": ("kept", "group"),
    "dynamics": DYNAMICS,
    "kl_estimator": ("exact", "velocity"),
}
# Smallest and largest value of a field; what an error advises, if not "at least" the smallest
_BELOW_1 = math.nextafter(1, 0)
_RANGES: dict[str, tuple[float, float, str | None]] = {
    **dict.fromkeys(("num_generations", "num_inference_steps"), (2, math.inf, None)),  # the last step is not trained
    **dict.fromkeys(("num_iterations", "steps_per_generation", "rollout_batch_size"), (1, math.inf, None)),
    **dict.fromkeys(("height", "width", "eval_height", "eval_width"), (1, math.inf, None)),
    **dict.fromkeys(("eval_num_inference_steps", "max_sequence_length", "ema_steps"), (1, math.inf, None)),
    **dict.fromkeys(("epsilon", "epsilon_high", "kl_mask"), (1e-12, 1e6, "a positive number, such as 1e-5 or 1e-4")),
    "ema_decay": (0, _BELOW_1, "0 (no average) or a number between 0 and 1"),
    "guidance_scale": (0, 1e3, "a number from 0 to 1000"),
    "beta": (0, 1e6, "a number from 0 (no reference policy) to 1e6"),
    # of the optimizer: beyond these, weights become infinite or move the wrong way
    "learning_rate": (0, 1, "a number from 0 to 1; 3e-4 for LoRA and 1e-5 for all weights are common"),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, _BELOW_1, "a number from 0 up to, not including, 1")),
    "adam_epsilon": (1e-30, 1, "a positive number up to 1, such as 1e-8"),
    "weight_decay": (0, 1, "a number from 0 to 1"),
    "max_grad_norm": (0, 1e6, "a number from 0 (no clipping) to 1e6"),
}


def _option(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    return field(default=default, metadata={"help": text} | ({} if choices is None else {"choices": list(choices)}))


@dataclass
class DiffusionGRPOConfig(TrainingArguments):
    r"""
    Configuration class for the [`DiffusionGRPOTrainer`].

    This class includes only the parameters that are specific to GRPO training of a text-to-image model. For a full
    list of training arguments, please refer to the [`~transformers.TrainingArguments`] documentation. Note that
    default values in this class may differ from those: they are those of [Enhancing Spatial Understanding in Image
    Generation via Reward Modeling](https://huggingface.co/papers/2602.24233) and, where it is silent, of
    [Flow-GRPO](https://huggingface.co/papers/2505.05470).

    Sizes: a forward pass of training takes `per_device_train_batch_size` kept images at one denoising step. A rollout
    samples `per_device_train_batch_size * steps_per_generation / num_kept` prompts per device, `num_generations`
    images each, of which `num_kept`, `2 * top_k` or all, are trained on.

    Parameters:
        > Parameters that control the rollout

        num_generations (`int`, *optional*, defaults to `24`):
            Number of images per prompt, the size of a group.
        steps_per_generation (`int`, *optional*):
            Number of forward passes per trained denoising step over which the kept images of a rollout are spread, a
            multiple of `gradient_accumulation_steps`. If `None`, it defaults to `gradient_accumulation_steps`: one
            update per rollout.
        rollout_batch_size (`int`, *optional*):
            Number of images that a device samples at once. If `None`, `per_device_train_batch_size`.
        num_inference_steps (`int`, *optional*, defaults to `6`):
            Number of denoising steps in training.
        guidance_scale (`float`, *optional*, defaults to `3.5`):
            Guidance, the same in rollout, training and evaluation, of the kind that the model family has. FLUX.1-dev
            takes it as an input. For Stable Diffusion 3 and Qwen-Image, whose pipeline calls it `true_cfg_scale`, it is
            the scale of classifier-free guidance: above 1 every velocity takes two passes through the transformer, and
            `1.0` means no guidance. So it is for Z-Image, but as its pipeline counts: `0.0` means no guidance. It leads away
            from the family's `default_negative_prompt`: a blank for Qwen-Image, else the empty prompt.
        height (`int`, *optional*, defaults to `512`):
            Height of the images in training, in pixels.
        width (`int`, *optional*, defaults to `512`):
            Width of the images in training, in pixels.
        max_sequence_length (`int`, *optional*, defaults to `512`):
            The most tokens a prompt may have; a longer one is an error. FLUX.1 and Stable Diffusion 3 pad every prompt to
            as many, and see the padding.
        dynamics (`str`, *optional*, defaults to `"flow_sde"`):
            How noise is added to a denoising step: `"flow_sde"` ([Flow-GRPO](https://huggingface.co/papers/2505.05470)),
            `"dance_sde"` ([DanceGRPO](https://huggingface.co/papers/2505.07818)), `"cps"` ([Coefficients-preserving
            sampling](https://huggingface.co/papers/2509.05952)) or `"precise"`
            ([Precise](https://huggingface.co/papers/2605.23522)). The last two leave no excess noise in the image.
        noise_level (`float`, *optional*, defaults to `0.9`):
            How much noise a step gets. Usual values are 0.7 … 0.9 for `"flow_sde"`, 0.3 for `"dance_sde"`, 0.8 (at
            most 1) for `"cps"`, 1.5 for `"precise"`.
        sde_window_size (`int`, *optional*):
            Number of consecutive steps that are stochastic and trained; the others are plain ODE steps and cost no
            training. If `None`, all but the last step.
        sde_window_range (`list[int]`, *optional*):
            The steps `[first, last_exclusive]` within which the window lies. It is drawn for every rollout, the same
            for all prompts and devices. If `None`, the first half of the steps.

        > Parameters that control the rewards and advantages

        top_k (`int`, *optional*, defaults to `6`):
            Only the `top_k` best and the `top_k` worst images of a group are trained on. If `None`, all are.
        advantage_scope (`str`, *optional*, defaults to `"kept"`):
            Over which images of a group mean and std of the rewards are computed: the `"kept"` ones, as in the paper,
            or the whole `"group"`, as in DanceGRPO.
        reward_weights (`list[float]`, *optional*):
            Weights for each reward function. Must match the number of reward functions. If `None`, all rewards are
            weighted equally with weight `1.0`. Images that lack a reward which others of their group have are not learnt
            from, see [`~advantages.combine_rewards`].
        scale_rewards (`str`, *optional*, defaults to `"group"`):
            By what the centred rewards are divided: the std of their `"group"`, of the `"batch"`, or nothing, `"none"`.
        multi_objective_aggregation (`str`, *optional*, defaults to `"sum_then_normalize"`):
            What to do with several rewards: `"sum_then_normalize"` makes one reward of them first;
            `"normalize_then_sum"` makes advantages of each, so that a hard reward is not stalled by an easy one.
        overlap_rewards (`bool`, *optional*, defaults to `False`):
            Whether the images of a batch are rewarded, in a thread, while the next batch of the rollout is drawn. It
            helps if rewards are computed elsewhere: by a server, on another device or on the CPU. A function is then
            called once per `rollout_batch_size` images instead of once per rollout, so an image's reward must not depend
            on the images beside it. `time/reward` is the time that the rollout waits for its rewards.

        > Parameters that control the loss

        num_iterations (`int`, *optional*, defaults to `1`):
            Number of times that every kept image is trained on (denoted as μ in the algorithm).
        epsilon (`float`, *optional*, defaults to `1e-4`):
            Epsilon value for clipping; far smaller than for language models, as log-probs are means over latent elements.
        epsilon_high (`float`, *optional*):
            Upper-bound epsilon value for clipping. If `None`, it defaults to `epsilon`.
        ratio_norm (`bool`, *optional*, defaults to `False`):
            Whether the negative bias of the log ratio is added back, and the denoising steps get equal weight
            ([GRPO-Guard](https://huggingface.co/papers/2510.22319)). Without it the upper clip almost never fires
            after the first update of a rollout.
        kl_mask (`float`, *optional*):
            Instead of clipping, drop the terms of which the policy has moved further than this KL divergence from the
            old one, and would move further still ([Flow-DPPO](https://huggingface.co/papers/2606.11025); 1e-5 there).
            If `None`, ratios are clipped.
        beta (`float`, *optional*, defaults to `0.01`):
            KL coefficient. The reference policy is the transformer without its adapters. If `0.0`, it is not scored.
        kl_estimator (`str`, *optional*, defaults to `"exact"`):
            `"exact"`: KL divergence of the Gaussians of a step; `"velocity"`: mean squared difference of the
            velocities, which does not depend on the sampler.

        > Parameters that control the weights that are evaluated and exported

        ema_decay (`float`, *optional*, defaults to `0.9`):
            Decay of the exponential moving average of the trained weights, which is what is evaluated and exported.
            If `0.0`, those are the trained weights themselves.
        ema_steps (`int`, *optional*, defaults to `8`):
            Number of updates between two updates of the average.

        > Parameters that control the evaluation

        eval_num_inference_steps (`int`, *optional*, defaults to `28`):
            Number of denoising steps in evaluation, which samples without noise.
        eval_height (`int`, *optional*):
            Height of the images in evaluation. If `None`, it defaults to `height`; the paper evaluates at 1024.
        eval_width (`int`, *optional*):
            Width of the images in evaluation. If `None`, it defaults to `width`.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `learning_rate`: Defaults to `3e-4` instead of `5e-5`, the paper's, for LoRA. For full fine-tuning use `1e-5`.
    > - `lr_scheduler_type`: Defaults to `"constant"` instead of `"linear"`.
    > - `weight_decay`: Defaults to `1e-4` instead of `0.0`.
    > - `per_device_train_batch_size`: Defaults to `4` and `gradient_accumulation_steps` to `24` instead of `8` and `1`:
    >   with the defaults above eight prompts per device and update.
    > - `logging_steps`: Defaults to `1` instead of `500`, as an update takes long.
    > - `logging_nan_inf_filter`: Defaults to `False` instead of `True`. A loss that is not a number is shown.
    > - `remove_unused_columns`: Defaults to `False` instead of `True`, as reward functions get the columns.
    > - `metric_for_best_model`: Defaults to `"reward"`. The best checkpoint is saved and kept even if `save_steps` and
    >   `save_total_limit` would not.
    > - `gradient_checkpointing`: Defaults to `True` instead of `False`. It costs a forward pass for every trained step
    >   (3 passes instead of 2), but FLUX.1 does not fit in 80 GB with several images otherwise.
    > - `bf16`: Defaults to `True` if the GPU supports it, else to `False`, so that training also starts on a CPU.
    > - `ddp_find_unused_parameters`: Defaults to `False`.
    >
    > `torch_compile`, with its backend and mode, compiles the transformer's repeated blocks, each kind once.
    >
    > How the pipeline's models run is set on the pipeline that the trainer gets: `pipeline.vae.enable_slicing()`,
    > `pipeline.vae.enable_tiling()`, `pipeline.transformer.set_attention_backend(...)`; `trl_spatial grpo` has options for
    > these. Grids of images are saved in `output_dir/images`, of every tenth rollout and of every evaluation, unless
    > `logging_strategy` is `"no"`.
    """

    # Parameters whose default values are overridden from TrainingArguments
    learning_rate: float = _option(3e-4, "The initial learning rate for AdamW.")
    lr_scheduler_type: str = _option("constant", "The scheduler type to use.")
    weight_decay: float = _option(1e-4, "Weight decay for AdamW.")
    per_device_train_batch_size: int = _option(4, "Number of kept images per device and forward pass in training.")
    gradient_accumulation_steps: int = _option(24, "Number of forward passes per trained denoising step and update.")
    logging_steps: float = _option(1, "Log every X updates steps. If smaller than 1, the share of all steps.")
    logging_nan_inf_filter: bool = _option(False, "Whether to leave losses that are not a number out of the logs.")
    remove_unused_columns: bool = _option(
        False, "Whether to keep only the column 'prompt'. Reward functions get the columns."
    )
    metric_for_best_model: str | None = _option(
        "reward", "The metric of evaluation by which the best checkpoint is chosen."
    )
    gradient_checkpointing: bool | None = _option(
        True, "Whether to recompute activations in the backward pass instead of storing them."
    )
    bf16: bool | None = _option(None, "Whether to use bf16 mixed precision. If not set, when the GPU supports it.")
    ddp_find_unused_parameters: bool | None = _option(
        False, "Whether DistributedDataParallel looks for parameters without gradient."
    )

    # Parameters that control the rollout
    num_generations: int = _option(24, "Number of images per prompt, the size of a group.")
    steps_per_generation: int | None = _option(
        None,
        "Number of forward passes per trained denoising step over which the kept images of a rollout are spread. If "
        "`None`, it defaults to `gradient_accumulation_steps`.",
    )
    rollout_batch_size: int | None = _option(
        None,
        "Number of images that a device samples at once. If `None`, it defaults to `per_device_train_batch_size`.",
    )
    num_inference_steps: int = _option(6, "Number of denoising steps in training.")
    guidance_scale: float = _option(
        3.5,
        "Guidance, the same in rollout, training and evaluation: an input of FLUX.1-dev, the scale of classifier-free "
        "guidance of the other families (`1.0`, for Z-Image `0.0`, means none; above, twice the passes through the "
        "transformer).",
    )
    height: int = _option(512, "Height of the images in training, in pixels.")
    width: int = _option(512, "Width of the images in training, in pixels.")
    max_sequence_length: int = _option(
        512, "The most tokens a prompt may have, and what some families pad to. A longer one is an error."
    )
    dynamics: str = _option("flow_sde", "How noise is added to a denoising step.", _CHOICES["dynamics"])
    noise_level: float = _option(0.9, "How much noise a denoising step gets.")
    sde_window_size: int | None = _option(
        None, "Number of consecutive steps that are stochastic and trained. If `None`, all but the last step."
    )
    sde_window_range: list[int] | None = field(
        default=None,
        metadata={
            "help": "The steps `first last_exclusive` within which the window lies. If `None`, the first half of the steps."
        },
    )

    # Parameters that control the rewards and advantages
    top_k: int | None = _option(
        6, "Only the `top_k` best and the `top_k` worst images of a group are trained on. If `None`, all are."
    )
    advantage_scope: str = _option(
        "kept", "Over which images of a group mean and std of the rewards are computed.", _CHOICES["advantage_scope"]
    )
    reward_weights: list[float] | None = field(
        default=None,
        metadata={"help": "Weights for each reward function. If `None`, all rewards are weighted equally."},
    )
    scale_rewards: str = _option(
        "group",
        "By what the centred rewards are divided: the std of their group, of the batch, or nothing.",
        _CHOICES["scale_rewards"],
    )
    multi_objective_aggregation: str = _option(
        "sum_then_normalize",
        "Whether several rewards are summed before or after they are normalised.",
        _CHOICES["multi_objective_aggregation"],
    )
    overlap_rewards: bool = _option(
        False,
        "Whether images are rewarded while the next batch of the rollout is drawn: for rewards of a server, of another"
        " device or of the CPU.",
    )

    # Parameters that control the loss
    num_iterations: int = _option(1, "Number of times that every kept image is trained on (μ in the algorithm).")
    epsilon: float = _option(1e-4, "Epsilon value for clipping.")
    epsilon_high: float | None = _option(
        None, "Upper-bound epsilon value for clipping. If not specified, it defaults to `epsilon`."
    )
    ratio_norm: bool = _option(False, "Whether the negative bias of the log ratio is added back (GRPO-Guard).")
    kl_mask: float | None = _option(
        None,
        "Instead of clipping, drop terms that moved further than this KL divergence and move further away (Flow-DPPO).",
    )
    beta: float = _option(0.01, "KL coefficient. If `0.0`, the reference policy is not scored.")
    kl_estimator: str = _option(
        "exact",
        "KL divergence of the Gaussians of a step, or mean squared difference of the velocities.",
        _CHOICES["kl_estimator"],
    )

    # Parameters that control the weights that are evaluated and exported
    ema_decay: float = _option(0.9, "Decay of the moving average of the trained weights. `0.0` means no average.")
    ema_steps: int = _option(8, "Number of updates between two updates of the average.")

    # Parameters that control the evaluation
    eval_num_inference_steps: int = _option(28, "Number of denoising steps in evaluation.")
    eval_height: int | None = _option(None, "Height of the images in evaluation. If `None`, it defaults to `height`.")
    eval_width: int | None = _option(None, "Width of the images in evaluation. If `None`, it defaults to `width`.")

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        # Newer transformers rename the option and warn about the old name, which has a default above.
        if "activation_checkpointing" in [f.name for f in fields(self)] and self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
        # The parent has Accelerate compile the whole model; ours are compiled by `prepare_transformer`.
        backend, mode = self.torch_compile_backend, self.torch_compile_mode
        is_compiled = self.torch_compile or backend is not None or mode is not None
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None
        super().__post_init__()
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = is_compiled, backend, mode
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # PyTorch warns: there is nothing to pin for
        self._check_numbers()
        self._check_batch_sizes()
        self._check_sampling_fields()
        self._check_choices()
        self._check_unsupported_fields()

    @property
    def num_batches_per_rollout(self) -> int:
        """Number of training batches of a rollout: `steps_per_generation`, or what it defaults to."""
        if self.steps_per_generation is None:
            return self.gradient_accumulation_steps
        return self.steps_per_generation

    @property
    def sampling_batch_size(self) -> int:
        """Number of images that a device samples at once: `rollout_batch_size`, or what it defaults to."""
        return self.per_device_train_batch_size if self.rollout_batch_size is None else self.rollout_batch_size

    @property
    def num_kept(self) -> int:
        """Number of images of a group that are trained on."""
        return self.num_generations if self.top_k is None else 2 * self.top_k

    @property
    def num_prompts_per_device(self) -> int:
        """Number of prompts that a device samples in a rollout."""
        return self.per_device_train_batch_size * self.num_batches_per_rollout // self.num_kept

    @property
    def num_prompts(self) -> int:
        """Number of prompts of a rollout, of all processes."""
        return self.num_prompts_per_device * self.world_size

    @property
    def num_updates_per_rollout(self) -> int:
        """Number of updates of the policy between two rollouts."""
        return self.num_batches_per_rollout // self.gradient_accumulation_steps * self.num_iterations

    @property
    def needs_old_means(self) -> bool:
        """Whether the loss needs the means of the old policy beside its log-probs."""
        return self.ratio_norm or self.kl_mask is not None

    def _check_choices(self):
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}. Use one of {', '.join(map(repr, choices))}.")
        if self.ratio_norm and self.kl_mask is not None:
            raise ValueError(
                f"`ratio_norm` is {self.ratio_norm} and `kl_mask` is {self.kl_mask}. One corrects the ratio for the "
                "clip, the other replaces the clip: use one of them."
            )

    def _check_numbers(self):
        for name, (low, high, advice) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # also true of NaN
                raise ValueError(f"`{name}` is {value}. Use {advice or f'at least {low}'}.")
        weights = self.reward_weights or []
        if not all(math.isfinite(weight) for weight in weights) or (weights and not any(weights)):
            raise ValueError(
                f"`reward_weights` is {weights}. Use one finite number for each reward function, not all of them 0."
            )
        if self.top_k is not None and not 1 <= self.top_k <= self.num_generations // 2:
            raise ValueError(
                f"`top_k` is {self.top_k} and `num_generations` is {self.num_generations}. Use `top_k` between 1 and "
                f"{self.num_generations // 2}, half of a group, or `None` to train on all images."
            )

    def _check_sampling_fields(self):
        highest = 1 if self.dynamics == "cps" else 10
        if not 0 < self.noise_level <= highest:
            raise ValueError(
                f"`noise_level` is {self.noise_level} with `dynamics` {self.dynamics!r}. Use a number above 0, without "
                f"which there is no policy gradient, and at most {highest}."
            )
        if self.sde_window_size is None:
            if self.sde_window_range is not None:
                raise ValueError(
                    f"`sde_window_range` is {self.sde_window_range} but `sde_window_size` is None. Set the size of "
                    "the window, such as 2, or leave both `None` to train all steps but the last."
                )
            return
        try:
            sde_window(
                self.num_inference_steps, self.sde_window_size, self.sde_window_range, seed=self.seed, rollout_index=0
            )
        except ValueError as error:
            raise ValueError(
                f"`sde_window_size` is {self.sde_window_size} and `sde_window_range` is {self.sde_window_range} with "
                f"`num_inference_steps` {self.num_inference_steps}. {error}"
            ) from None

    def _check_batch_sizes(self):
        # Smallest step by which `gradient_accumulation_steps` can change for whole groups to come out
        whole = self.num_kept // math.gcd(self.num_kept, self.per_device_train_batch_size)
        num_batches, name = self.num_batches_per_rollout, "gradient_accumulation_steps"
        if num_batches != self.gradient_accumulation_steps:
            name, whole = "steps_per_generation", math.lcm(whole, self.gradient_accumulation_steps)
            if num_batches % self.gradient_accumulation_steps:
                raise ValueError(
                    f"`steps_per_generation` is {num_batches} and `gradient_accumulation_steps` is "
                    f"{self.gradient_accumulation_steps}. Use a multiple of it, so that a rollout is a whole number "
                    f"of updates: {_nearest_multiples(num_batches, whole)}."
                )
        if self.per_device_train_batch_size * num_batches % self.num_kept:
            raise ValueError(
                f"`{name}` is {num_batches} and `per_device_train_batch_size` is {self.per_device_train_batch_size}: a "
                f"rollout would be {self.per_device_train_batch_size * num_batches} kept images per device, which is not "
                f"a whole number of groups of {self.num_kept} kept images. Use `{name}` "
                f"{_nearest_multiples(num_batches, whole)}, or change `per_device_train_batch_size`, "
                "`num_generations` or `top_k`."
            )

    def _check_unsupported_fields(self):
        check_arguments(self)
        reasons = {
            "fp16": "its range is too small for the gradients of a mean over latents. Use `bf16`",
            "auto_find_batch_size": "the batch size decides how many prompts a rollout has. Set "
            "`per_device_train_batch_size`",
            "gradient_checkpointing_kwargs": "diffusers has one kind of checkpointing. Leave it `None`",
            "label_smoothing_factor": "there are no labels. Leave it 0",
        }
        for name, reason in reasons.items():
            if getattr(self, name):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, but {reason}.")


def _nearest_multiples(value: int, of: int) -> str:
    below, above = value // of * of, -(-value // of) * of
    return f"{below} or {above}" if below and below != above else f"{above}"
