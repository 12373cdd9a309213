"""What the commands share that train text-to-image models with rewards for their images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .datasets import hub_dataset_name, load_prompts
from .diffusion import DiffusionModelArguments, EvaluationArguments, load_eval_prompts, train
from .parser import argument, quick_imports


if TYPE_CHECKING:
    from ..diffusion_grpo.online_config import OnlineConfig
    from ..diffusion_grpo.online_trainer import OnlineTrainer


@dataclass(kw_only=True)
class OnlineScriptArguments(EvaluationArguments):
    """Options that say what is trained on and evaluated; the `help` of each describes it."""

    dataset: str = argument(
        help="Prompts: a .txt file with one per line; scenes:N, captions of N scenes of the small world, with the column "
        "scene for the reward `rules`; or a dataset with the column prompt, whose other columns the rewards get: a folder "
        "written by `datasets`, a Parquet, JSON Lines or CSV file or a folder of them, ORG/NAME or ORG/NAME@REVISION on the "
        "Hub, or hub/NAME for your own."
    )
    rewards: list[str] = argument(
        help="Reward functions: SpatialScore checkpoints (folders or Hub ids), `rules`, `geneval:DETECTOR` or "
        "`geneval:DETECTOR,CLASSIFIER` (GenEval's rules over an object detector, and a CLIP for colors; "
        "`geneval-strict:` for its verdict instead of shares), `module:function`, or http://HOST:PORT of `trl_spatial serve`, "
        "a reward in a process of its own. --reward_weights are their weights."
    )
    estimate: bool = argument(
        default=False,
        help="Print how much memory of a GPU the run would need, in bf16, int8 and NF4, with and without "
        "checkpointing and offloading, and end. No weights are loaded.",
    )


@dataclass
class OnlineModelArguments(DiffusionModelArguments):
    """[`DiffusionModelArguments`], and whether LoRA is trained or all weights."""

    use_peft: bool = argument(
        default=True, help="Whether to train LoRA on the attention (--no_use_peft: all weights; needs --beta 0)."
    )

    def __post_init__(self):
        super().__post_init__()
        if self.quantization is not None and not self.use_peft:
            option = "load_in_4bit" if self.load_in_4bit else "load_in_8bit"
            raise ValueError(
                f"`{option}` is True and `use_peft` is False: quantized weights cannot be trained. Drop one of "
                f"`--{option}` and `--no_use_peft`."
            )


def build_online_trainer(
    trainer_class: "type[OnlineTrainer]",
    script_args: OnlineScriptArguments,
    model_args: OnlineModelArguments,
    training_args: "OnlineConfig",
) -> "OnlineTrainer":
    """The trainer that the arguments describe, with its prompts, rewards and pipeline loaded."""
    with quick_imports():
        from ..diffusion_grpo.policies.lora import attention_lora_config
        from ..training.run_folder import check_start

    check_start(training_args)
    # the quick things first: what is misspelt should be reported before a model of 24 GB is loaded
    load_pipeline = model_args.pipeline_loader(training_args)
    train_dataset = load_prompts(
        script_args.dataset, script_args.dataset_train_split, config_name=script_args.dataset_config
    )
    eval_dataset = load_eval_prompts(script_args, training_args)
    rewards = script_args.load_rewards(script_args.rewards, training_args)
    eval_rewards = script_args.load_rewards(script_args.eval_rewards or [], training_args)
    trainer = trainer_class(
        pipeline=load_pipeline(),
        reward_funcs=rewards,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        eval_reward_funcs=eval_rewards or None,
        peft_config=(
            attention_lora_config(rank=model_args.lora_r, alpha=model_args.lora_alpha) if model_args.use_peft else None
        ),
    )
    if model_args.offload_vae:
        trainer.policy.offload_vae(training_args.device)
    trainer.dataset_name = hub_dataset_name(script_args.dataset)
    trainer.eval_dataset_name = hub_dataset_name(script_args.eval_dataset or script_args.dataset)
    return trainer


def describe_memory(
    script_args: OnlineScriptArguments, model_args: OnlineModelArguments, training_args: "OnlineConfig"
) -> str:
    """What `--estimate` prints: memory of the run that the arguments describe."""
    import torch

    from ..diffusion_grpo.policies.lora import attention_lora_config
    from ..diffusion_grpo.runtime.architectures import load_architecture
    from ..diffusion_grpo.runtime.memory import MemoryModel, describe_options, reward_model_bytes

    model = MemoryModel(
        load_architecture(model_args.model_name_or_path, revision=model_args.revision),
        training_args,
        attention_lora_config(rank=model_args.lora_r, alpha=model_args.lora_alpha) if model_args.use_peft else None,
        # on a machine without a GPU `bf16` is off, but the run is for one
        dtype=getattr(torch, model_args.dtype or "bfloat16"),
        reward_bytes=reward_model_bytes([*script_args.rewards, *(script_args.eval_rewards or [])]),
        text_encoders_in_4bit=model_args.load_text_encoders_in_4bit,
    )
    model_args.set_up_vae(model.policy.vae)
    table = describe_options(model, offload_vae=model_args.offload_vae)
    return f"{model_args.model_name_or_path}, {table}"


def estimate_or_train(
    script_args: OnlineScriptArguments,
    model_args: OnlineModelArguments,
    training_args: "OnlineConfig",
    build_trainer: "Callable[[], OnlineTrainer]",
) -> None:
    """Does what a command is for, or with `--estimate` says what it would need."""
    if not script_args.estimate:
        train(build_trainer())
    elif training_args.process_index == 0:
        print(describe_memory(script_args, model_args, training_args))
