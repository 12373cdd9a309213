"""
Shared by the commands that train text-to-image models: options for the model and its evaluation, and the run itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .datasets import load_prompts
from .parser import ATTENTION_FUNCTIONS, ATTENTION_HELP, argument, check_device, quick_imports


if TYPE_CHECKING:
    from datasets import Dataset
    from diffusers import DiffusionPipeline
    from peft import LoraConfig

    from ..diffusion_grpo.reward_functions import RewardFunction
    from ..diffusion_grpo.runtime.base_config import DiffusionConfig
    from ..diffusion_grpo.runtime.base_trainer import DiffusionTrainer


@dataclass
class EvaluationArguments:
    """
    Options that say what is evaluated, by which rewards, where datasets are, and whether the run is only estimated; the `help`
    of each describes it.
    """

    eval_rewards: list[str] | None = argument(
        default=None, help="Additional reward functions that score the evaluation images and are not trained on."
    )
    reward_device: str | None = argument(
        default=None,
        help="Where SpatialScore checkpoints run, e.g. cuda:1 or cpu. By default the training device. To run a reward in its "
        "own process, use a server: `trl_spatial serve`.",
    )
    reward_attn_implementation: str | None = argument(
        default=None,
        help=f"For SpatialScore checkpoints. {ATTENTION_HELP}",
        metadata={"choices": ATTENTION_FUNCTIONS},
    )
    eval_dataset: str | None = argument(
        default=None, help="Prompts to evaluate on, in the same forms. By default the test split of --dataset."
    )
    dataset_config: str | None = argument(default=None, help="Configuration of a dataset on the Hub.")
    dataset_train_split: str = argument(default="train", help="Split to train on.")
    dataset_test_split: str = argument(default="test", help="Split to evaluate on, if `eval_strategy` asks for it.")
    estimate: bool = argument(
        default=False,
        help="Print how much GPU memory the run would need, in bf16, int8 and NF4, with and without "
        "checkpointing and offloading, and exit. No weights are loaded.",
    )

    @property
    def reward_names(self) -> list[str]:
        """Names of all reward functions of the run."""
        return self.eval_rewards or []

    def load_rewards(self, names: list[str], training_args: "DiffusionConfig") -> "list[RewardFunction]":
        """Loads the reward functions with these names, as the options specify."""
        with quick_imports():
            from ..rewards import load_reward

        check_device("--reward_device", self.reward_device)
        device = self.reward_device or training_args.device
        return [
            load_reward(name, device=device, attn_implementation=self.reward_attn_implementation) for name in names
        ]


@dataclass
class DiffusionModelArguments:
    """Options that say which model is trained and how, named as in [`~trl.ModelConfig`]; the `help` of each describes it."""

    model_name_or_path: str = argument(
        default="black-forest-labs/FLUX.1-dev",
        help="Text-to-image pipeline, FLUX.1, Qwen-Image, Stable Diffusion 3 or 3.5, or Z-Image: a folder, ORG/NAME or "
        "ORG/NAME@REVISION on the Hub, or hub/NAME.",
    )
    model_revision: str = argument(default="main", help="Branch, tag or commit of the pipeline on the Hub.")
    dtype: str | None = argument(
        default=None,
        help="Type of the frozen weights. By default bfloat16 if `bf16` is on, else float32. Trained weights are float32.",
        metadata={"choices": ["bfloat16", "float32"]},
    )
    lora_r: int = argument(default=32, help="LoRA rank.")
    lora_alpha: int = argument(default=64, help="LoRA alpha.")
    load_in_4bit: bool = argument(
        default=False,
        help="Whether to quantize the frozen transformer to NF4 (QLoRA); needs LoRA, a GPU and the `quant` extra.",
    )
    load_in_8bit: bool = argument(
        default=False,
        help="Whether to quantize the frozen transformer to 8 bits; same requirements as `load_in_4bit`.",
    )
    load_text_encoders_in_4bit: bool = argument(
        default=False,
        help="Whether to quantize the text encoders, except CLIP's, to NF4, if encoding prompts is the memory peak. It changes "
        "the prompt embeddings slightly: evaluate and use the trained model the same way. Needs the `quant` extra.",
    )
    attention_backend: str | None = argument(
        default=None,
        help="Attention kernel of the transformer, one of diffusers' `AttentionBackendName` such as _native_flash or flash. "
        "By default PyTorch chooses, but never cuDNN's kernel, whose gradients can be wrong.",
    )
    offload_vae: bool = argument(
        default=False,
        help="Whether to keep the VAE on the accelerator only while it decodes, as the text encoders are while they encode.",
    )
    vae_slicing: bool = argument(default=False, help="Whether the VAE decodes one image at a time.")
    vae_tiling: bool = argument(
        default=False, help="Whether the VAE decodes an image in tiles. Pixels differ slightly where the tiles meet."
    )

    def __post_init__(self):
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("`load_in_4bit` and `load_in_8bit` are both True. Drop one of them.")

    @property
    def quantization(self) -> str | None:
        """Method by which the frozen transformer is quantized: `"nf4"`, `"int8"` or none."""
        return "nf4" if self.load_in_4bit else "int8" if self.load_in_8bit else None

    @property
    def revision(self) -> str | None:
        """The revision, or none for the default one, which a local folder also has."""
        return None if self.model_revision == "main" else self.model_revision

    @property
    def peft_config(self) -> "LoraConfig | None":
        """The adapters that are trained; `None` if all weights are."""
        from ..diffusion_grpo.policies.lora import attention_lora_config

        return attention_lora_config(rank=self.lora_r, alpha=self.lora_alpha)

    def set_up_vae(self, vae: Any) -> None:
        """Sets how an autoencoder of diffusers decodes."""
        if self.vae_slicing:
            vae.enable_slicing()
        if self.vae_tiling:
            vae.enable_tiling()

    def pipeline_loader(self, training_args: "DiffusionConfig") -> "Callable[[], DiffusionPipeline]":
        """Checks what can be checked before loading a model of 24 GB, and returns a function that loads it."""
        with quick_imports():
            import torch

            from ..diffusion_grpo.runtime.model_setup import (
                large_text_encoders,
                load_pipeline,
                loading_device,
                quantization_config,
            )

        dtype = getattr(torch, self.dtype or ("bfloat16" if training_args.bf16 else "float32"))
        name, revision = self.model_name_or_path, self.revision
        encoders = large_text_encoders(name, revision=revision) if self.load_text_encoders_in_4bit else ()
        quantization = quantization_config(self.quantization, dtype, text_encoders=encoders)

        def load() -> "DiffusionPipeline":
            pipeline = load_pipeline(
                name,
                dtype,
                device=loading_device(training_args),
                revision=revision,
                quantization_config=quantization,
                attention_backend=self.attention_backend,
            )
            self.set_up_vae(pipeline.vae)
            return pipeline

        return load


def load_eval_prompts(script_args: Any, training_args: "DiffusionConfig") -> "Dataset | None":
    """Loads the prompts for evaluation that [`EvaluationArguments`] name; `None` without evaluation."""
    if training_args.eval_strategy == "no":
        return None
    return load_prompts(
        script_args.eval_dataset or script_args.dataset,
        script_args.dataset_test_split,
        config_name=None if script_args.eval_dataset else script_args.dataset_config,
        use_only_split=script_args.eval_dataset is not None,
        option="--dataset_test_split, or other prompts with --eval_dataset",
    )


def describe_memory(
    script_args: EvaluationArguments, model_args: DiffusionModelArguments, training_args: "DiffusionConfig"
) -> str:
    """What `--estimate` prints: memory of the run that the arguments describe."""
    import torch

    from ..diffusion_grpo.runtime.architectures import load_architecture
    from ..diffusion_grpo.runtime.memory import MemoryModel, describe_options, reward_model_bytes

    # without a GPU here `bf16` is off by default, but the estimated run has one
    is_bf16 = training_args.bf16 or (training_args.is_bf16_default and training_args.device.type == "cpu")
    check_device("--reward_device", script_args.reward_device, is_used=False)  # the run may be for another machine
    reward_device = torch.device(script_args.reward_device or training_args.device)
    is_elsewhere = script_args.reward_device is not None and (reward_device.type == "cpu" or reward_device.index)
    model = MemoryModel(
        load_architecture(model_args.model_name_or_path, revision=model_args.revision),
        training_args,
        model_args.peft_config,
        dtype=getattr(torch, model_args.dtype or ("bfloat16" if is_bf16 else "float32")),
        reward_bytes=0 if is_elsewhere else reward_model_bytes(script_args.reward_names),
        text_encoders_in_4bit=model_args.load_text_encoders_in_4bit,
    )
    model_args.set_up_vae(model.policy.vae)
    table = describe_options(model, offload_vae=model_args.offload_vae)
    return f"{model_args.model_name_or_path}, {table}"


def estimate_or_train(
    script_args: EvaluationArguments,
    model_args: DiffusionModelArguments,
    training_args: "DiffusionConfig",
    build_trainer: "Callable[[], DiffusionTrainer]",
) -> None:
    """Trains, or with `--estimate` prints the memory that training would need."""
    if not script_args.estimate:
        train(build_trainer())
    elif training_args.process_index == 0:
        print(describe_memory(script_args, model_args, training_args))


def train(trainer: "DiffusionTrainer") -> None:
    """Train, from a checkpoint if the arguments name one, and save the weights."""
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    trainer.accelerator.print("✅ Training completed.")

    if trainer.args.push_to_hub:
        address = trainer.push_to_hub()
        trainer.accelerator.print(f"🤗 Weights saved to {trainer.args.output_dir} and pushed to the Hub: {address}")
    else:
        trainer.save_model(trainer.args.output_dir)
        trainer.accelerator.print(f"💾 Weights saved to {trainer.args.output_dir}.")
