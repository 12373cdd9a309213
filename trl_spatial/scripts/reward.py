"""`trl_spatial reward`: train a spatial reward model on preference pairs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..cli import run_command
from .datasets import hub_dataset_name, load_dataset_dict, pick_split
from .parser import SpatialParser, argument, quick_imports
from .training_parser import training_parser


if TYPE_CHECKING:
    from ..gaussian_reward.config import GaussianRewardConfig
    from ..gaussian_reward.trainer import GaussianRewardTrainer


EXAMPLES = """\
  # your own dataset on the Hub
  trl_spatial reward --dataset hub/SpatialReward

  # the paper's recipe: LoRA on Qwen2.5-VL-7B, 32 pairs per update
  trl_spatial reward --dataset ORG/SpatialReward --output_dir SpatialScore-7B

  # the same from a file, on eight GPUs; options of `accelerate launch` are passed on to it
  trl_spatial reward --config recipes/reward_spatialscore.yaml --dataset ORG/SpatialReward --num_processes 8
  trl_spatial reward --config recipes/reward_spatialscore.yaml --dataset ORG/SpatialReward \\
      --accelerate_config recipes/accelerate/fsdp2.yaml

  # QLoRA on one small GPU; full training; continuing an interrupted run
  trl_spatial reward --dataset pairs --output_dir out --load_in_4bit
  trl_spatial reward --dataset pairs --output_dir out --no_use_peft
  trl_spatial reward --dataset pairs --output_dir out --resume_from_checkpoint true
"""


@dataclass
class RewardScriptArguments:
    """Options that say what is trained on; the `help` of each describes it."""

    dataset: str = argument(
        help="Preference pairs with the columns prompt, chosen, rejected: a folder written by `datasets` or by "
        "`trl_spatial data make`; a Parquet, JSON Lines or CSV file or a folder of them; ORG/NAME or ORG/NAME@REVISION on the "
        "Hub, or hub/NAME for your own."
    )
    dataset_config: str | None = argument(default=None, help="Configuration of a dataset on the Hub.")
    dataset_train_split: str = argument(default="train", help="Split to train on.")
    dataset_test_split: str = argument(default="test", help="Split to evaluate on, if `eval_strategy` asks for it.")
    dataset_streaming: bool = argument(
        default=False, help="Whether to read the dataset while training instead of downloading it first."
    )


@dataclass
class RewardModelArguments:
    """Options that say which model is trained and how, named as in [`~trl.ModelConfig`]; the `help` of each describes it."""

    model_name_or_path: str = argument(
        default="Qwen/Qwen2.5-VL-7B-Instruct",
        help="Image-text backbone: a folder, ORG/NAME or ORG/NAME@REVISION on the Hub, or hub/NAME.",
    )
    model_revision: str = argument(default="main", help="Branch, tag or commit of the backbone on the Hub.")
    dtype: str | None = argument(
        default=None,
        help="Type of the backbone's weights. By default the checkpoint's with LoRA, and float32 in full training, because "
        "bfloat16 weights lose its small steps.",
        metadata={"choices": ["auto", "bfloat16", "float16", "float32"]},
    )
    attn_implementation: str | None = argument(
        default=None, help="Attention function of the backbone, e.g. flash_attention_2."
    )
    use_peft: bool = argument(
        default=True,
        help="Whether to train LoRA (--no_use_peft: full training of the language model). The head and the reward token are "
        "always trained.",
    )
    lora_r: int = argument(default=64, help="LoRA rank.")
    lora_alpha: int = argument(default=128, help="LoRA alpha.")
    lora_dropout: float = argument(default=0.05, help="LoRA dropout.")
    load_in_4bit: bool = argument(
        default=False, help="Whether to quantize the language model to NF4 (QLoRA). Needs the `quant` extra."
    )

    def __post_init__(self):
        if self.load_in_4bit and not self.use_peft:
            raise ValueError(
                "`load_in_4bit` is True and `use_peft` is False: 4-bit weights cannot be trained. Drop one of "
                "`--load_in_4bit` and `--no_use_peft`."
            )


def make_parser(prog: str = "trl_spatial reward", *, is_brief: bool = False) -> SpatialParser:
    return training_parser(
        (RewardScriptArguments, RewardModelArguments),
        "gaussian_reward.config:GaussianRewardConfig",
        is_brief=is_brief,
        prog=prog,
        usage=f"{prog} --dataset DATASET [--config FILE] [OPTIONS] [OPTIONS OF accelerate launch]",
        description="Train a spatial reward model on preference pairs (prompt, chosen image, rejected image).",
        examples=EXAMPLES,
    )


def build_trainer(
    script_args: RewardScriptArguments, model_args: RewardModelArguments, training_args: "GaussianRewardConfig"
) -> "GaussianRewardTrainer":
    """The trainer that the arguments describe, with its datasets and model loaded."""
    with quick_imports():
        from ..gaussian_reward.modeling import spatial_score_lora_config
        from ..gaussian_reward.trainer import GaussianRewardTrainer
        from ..training.quantization import nf4_config
        from ..training.run_folder import check_start

    check_start(training_args)
    splits = load_dataset_dict(
        script_args.dataset, config_name=script_args.dataset_config, streaming=script_args.dataset_streaming
    )
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        **({} if model_args.dtype is None else {"dtype": model_args.dtype}),
        **(training_args.model_init_kwargs or {}),
    }
    trainer = GaussianRewardTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=pick_split(
            splits, script_args.dataset_train_split, script_args.dataset, option="--dataset_train_split"
        ),
        eval_dataset=(
            pick_split(splits, script_args.dataset_test_split, script_args.dataset, option="--dataset_test_split")
            if training_args.eval_strategy != "no"
            else None
        ),
        quantization_config=(
            nf4_config("bfloat16" if training_args.bf16 else "float32") if model_args.load_in_4bit else None
        ),
        peft_config=(
            spatial_score_lora_config(
                rank=model_args.lora_r, alpha=model_args.lora_alpha, dropout=model_args.lora_dropout
            )
            if model_args.use_peft
            else None
        ),
    )
    trainer.dataset_name = trainer.eval_dataset_name = hub_dataset_name(script_args.dataset)
    return trainer


def main(
    script_args: RewardScriptArguments, model_args: RewardModelArguments, training_args: "GaussianRewardConfig"
) -> None:
    trainer = build_trainer(script_args, model_args, training_args)

    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.accelerator.print("✅ Training completed.")

    if training_args.push_to_hub:
        address = trainer.push_to_hub()
        trainer.accelerator.print(f"🤗 Model saved to {training_args.output_dir} and pushed to the Hub: {address}")
    else:
        trainer.save_model(training_args.output_dir)
        trainer.accelerator.print(f"💾 Model saved to {training_args.output_dir}.")


if __name__ == "__main__":
    raise SystemExit(
        run_command("trl_spatial reward", lambda: main(*make_parser().parse_args_and_config(is_launched=True)))
    )
