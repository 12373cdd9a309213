"""`trl_spatial grpo`: fine-tune a text-to-image model with rewards for its images."""

from typing import TYPE_CHECKING

from ..cli import run_command
from .diffusion import estimate_or_train
from .online import OnlineModelArguments, OnlineScriptArguments, build_online_trainer
from .parser import SpatialParser, quick_imports
from .training_parser import training_parser


if TYPE_CHECKING:
    from ..diffusion_grpo.config import DiffusionGRPOConfig
    from ..diffusion_grpo.trainer import DiffusionGRPOTrainer


EXAMPLES = """\
  # the paper's recipe: LoRA on FLUX.1-dev, a SpatialScore model as the reward
  trl_spatial grpo --dataset prompts.txt --rewards SpatialScore-7B --output_dir FLUX.1-dev-SpatialScore

  # the same from a file, on eight GPUs; options of `accelerate launch` are passed on to it
  trl_spatial grpo --config recipes/grpo_flux.yaml --dataset ORG/SpatialPrompts --num_processes 8

  # another family: Qwen-Image with classifier-free guidance; see its recipe for the other differences
  trl_spatial grpo --config recipes/grpo_qwen_image.yaml --dataset ORG/SpatialPrompts --num_processes 8

  # will it fit? a table of the memory that each option needs; nothing is loaded
  trl_spatial grpo --dataset prompts.txt --rewards SpatialScore-7B --output_dir out --estimate

  # on a GPU with 24 or 40 GB: frozen weights in 4 bits
  trl_spatial grpo --dataset prompts.txt --rewards my_rewards:sharpness --output_dir out --load_in_4bit \\
      --offload_vae true --vae_slicing true

  # two rewards, the second with half the weight; a third one only scores the evaluation images
  trl_spatial grpo --dataset prompts.jsonl --rewards SpatialScore-7B my_rewards:sharpness --reward_weights 1 0.5 \\
      --eval_dataset heldout.txt --eval_strategy steps --eval_steps 50 --eval_rewards my_rewards:aesthetics \\
      --output_dir out

  # the reward in its own process, `trl_spatial serve`; images are scored while the next ones are drawn
  trl_spatial grpo --dataset prompts.txt --rewards http://127.0.0.1:8000 --overlap_rewards true --output_dir out

  # prompts and rules of the small world of shapes; then the same run, continued after an interruption
  trl_spatial grpo --dataset scenes:1000 --rewards rules --output_dir out
  trl_spatial grpo --dataset scenes:1000 --rewards rules --output_dir out --resume_from_checkpoint true

  # the paper's baseline: GenEval's rules on a detector's output; the second model names colors
  trl_spatial grpo --dataset objects.jsonl --rewards geneval:PekingU/rtdetr_v2_r50vd,google/siglip-base-patch16-224 \\
      --output_dir out
"""


def make_parser(prog: str = "trl_spatial grpo", *, is_brief: bool = False) -> SpatialParser:
    return training_parser(
        (OnlineScriptArguments, OnlineModelArguments),
        "diffusion_grpo.config:DiffusionGRPOConfig",
        is_brief=is_brief,
        prog=prog,
        usage=f"{prog} --dataset PROMPTS --rewards REWARD [REWARD ...] [--config FILE] [OPTIONS] "
        "[OPTIONS OF accelerate launch]",
        description="Fine-tune a text-to-image model (FLUX.1, Qwen-Image, Stable Diffusion 3 or Z-Image) with GRPO: sample "
        "groups of images for a prompt, score them, and make the better ones more likely.",
        examples=EXAMPLES,
    )


def build_trainer(
    script_args: OnlineScriptArguments, model_args: OnlineModelArguments, training_args: "DiffusionGRPOConfig"
) -> "DiffusionGRPOTrainer":
    """The trainer that the arguments describe, with its prompts, rewards and pipeline loaded."""
    with quick_imports():
        from ..diffusion_grpo.trainer import DiffusionGRPOTrainer

    return build_online_trainer(DiffusionGRPOTrainer, script_args, model_args, training_args)


def main(
    script_args: OnlineScriptArguments, model_args: OnlineModelArguments, training_args: "DiffusionGRPOConfig"
) -> None:
    estimate_or_train(
        script_args, model_args, training_args, lambda: build_trainer(script_args, model_args, training_args)
    )


if __name__ == "__main__":
    raise SystemExit(
        run_command("trl_spatial grpo", lambda: main(*make_parser().parse_args_and_config(is_launched=True)))
    )
