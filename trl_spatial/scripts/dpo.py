"""`trl_spatial dpo`: fine-tune a text-to-image model on preference pairs of images."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..cli import run_command
from .datasets import hub_dataset_name, load_dataset_dict, pick_split
from .diffusion import DiffusionModelArguments, EvaluationArguments, estimate_or_train, load_eval_prompts
from .parser import SpatialParser, argument, quick_imports
from .training_parser import training_parser


if TYPE_CHECKING:
    from ..diffusion_grpo.dpo.config import DiffusionDPOConfig
    from ..diffusion_grpo.dpo.trainer import DiffusionDPOTrainer


EXAMPLES = """\
  # LoRA on FLUX.1-dev, on pairs from the Hub
  trl_spatial dpo --dataset ORG/SpatialReward --output_dir FLUX.1-dev-DPO

  # the same from a file, on eight GPUs; options of `accelerate launch` are passed on to it
  trl_spatial dpo --config recipes/dpo_flux.yaml --dataset ORG/SpatialReward --num_processes 8

  # another family, on pairs exported by `trl_spatial data build`
  trl_spatial dpo --model_name_or_path stabilityai/stable-diffusion-3.5-medium --guidance_scale 4.5 \\
      --max_sequence_length 256 --dataset pairs --output_dir SD3.5-DPO

  # with a reward that only scores the evaluation images; then the same run, continued after an interruption
  trl_spatial dpo --dataset pairs --eval_dataset heldout.txt --eval_strategy steps --eval_steps 50 \\
      --eval_rewards SpatialScore-7B --output_dir out
  trl_spatial dpo --dataset pairs --output_dir out --resume_from_checkpoint true

  # will it fit? a table of the memory that each option needs; nothing is loaded
  trl_spatial dpo --dataset pairs --output_dir out --estimate
"""


@dataclass(kw_only=True)
class DPOScriptArguments(EvaluationArguments):
    """Options that say what is trained on and evaluated; the `help` of each describes it."""

    dataset: str = argument(
        help="Preference pairs with the columns prompt, chosen, rejected: a folder written by `datasets` or by "
        "`trl_spatial data make`; a Parquet, JSON Lines or CSV file or a folder of them; ORG/NAME or ORG/NAME@REVISION on the "
        "Hub, or hub/NAME for your own. If it has the columns chosen_recipe and rejected_recipe, which `trl_spatial data build` "
        "writes, each image is noised with the noise that it was drawn from."
    )


def make_parser(prog: str = "trl_spatial dpo", *, is_brief: bool = False) -> SpatialParser:
    return training_parser(
        (DPOScriptArguments, DiffusionModelArguments),
        "diffusion_grpo.dpo.config:DiffusionDPOConfig",
        is_brief=is_brief,
        prog=prog,
        usage=f"{prog} --dataset PAIRS [--config FILE] [OPTIONS] [OPTIONS OF accelerate launch]",
        description="Fine-tune a text-to-image model (FLUX.1, Qwen-Image, Stable Diffusion 3 or Z-Image) on preference pairs with "
        "Diffusion-DPO, without drawing or scoring images.",
        examples=EXAMPLES,
    )


def build_trainer(
    script_args: DPOScriptArguments, model_args: DiffusionModelArguments, training_args: "DiffusionDPOConfig"
) -> "DiffusionDPOTrainer":
    """The trainer that the arguments describe, with its pairs, rewards and pipeline loaded."""
    with quick_imports():
        from ..diffusion_grpo.dpo.trainer import DiffusionDPOTrainer
        from ..training.run_folder import check_start

    check_start(training_args)
    load_pipeline = model_args.pipeline_loader(training_args)
    splits = load_dataset_dict(script_args.dataset, config_name=script_args.dataset_config)
    train_dataset = pick_split(
        splits, script_args.dataset_train_split, script_args.dataset, option="--dataset_train_split"
    )
    eval_dataset = load_eval_prompts(script_args, training_args)
    eval_rewards = script_args.load_rewards(script_args.eval_rewards or [], training_args)
    trainer = DiffusionDPOTrainer(
        pipeline=load_pipeline(),
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


def main(
    script_args: DPOScriptArguments, model_args: DiffusionModelArguments, training_args: "DiffusionDPOConfig"
) -> None:
    estimate_or_train(
        script_args, model_args, training_args, lambda: build_trainer(script_args, model_args, training_args)
    )


if __name__ == "__main__":
    raise SystemExit(
        run_command("trl_spatial dpo", lambda: main(*make_parser().parse_args_and_config(is_launched=True)))
    )
