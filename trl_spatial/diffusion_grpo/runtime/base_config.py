"""The settings that every training of a text-to-image model has."""

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
    Configuration class for a [`~runtime.base_trainer.DiffusionTrainer`]: what all trainings of a text-to-image model have.

    This class includes only the parameters that are specific to these. For a full list of training arguments, please refer
    to the [`~transformers.TrainingArguments`] documentation. Note that default values in this class may differ from those.

    Parameters:
        > Parameters that control the images

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

        > Parameters that control the loss

        beta (`float`, *optional*, defaults to `0.01`):
            KL coefficient. The reference policy is the transformer without its adapters. If `0.0`, it is not scored. A
            divergence is a mean over latent elements; in which units, each trainer says (for GRPO, see `kl_estimator`).

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
    >   in a training on rewards, with its other defaults, eight prompts per device and update.
    > - `logging_steps`: Defaults to `1` instead of `500`, as an update takes long.
    > - `logging_nan_inf_filter`: Defaults to `False` instead of `True`. A loss that is not a number is shown.
    > - `remove_unused_columns`: Defaults to `False` instead of `True`, as reward functions get the columns.
    > - `metric_for_best_model`: Defaults to `"reward"`. The best checkpoint is saved and kept even if `save_steps` and
    >   `save_total_limit` would not.
    > - `gradient_checkpointing`: Defaults to `True` instead of `False`. It costs most of a forward pass for every
    >   trained step (two thirds of one for FLUX.1, nearly 3 passes instead of 2), but FLUX.1 does not fit in 80 GB with several
    >   images otherwise.
    > - `bf16`: Defaults to `True` if the GPU supports it, else to `False`, so that training also starts on a CPU.
    > - `ddp_find_unused_parameters`: Defaults to `False`.
    >
    > `torch_compile`, with its backend and mode, compiles the transformer's repeated blocks, each kind once for each size and
    > mode of training. What cannot be compiled is an error. Evaluation runs the blocks as they are.
    >
    > How the pipeline's models run is set on the pipeline that the trainer gets: `pipeline.vae.enable_slicing()`,
    > `pipeline.vae.enable_tiling()`, `pipeline.transformer.set_attention_backend(...)`; `trl_spatial grpo` has options for
    > these. Grids of images are saved in `output_dir/images`, of every evaluation and, if images are drawn to be trained on,
    > of every tenth rollout, unless `logging_strategy` is `"no"`.
    """

    # Smallest and largest value of a field; what an error advises, if not "at least" the smallest
    _ranges: ClassVar[Ranges] = {
        **dict.fromkeys(("height", "width", "eval_height", "eval_width"), (1, math.inf, None)),
        **dict.fromkeys(("eval_num_inference_steps", "max_sequence_length", "ema_steps"), (1, math.inf, None)),
        "ema_decay": (0, BELOW_1, "0 (no average) or a number between 0 and 1"),
        "guidance_scale": (0, 1e3, "a number from 0 to 1000"),
        "beta": (0, 1e6, "a number from 0 (no reference policy) to 1e6"),
        # of the optimizer: beyond these, weights become infinite or move the wrong way
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
        False, "Whether to keep only the column 'prompt'. Reward functions get the columns."
    )
    metric_for_best_model: str | None = option(
        "reward", "The metric of evaluation by which the best checkpoint is chosen."
    )
    gradient_checkpointing: bool | None = option(
        True, "Whether to recompute activations in the backward pass instead of storing them."
    )
    bf16: bool | None = option(None, "Whether to use bf16 mixed precision. If not set, when the GPU supports it.")
    ddp_find_unused_parameters: bool | None = option(
        False, "Whether DistributedDataParallel looks for parameters without gradient."
    )

    # Parameters that control the images
    guidance_scale: float = option(
        3.5,
        "Guidance, the same in rollout, training and evaluation: an input of FLUX.1-dev, the scale of classifier-free "
        "guidance of the other families (`1.0`, for Z-Image `0.0`, means none; above, twice the passes through the "
        "transformer).",
    )
    height: int = option(512, "Height of the images in training, in pixels.")
    width: int = option(512, "Width of the images in training, in pixels.")
    max_sequence_length: int = option(
        512, "The most tokens a prompt may have, and what some families pad to. A longer one is an error."
    )

    # Parameters that control the loss
    beta: float = option(0.01, "KL coefficient. If `0.0`, the reference policy is not scored.")

    # Parameters that control the weights that are evaluated and exported
    ema_decay: float = option(0.9, "Decay of the moving average of the trained weights. `0.0` means no average.")
    ema_steps: int = option(8, "Number of updates between two updates of the average.")

    # Parameters that control the evaluation
    eval_num_inference_steps: int = option(28, "Number of denoising steps in evaluation.")
    eval_height: int | None = option(None, "Height of the images in evaluation. If `None`, it defaults to `height`.")
    eval_width: int | None = option(None, "Width of the images in evaluation. If `None`, it defaults to `width`.")

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
        self._check_fields()

    @property
    def sampling_batch_size(self) -> int:
        """Number of images that a device samples at once, of the size of training: as many as it trains on."""
        return self.per_device_train_batch_size

    @property
    def eval_sampling_batch_size(self) -> int:
        """
        Number of images that a device samples at once in evaluation: `per_device_eval_batch_size`, or as many as have no more
        pixels than a batch of `sampling_batch_size`, whose memory is then enough; at least one.
        """
        num_pixels = (self.eval_height or self.height) * (self.eval_width or self.width)
        affordable = self.sampling_batch_size * self.height * self.width // num_pixels
        return max(1, min(self.per_device_eval_batch_size, affordable))

    def _check_fields(self):
        """Raises an error for values that are wrong, alone or together. A subclass adds its own."""
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
            "auto_find_batch_size": "the batch size decides what an update is made of. Set "
            "`per_device_train_batch_size`",
            "gradient_checkpointing_kwargs": "diffusers has one kind of checkpointing. Leave it `None`",
            "label_smoothing_factor": "there are no labels. Leave it 0",
        }
        for name, reason in reasons.items():
            if getattr(self, name):
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, but {reason}.")
