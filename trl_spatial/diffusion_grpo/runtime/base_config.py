"""The settings shared by all trainers of text-to-image models."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from ...training.run_folder import check_arguments


BELOW_1 = math.nextafter(1, 0)
Ranges = dict[str, tuple[float, float, str | None]]


def option(default: Any, text: str, choices: Sequence[str] | None = None) -> Any:
    """A field of a configuration with its help text."""
    return field(default=default, metadata={"help": text} | ({} if choices is None else {"choices": list(choices)}))


@dataclass
class DiffusionConfig(TrainingArguments):
    r"""
    Configuration class for a [`~runtime.base_trainer.DiffusionTrainer`]: the parameters of any training of a text-to-image model.

    This class includes only the parameters that are specific to it. For a full list of training arguments, please refer
    to the [`~transformers.TrainingArguments`] documentation. Note that default values in this class may differ from those.

    Parameters:
        > Parameters that control the images

        guidance_scale (`float`, *optional*, defaults to `3.5`):
            Guidance scale, the same in rollout, training and evaluation; its kind depends on the model family. FLUX.1-dev
            takes it as an input. For Stable Diffusion 3 and Qwen-Image, whose pipeline calls it `true_cfg_scale`, it is
            the scale of classifier-free guidance: above 1, every velocity takes two passes through the transformer;
            `1.0` means no guidance. The same holds for Z-Image, except that in its pipeline `0.0` means no guidance. The negative
            prompt is the family's `default_negative_prompt`: a space for Qwen-Image, otherwise the empty prompt.
        height (`int`, *optional*, defaults to `512`):
            Height of the images in training, in pixels.
        width (`int`, *optional*, defaults to `512`):
            Width of the images in training, in pixels.
        max_sequence_length (`int`, *optional*, defaults to `512`):
            Maximum number of tokens in a prompt; a longer one is an error. FLUX.1 and Stable Diffusion 3 pad every prompt to
            this length and attend to the padding.

        > Parameters that control the loss

        beta (`float`, *optional*, defaults to `0.01`):
            KL coefficient. The reference policy is the transformer without its adapters. If `0.0`, it is not evaluated. The
            divergence is a mean over latent elements; its units depend on the trainer (for GRPO, see `kl_estimator`).

        > Parameters that control the weights that are evaluated and exported

        ema_decay (`float`, *optional*, defaults to `0.9`):
            Decay of the exponential moving average of the trained weights; the average is evaluated and exported.
            If `0.0`, the trained weights themselves are.
        ema_steps (`int`, *optional*, defaults to `8`):
            Number of updates between two updates of the average. Before the first one, the trained weights themselves are
            evaluated and exported.

        > Parameters that control the evaluation

        eval_num_inference_steps (`int`, *optional*, defaults to `28`):
            Number of denoising steps in evaluation, which samples without noise.
        eval_height (`int`, *optional*):
            Height of the images in evaluation. If `None`, it defaults to `height`; the paper evaluates at 1024.
        eval_width (`int`, *optional*):
            Width of the images in evaluation. If `None`, it defaults to `width`.

    > [!NOTE]
    > These parameters have default values different from [`~transformers.TrainingArguments`]:
    > - `learning_rate`: Defaults to `3e-4`, the paper's value for LoRA, instead of `5e-5`. For full fine-tuning use `1e-5`.
    > - `lr_scheduler_type`: Defaults to `"constant"` instead of `"linear"`.
    > - `weight_decay`: Defaults to `1e-4` instead of `0.0`.
    > - `per_device_train_batch_size`: Defaults to `4` and `gradient_accumulation_steps` to `24` instead of `8` and `1`:
    >   when training on rewards with the other defaults, eight prompts per device and update.
    > - `logging_steps`: Defaults to `1` instead of `500`, as an update takes long.
    > - `logging_nan_inf_filter`: Defaults to `False` instead of `True`. A loss that is not a number is logged.
    > - `remove_unused_columns`: Defaults to `False` instead of `True`, as the columns are passed to reward functions.
    > - `metric_for_best_model`: Defaults to `"reward"`. The best checkpoint is saved and kept even if `save_steps` and
    >   `save_total_limit` would not.
    > - `gradient_checkpointing`: Defaults to `True` instead of `False`. It costs most of a forward pass for every
    >   trained step (two thirds of one for FLUX.1, nearly 3 passes instead of 2), but without it FLUX.1 with several images does
    >   not fit in 80 GB.
    > - `bf16`: Defaults to `True` if the GPU supports it, else to `False`, so that training also starts on a CPU.
    > - `ddp_find_unused_parameters`: Defaults to `False`.
    >
    > `torch_compile`, with its backend and mode, compiles the transformer's repeated blocks, each kind once per size and
    > training mode. Anything that cannot be compiled is an error. Evaluation runs the blocks uncompiled.
    >
    > To change how the pipeline's models run, configure the pipeline before passing it: `pipeline.vae.enable_slicing()`,
    > `pipeline.vae.enable_tiling()`, `pipeline.transformer.set_attention_backend(...)`; `trl_spatial grpo` has options for
    > these. Image grids are saved in `output_dir/images` for every evaluation and, if training draws images,
    > for every tenth rollout, unless `logging_strategy` is `"no"`.
    """

    # Keys of `gradient_checkpointing_kwargs`
    _checkpointing_options: ClassVar[tuple[str, ...]] = ()
    # Smallest and largest value of a field, and the advice in its error, if other than "at least" the smallest
    _ranges: ClassVar[Ranges] = {
        **dict.fromkeys(("height", "width", "eval_height", "eval_width"), (1, math.inf, None)),
        **dict.fromkeys(("eval_num_inference_steps", "max_sequence_length", "ema_steps"), (1, math.inf, None)),
        "ema_decay": (0, BELOW_1, "0 (no average) or a number between 0 and 1"),
        "guidance_scale": (0, 1e3, "a number from 0 to 1000"),
        "beta": (0, 1e6, "a number from 0 (no reference policy) to 1e6"),
        # the optimizer's: beyond these, weights become infinite or move the wrong way
        "learning_rate": (0, 1, "a number from 0 to 1; 3e-4 for LoRA and 1e-5 for all weights are common"),
        **dict.fromkeys(("adam_beta1", "adam_beta2"), (0, BELOW_1, "a number from 0 up to, not including, 1")),
        "adam_epsilon": (1e-30, 1, "a positive number up to 1, such as 1e-8"),
        "weight_decay": (0, 1, "a number from 0 to 1"),
        "max_grad_norm": (0, 1e6, "a number from 0 (no clipping) to 1e6"),
    }

    # Parameters whose default values are overridden from TrainingArguments
    learning_rate: float = option(3e-4, "The initial learning rate for AdamW.")
    lr_scheduler_type: str = option("constant", "The scheduler type to use.")
    weight_decay: float = option(1e-4, "Weight decay for AdamW.")
    per_device_train_batch_size: int = option(4, "Number of kept images per device and forward pass in training.")
    gradient_accumulation_steps: int = option(24, "Number of forward passes per trained denoising step and update.")
    logging_steps: float = option(1, "Log every X updates steps. If smaller than 1, the share of all steps.")
    logging_nan_inf_filter: bool = option(False, "Whether to leave losses that are not a number out of the logs.")
    remove_unused_columns: bool = option(
        False, "Whether to keep only the column 'prompt'. By default, all columns are passed to reward functions."
    )
    metric_for_best_model: str | None = option(
        "reward", "The evaluation metric that decides which checkpoint is best."
    )
    gradient_checkpointing: bool | None = option(
        True, "Whether to recompute activations in the backward pass instead of storing them."
    )
    bf16: bool | None = option(
        None, "Whether to use bf16 mixed precision. If not set, it is used if the GPU supports it."
    )
    ddp_find_unused_parameters: bool | None = option(
        False, "Whether DistributedDataParallel looks for parameters without a gradient."
    )

    # Parameters that control the images
    guidance_scale: float = option(
        3.5,
        "Guidance scale, the same in rollout, training and evaluation: an input of FLUX.1-dev, the scale of classifier-free "
        "guidance for the other families (`1.0`, for Z-Image `0.0`, means none; above that, it takes twice the passes "
        "through the transformer).",
    )
    height: int = option(512, "Height of the images in training, in pixels.")
    width: int = option(512, "Width of the images in training, in pixels.")
    max_sequence_length: int = option(
        512, "Maximum number of tokens in a prompt; some families pad to it. A longer prompt is an error."
    )

    # Parameters that control the loss
    beta: float = option(0.01, "KL coefficient. If `0.0`, the reference policy is not evaluated.")

    # Parameters that control the weights that are evaluated and exported
    ema_decay: float = option(0.9, "Decay of the moving average of the trained weights. `0.0` means no average.")
    ema_steps: int = option(8, "Number of updates between two updates of the average.")

    # Parameters that control the evaluation
    eval_num_inference_steps: int = option(28, "Number of denoising steps in evaluation.")
    eval_height: int | None = option(None, "Height of the images in evaluation. If `None`, it defaults to `height`.")
    eval_width: int | None = option(None, "Width of the images in evaluation. If `None`, it defaults to `width`.")

    def __post_init__(self):
        self.is_bf16_default = self.bf16 is None
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        # Newer transformers rename the option and warn about the old name, which has a default above.
        if "activation_checkpointing" in [f.name for f in fields(self)] and self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
            if self.activation_checkpointing_kwargs is None:
                self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        if self.deepspeed is not None:
            raise ValueError(
                f"`deepspeed` is {self.deepspeed!r}, but diffusion models are not trained with DeepSpeed here. Leave it out, and "
                "shard the weights with `--accelerate_config recipes/accelerate/fsdp2.yaml`."
            )
        # The parent would have Accelerate compile the whole model; `prepare_transformer` compiles its blocks.
        backend, mode = self.torch_compile_backend, self.torch_compile_mode
        is_compiled = self.torch_compile or backend is not None or mode is not None
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = False, None, None
        super().__post_init__()
        self.torch_compile, self.torch_compile_backend, self.torch_compile_mode = is_compiled, backend, mode
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # or PyTorch warns that there is no accelerator to pin memory for
        self._check_fields()

    @property
    def sampling_batch_size(self) -> int:
        """Number of images that a device samples at a time, at the training size: as many as it trains on."""
        return self.per_device_train_batch_size

    @property
    def eval_sampling_batch_size(self) -> int:
        """
        Number of images that a device samples at a time in evaluation: `per_device_eval_batch_size`, or fewer if they would have
        more pixels than a batch of `sampling_batch_size` in training, and thus need more memory; at least one.
        """
        num_pixels = (self.eval_height or self.height) * (self.eval_width or self.width)
        affordable = self.sampling_batch_size * self.height * self.width // num_pixels
        return max(1, min(self.per_device_eval_batch_size, affordable))

    def _check_fields(self):
        """Raises an error for invalid values or combinations of values. Subclasses add their own checks."""
        for name, (low, high, advice) in self._ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # also true of NaN
                raise ValueError(f"`{name}` is {value}. Use {advice or f'at least {low}'}.")
        for own in fields(self):
            choices = own.metadata.get("choices")
            if own.name in TrainingArguments.__dataclass_fields__ or choices is None:
                continue
            if (value := getattr(self, own.name)) not in choices:
                raise ValueError(f"`{own.name}` is {value!r}. Use one of {', '.join(map(repr, choices))}.")
        check_arguments(self)
        reasons = {
            "fp16": "its range is too small for the gradients of a mean over latents. Use `bf16`",
            "auto_find_batch_size": "the batch size determines what an update consists of. Set "
            "`per_device_train_batch_size`",
            "label_smoothing_factor": "there are no labels. Leave it 0",
        }
        for name, reason in reasons.items():
            if getattr(self, name):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, but {reason}.")
        self._check_checkpointing()

    def _check_checkpointing(self) -> None:
        options, known = self.gradient_checkpointing_kwargs, self._checkpointing_options
        if not options:
            return
        is_known = isinstance(options, dict) and options.keys() <= set(known)
        if not is_known or not all(isinstance(value, bool) for value in options.values()):
            advice = "diffusers has only one kind of checkpointing. Leave it `None`"
            if known:
                advice = f"it can only be {{'{known[0]}': True}}, or `None`"
            raise ValueError(f"`gradient_checkpointing_kwargs` is {options!r}, but {advice}.")
