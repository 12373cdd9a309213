"""
Fine-tune FLUX.1-dev with SpatialScore as in the paper, and measure what it changed: rewards of the evaluation prompts before
and after, from the same noise, with 95 % intervals of the change. Name a reward with `--eval_rewards` that is not trained
on: the trained one alone cannot tell progress from exploitation.

    accelerate launch --config_file recipes/accelerate/multi_gpu.yaml recipes/grpo_flux.py \
        --config recipes/grpo_flux.yaml --dataset ORG/SpatialReward

Other models need their YAML file only: `--config recipes/grpo_qwen_image.yaml`, `grpo_sd3.yaml` or `grpo_z_image.yaml`. The
training itself is `trl_spatial grpo` with the same file; this script adds the measurement, which it prints and writes to
`before_after.json` in the output folder.
"""

from trl_spatial.cli import run_command
from trl_spatial.scripts.grpo import build_trainer, make_parser, train_and_compare


def main(script_args, model_args, training_args) -> None:
    train_and_compare(build_trainer(script_args, model_args, training_args))


if __name__ == "__main__":
    parser = make_parser("grpo_flux.py")
    raise SystemExit(run_command(parser.prog, lambda: main(*parser.parse_args_and_config(is_launched=True))))
