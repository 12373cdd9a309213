from dataclasses import dataclass, field, fields
from importlib.util import find_spec

from transformers.utils import is_torch_bf16_gpu_available
from trl import RewardConfig

from ..training.run_folder import check_arguments


@dataclass
class GaussianRewardConfig(RewardConfig):
    r"""
    Configuration class for the [`GaussianRewardTrainer`].

    This class includes only the parameters that are specific to training a Gaussian reward model. For a full list of
    training arguments, please refer to the [`~transformers.TrainingArguments`] and [`~trl.RewardConfig`]
    documentation. Note that default values in this class may differ from those.

    Parameters:
        > Parameters that control the loss

        objective (`str`, *optional*, defaults to `"expected_nll"`):
            What to minimize, with \\( z \\) the Gaussian difference of the two scores of a pair:

            - `"expected_nll"`: \\( \mathbb{E}[-\log \sigma(z)] \\), the objective of
              [SpatialScore](https://huggingface.co/papers/2602.24233). It rewards a small std on every pair.
            - `"marginal_nll"`: \\( -\log \mathbb{E}[\sigma(z)] \\), the likelihood of the preference. The std stays
              meaningful: it is larger for noisy pairs.
        estimator (`str`, *optional*, defaults to `"closed_form"`):
            How to compute the expectation in training: `"closed_form"`, without noise, or `"monte_carlo"`, as in the
            paper. Evaluation always uses the closed form.
        num_samples (`int`, *optional*, defaults to `1000`):
            Number of samples per pair for the `"monte_carlo"` estimator. The default is the paper's.
        head_learning_rate (`float`, *optional*):
            Learning rate of the newly initialized parts: the head and the reward token's embedding. If `None`,
            they use `learning_rate`. If the loss stays near 0.69 with LoRA, try `1e-4` here and `learning_rate` 1e-5.

        > Parameters that control the data

        use_reverse_pairs (`bool`, *optional*):
            Whether every row also gives its reverse pair: for the prompt in the `perturbed_prompt` column, the rejected
            image is the right one. Without them, a reward model may learn which *image* tends to be chosen and
            never read the prompt. If `None`, they are used if the dataset has that column.
        min_pixels (`int`, *optional*):
            Smaller images are enlarged to this many pixels. If `None`, the value saved with the model. If you pass a
            processor to the trainer, set it there.
        max_pixels (`int`, *optional*):
            Larger images are shrunk to this many pixels. If `None`, the value saved with the model. If you pass a
            processor to the trainer, set it there. Qwen2.5-VL uses one token per 28 × 28 pixels: 1024 × 1024 pixels are
            1369 tokens.
        skip_bad_rows (`bool`, *optional*, defaults to `False`):
            What to do with rows that cannot be used: a missing or damaged image, an empty prompt, more than
            `max_length` tokens, two identical images. By default they are an error that names the row. If `True`,
            they are left out, counted, and listed in `_bad_rows.jsonl` in `output_dir`; to find them before the first
            step, every image is decoded once at the start (with `dataset_num_proc` threads).

    > [!NOTE]
    > These parameters have default values different from [`~trl.RewardConfig`]:
    > - `learning_rate`: Defaults to `2e-6`, as in the paper, instead of `1e-4`.
    > - `lr_scheduler_type`: Defaults to `"constant_with_warmup"` instead of `"linear"`.
    > - `warmup_steps`: Defaults to `0.05`, the share of all steps, instead of `0`.
    > - `num_train_epochs`: Defaults to `1` instead of `3`. With reverse pairs, an epoch shows every image twice.
    > - `per_device_train_batch_size`: Defaults to `4` and `gradient_accumulation_steps` to `8` instead of `8` and `1`:
    >   on one device, 32 pairs per update, as in the paper.
    > - `max_length`: Defaults to `2048` instead of `1024`, as an image of 1024 × 1024 pixels is 1369 tokens. Longer rows
    >   are an error (see `skip_bad_rows`); they are never silently dropped.
    > - `disable_dropout`: Defaults to `False` instead of `True`. `True` sets *every* dropout to zero, including those of
    >   LoRA and the head, which are intentional; the released Qwen-VL backbones have no others.
    > - `bf16`: Defaults to `True` if the GPU supports it and `fp16` is not set, else to `False`, so that training also
    >   starts on a CPU.
    > - `dataloader_num_workers`: Defaults to `2` instead of `0`, as images are decoded and cut into patches there.
    """

    # Parameters whose default values are overridden from RewardConfig
    learning_rate: float = field(
        default=2e-6,
        metadata={"help": "The initial learning rate for AdamW."},
    )
    lr_scheduler_type: str = field(
        default="constant_with_warmup",
        metadata={"help": "The scheduler type to use."},
    )
    warmup_steps: float = field(
        default=0.05,
        metadata={"help": "Number of warm-up steps, or, below 1, their share of all steps."},
    )
    num_train_epochs: float = field(
        default=1.0,
        metadata={"help": "Total number of training epochs to perform."},
    )
    per_device_train_batch_size: int = field(
        default=4,
        metadata={"help": "Number of pairs per device and forward pass in training."},
    )
    gradient_accumulation_steps: int = field(
        default=8,
        metadata={"help": "Number of forward passes per update."},
    )
    max_length: int | None = field(
        default=2048,
        metadata={
            "help": "Maximum number of tokens in a row, including image tokens. Longer rows are an error, or, with "
            "`skip_bad_rows`, left out and listed. If `None`, there is no limit."
        },
    )
    disable_dropout: bool = field(
        default=False,
        metadata={"help": "Whether to set every dropout to zero, including those of LoRA and the head."},
    )
    dataloader_num_workers: int = field(
        default=2,
        metadata={"help": "Number of worker processes that decode images. 0 means the main process."},
    )

    # Parameters that control the loss
    objective: str = field(
        default="expected_nll",
        metadata={
            "help": "What to minimize: 'expected_nll', as in the paper, or 'marginal_nll', the likelihood of the "
            "preference, which keeps the std meaningful.",
            "choices": ["expected_nll", "marginal_nll"],
        },
    )
    estimator: str = field(
        default="closed_form",
        metadata={
            "help": "How to compute the expectation in the training loss: 'closed_form' or 'monte_carlo'.",
            "choices": ["closed_form", "monte_carlo"],
        },
    )
    num_samples: int = field(
        default=1000,
        metadata={"help": "Number of samples per pair for the 'monte_carlo' estimator."},
    )
    head_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the head and the reward token's embedding. If `None`, `learning_rate`."},
    )

    # Parameters that control the data
    use_reverse_pairs: bool | None = field(
        default=None,
        metadata={
            "help": "Whether every row also gives its reverse pair, (perturbed_prompt, rejected over chosen). If "
            "`None`, they are used if the dataset has a `perturbed_prompt` column."
        },
    )
    min_pixels: int | None = field(
        default=None,
        metadata={
            "help": "Smaller images are enlarged to this many pixels. If `None`, the value saved with the model."
        },
    )
    max_pixels: int | None = field(
        default=None,
        metadata={"help": "Larger images are shrunk to this many pixels. If `None`, the value saved with the model."},
    )
    skip_bad_rows: bool = field(
        default=False,
        metadata={
            "help": "Whether rows that cannot be used are left out, counted and listed in `_bad_rows.jsonl`, instead "
            "of being an error."
        },
    )

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        # Newer transformers rename the option and warn about the old name, which TRL sets by default.
        if "activation_checkpointing" in [f.name for f in fields(self)] and self.activation_checkpointing is None:
            self.activation_checkpointing = self.gradient_checkpointing
        if self.deepspeed is not None and find_spec("deepspeed") is None:
            raise ValueError(
                f"`deepspeed` is {self.deepspeed!r}, but the package deepspeed is not installed. Install it, or leave it out."
            )
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # or PyTorch warns that there is no accelerator to pin memory for
        self._check_loss_fields()
        self._check_data_fields()
        self._check_unsupported_fields()

    def _check_loss_fields(self):
        if self.objective not in ("expected_nll", "marginal_nll"):
            raise ValueError(f"`objective` is {self.objective!r}. Use 'expected_nll' or 'marginal_nll'.")
        if self.estimator not in ("closed_form", "monte_carlo"):
            raise ValueError(f"`estimator` is {self.estimator!r}. Use 'closed_form' or 'monte_carlo'.")
        if self.num_samples < 1:
            raise ValueError(f"`num_samples` is {self.num_samples}. Use at least 1; the paper uses 1000.")
        if self.head_learning_rate is not None and not self.head_learning_rate > 0:
            raise ValueError(
                f"`head_learning_rate` is {self.head_learning_rate}. Use a positive number, or `None` to use "
                "`learning_rate`."
            )

    def _check_data_fields(self):
        for name in ("min_pixels", "max_pixels", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}. Use a positive number, or `None` for no separate limit.")
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise ValueError(
                f"`min_pixels` is {self.min_pixels} and `max_pixels` is {self.max_pixels}. Use "
                "`min_pixels` <= `max_pixels`; both count the pixels of the whole image, width × height."
            )

    def _check_unsupported_fields(self):
        check_arguments(self)
        if self.chat_template_path is not None or self.eos_token is not None:
            raise ValueError(
                f"`chat_template_path` is {self.chat_template_path!r} and `eos_token` is {self.eos_token!r}. The processor's "
                "chat template contains the instruction and the reward token: leave both `None`, and pass a "
                "`SpatialScoreProcessor` as `processing_class` to use another instruction."
            )
        if self.accelerator_config.dispatch_batches:
            raise ValueError(
                "`accelerator_config` has `dispatch_batches` True: the patches of all images, which have no row each, cannot be "
                "split among processes. Leave it out."
            )
        if self.pad_to_multiple_of is not None:
            raise ValueError(f"`pad_to_multiple_of` is {self.pad_to_multiple_of}; it is not supported. Use `None`.")
        if self.trust_remote_code:
            raise ValueError(
                "`trust_remote_code` is True, but backbones are only loaded from `transformers`. Leave it False."
            )
