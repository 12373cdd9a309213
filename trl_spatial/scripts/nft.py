"""`trl_spatial nft`: fine-tune a text-to-image model with rewards for its images, by DiffusionNFT."""

from typing import TYPE_CHECKING

from ..cli import run_command
from .diffusion import estimate_or_train
from .online import OnlineModelArguments, OnlineScriptArguments, build_online_trainer
from .parser import SpatialParser, quick_imports
from .training_parser import training_parser


if TYPE_CHECKING:
    from ..diffusion_grpo.nft.config import DiffusionNFTConfig
    from ..diffusion_grpo.nft.trainer import DiffusionNFTTrainer


EXAMPLES = """\
  # LoRA on FLUX.1-dev, a SpatialScore model as the reward
  trl_spatial nft --dataset prompts.txt --rewards SpatialScore-7B --output_dir FLUX.1-dev-NFT

  # the same from a file, on eight GPUs; options of `accelerate launch` are passed on to it
  trl_spatial nft --config recipes/nft_flux.yaml --dataset ORG/SpatialPrompts --num_processes 8

  # scouts: 96 cheap images per prompt decide which 12 + 12 are worth drawing
  trl_spatial nft --config recipes/nft_flux.yaml --dataset ORG/SpatialPrompts --num_processes 8 \\
      --num_scouts 96 --scout_steps 2 --top_k 12 --gradient_accumulation_steps 36

  # a held-out reward in addition to the trained one, which this method exploits faster than GRPO
  trl_spatial nft --dataset prompts.txt --rewards SpatialScore-7B --output_dir out --eval_dataset heldout.txt \\
      --eval_strategy steps --eval_steps 50 --eval_rewards my_rewards:aesthetics

  # prompts and rules of the small world of shapes; then the same run, continued after an interruption
  trl_spatial nft --dataset scenes:1000 --rewards rules --output_dir out
  trl_spatial nft --dataset scenes:1000 --rewards rules --output_dir out --resume_from_checkpoint true

  # will it fit? a table of the memory that each option needs; nothing is loaded
  trl_spatial nft --dataset prompts.txt --rewards SpatialScore-7B --output_dir out --estimate
"""


def make_parser(prog: str = "trl_spatial nft", *, is_brief: bool = False) -> SpatialParser:
    return training_parser(
        (OnlineScriptArguments, OnlineModelArguments),
        "diffusion_grpo.nft.config:DiffusionNFTConfig",
        is_brief=is_brief,
        prog=prog,
        usage=f"{prog} --dataset PROMPTS --rewards REWARD [REWARD ...] [--config FILE] [OPTIONS] "
        "[OPTIONS OF accelerate launch]",
        description="Fine-tune a text-to-image model (FLUX.1, Qwen-Image, Stable Diffusion 3 or Z-Image) with DiffusionNFT: sample "
        "groups of images for a prompt without noise in the steps, score them, and move the model towards the better ones.",
        examples=EXAMPLES,
    )


def build_trainer(
    script_args: OnlineScriptArguments, model_args: OnlineModelArguments, training_args: "DiffusionNFTConfig"
) -> "DiffusionNFTTrainer":
    """The trainer that the arguments describe, with its prompts, rewards and pipeline loaded."""
    with quick_imports():
        from ..diffusion_grpo.nft.trainer import DiffusionNFTTrainer

    return build_online_trainer(DiffusionNFTTrainer, script_args, model_args, training_args)


def main(
    script_args: OnlineScriptArguments, model_args: OnlineModelArguments, training_args: "DiffusionNFTConfig"
) -> None:
    estimate_or_train(
        script_args, model_args, training_args, lambda: build_trainer(script_args, model_args, training_args)
    )


if __name__ == "__main__":
    raise SystemExit(
        run_command("trl_spatial nft", lambda: main(*make_parser().parse_args_and_config(is_launched=True)))
    )
