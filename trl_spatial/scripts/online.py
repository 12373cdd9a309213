"""Shared by the commands that train text-to-image models with rewards for their images."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .datasets import hub_dataset_name, load_prompts
from .diffusion import DiffusionModelArguments, EvaluationArguments, load_eval_prompts
from .parser import argument, quick_imports


if TYPE_CHECKING:
    from peft import LoraConfig

    from ..diffusion_grpo.online_config import OnlineConfig
    from ..diffusion_grpo.online_trainer import OnlineTrainer


@dataclass(kw_only=True)
class OnlineScriptArguments(EvaluationArguments):
    """Options that say what is trained on and evaluated; the `help` of each describes it."""

    dataset: str = argument(
        help="Prompts: a .txt file with one per line; scenes:N, captions of N scenes of the small world, with the column "
        "scene for the reward `rules`; or a dataset with the column prompt, whose other columns are passed to the rewards: a "
        "folder written by `datasets`, a Parquet, JSON Lines or CSV file or a folder of them, ORG/NAME or ORG/NAME@REVISION on "
        "the Hub, or hub/NAME for your own."
    )
    rewards: list[str] = argument(
        help="Reward functions: SpatialScore checkpoints (folders or Hub ids), `rules`, `geneval:DETECTOR` or "
        "`geneval:DETECTOR,CLASSIFIER` (GenEval's rules on an object detector's output, with a CLIP for colors; "
        "`geneval-strict:` for its verdict instead of shares), `module:function`, or http://HOST:PORT of `trl_spatial serve`, "
        "a reward in its own process. --reward_weights sets their weights."
    )

    @property
    def reward_names(self) -> list[str]:
        return [*self.rewards, *super().reward_names]


@dataclass
class OnlineModelArguments(DiffusionModelArguments):
    """[`DiffusionModelArguments`], and whether LoRA is trained or all weights."""

    use_peft: bool = argument(
        default=True,
        help="Whether to train LoRA on the attention layers (--no_use_peft: all weights; needs --beta 0).",
    )

    @property
    def peft_config(self) -> "LoraConfig | None":
        return super().peft_config if self.use_peft else None

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
        from ..training.run_folder import check_start

    check_start(training_args)
    # quick checks first: report a misspelled name before loading a model of 24 GB
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
        peft_config=model_args.peft_config,
    )
    if model_args.offload_vae:
        trainer.policy.offload_vae(training_args.device)
    trainer.dataset_name = hub_dataset_name(script_args.dataset)
    trainer.eval_dataset_name = hub_dataset_name(script_args.eval_dataset or script_args.dataset)
    return trainer
