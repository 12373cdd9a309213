"""`trl_spatial grpo`: fine-tune a text-to-image model with rewards for its images."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..cli import run_command
from .datasets import hub_dataset_name, load_prompts
from .diffusion import DiffusionModelArguments, EvaluationArguments, load_eval_prompts, train
from .parser import SpatialParser, argument, quick_imports
from .training_parser import training_parser


if TYPE_CHECKING:
    from ..diffusion_grpo.config import DiffusionGRPOConfig
    from ..diffusion_grpo.trainer import DiffusionGRPOTrainer


EXAMPLES = """\
  # the paper's recipe: LoRA on FLUX.1-dev, a SpatialScore model as the reward
  trl_spatial grpo --dataset prompts.txt --rewards SpatialScore-7B --output_dir FLUX.1-dev-SpatialScore

  # the same from a file, on eight GPUs; what the script does not know is passed to `accelerate launch`
  trl_spatial grpo --config recipes/grpo_flux.yaml --dataset ORG/SpatialPrompts --num_processes 8

  # another family: Qwen-Image with classifier-free guidance; its recipe says what else differs
  trl_spatial grpo --config recipes/grpo_qwen_image.yaml --dataset ORG/SpatialPrompts --num_processes 8

  # will it fit? a table of the memory that each option needs; nothing is loaded
  trl_spatial grpo --dataset prompts.txt --rewards SpatialScore-7B --output_dir out --estimate

  # on a GPU of 24 or 40 GB: frozen weights in 4 bits
  trl_spatial grpo --dataset prompts.txt --rewards my_rewards:sharpness --output_dir out --load_in_4bit \\
      --offload_vae true --vae_slicing true

  # two rewards, the second one weighted half; a third one scores the evaluation and is not trained on
  trl_spatial grpo --dataset prompts.jsonl --rewards SpatialScore-7B my_rewards:sharpness --reward_weights 1 0.5 \\
      --eval_dataset heldout.txt --eval_strategy steps --eval_steps 50 --eval_rewards my_rewards:aesthetics \\
      --output_dir out

  # the reward in a process of its own, `trl_spatial serve`; images are rewarded while the next ones are drawn
  trl_spatial grpo --dataset prompts.txt --rewards http://127.0.0.1:8000 --overlap_rewards true --output_dir out

  # prompts and rules of the small world of shapes; then the same run continued where it was interrupted
  trl_spatial grpo --dataset scenes:1000 --rewards rules --output_dir out
  trl_spatial grpo --dataset scenes:1000 --rewards rules --output_dir out --resume_from_checkpoint true

  # the paper's baseline: GenEval's rules over what a detector sees; the second model names colors
  trl_spatial grpo --dataset objects.jsonl --rewards geneval:PekingU/rtdetr_v2_r50vd,google/siglip-base-patch16-224 \\
      --output_dir out
"""


@dataclass(kw_only=True)
class GRPOScriptArguments(EvaluationArguments):
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
class GRPOModelArguments(DiffusionModelArguments):
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


def make_parser(prog: str = "trl_spatial grpo", *, is_brief: bool = False) -> SpatialParser:
    return training_parser(
        (GRPOScriptArguments, GRPOModelArguments),
        "diffusion_grpo.config:DiffusionGRPOConfig",
        is_brief=is_brief,
        prog=prog,
        usage=f"{prog} --dataset PROMPTS --rewards REWARD [REWARD ...] [--config FILE] [OPTIONS] "
        "[OPTIONS OF accelerate launch]",
        description="Fine-tune a text-to-image model, FLUX.1, Qwen-Image, Stable Diffusion 3 or Z-Image, by GRPO: sample "
        "groups of images for a prompt, reward them, and make the better ones likelier.",
        examples=EXAMPLES,
    )


def build_trainer(
    script_args: GRPOScriptArguments, model_args: GRPOModelArguments, training_args: "DiffusionGRPOConfig"
) -> "DiffusionGRPOTrainer":
    """The trainer that the arguments describe, with its prompts, rewards and pipeline loaded."""
    with quick_imports():
        from ..diffusion_grpo.policies.lora import attention_lora_config
        from ..diffusion_grpo.trainer import DiffusionGRPOTrainer
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
    trainer = DiffusionGRPOTrainer(
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
    script_args: GRPOScriptArguments, model_args: GRPOModelArguments, training_args: "DiffusionGRPOConfig"
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


def main(
    script_args: GRPOScriptArguments, model_args: GRPOModelArguments, training_args: "DiffusionGRPOConfig"
) -> None:
    if script_args.estimate:
        if training_args.process_index == 0:
            print(describe_memory(script_args, model_args, training_args))
        return
    train(build_trainer(script_args, model_args, training_args))


if __name__ == "__main__":
    raise SystemExit(
        run_command("trl_spatial grpo", lambda: main(*make_parser().parse_args_and_config(is_launched=True)))
    )
