"""
Fine-tune FLUX.1-dev with SpatialScore as in the paper, and measure the effect: rewards on the evaluation prompts before and
after, from the same noise, with 95 % intervals of the change. Pass a reward that is not trained on as `--eval_rewards`: the
trained one alone cannot distinguish progress from exploitation.

    accelerate launch --config_file recipes/accelerate/multi_gpu.yaml recipes/grpo_flux.py \
        --config recipes/grpo_flux.yaml --dataset ORG/SpatialReward

Other models only need their YAML file: `--config recipes/grpo_qwen_image.yaml`, `grpo_sd3.yaml` or `grpo_z_image.yaml`.
Training is the same as `trl_spatial grpo` with that file; this script adds the measurement, which it prints and writes to
`before_after.json` in the output folder.
"""

import json
from pathlib import Path

from trl_spatial.cli import run_command
from trl_spatial.scripts.diffusion import train
from trl_spatial.scripts.grpo import build_trainer, make_parser
from trl_spatial.statistics import compare_rewards


def main(script_args, model_args, training_args) -> None:
    trainer = build_trainer(script_args, model_args, training_args)
    if trainer.eval_dataset is None:
        raise ValueError("`eval_strategy` is no, so there is nothing to compare. Set it, or use `trl_spatial grpo`.")
    before = trainer.predict(trainer.eval_dataset).predictions  # (num_images, num_funcs)
    train(trainer)
    after = trainer.predict(trainer.eval_dataset).predictions  # (num_images, num_funcs)

    if trainer.is_world_process_zero():
        prompts = [row["prompt"] for row in trainer.eval_dataset]
        results = compare_rewards(before, after, trainer.eval_reward_functions.names, prompts)
        for name, result in results.items():
            interval = result["interval"]
            ends = "no interval of one prompt" if interval is None else "[{:+.4f}, {:+.4f}]".format(*interval)
            print(
                f"{name:<20} before {result['before']:.4f}  after {result['after']:.4f}  "
                f"change {result['change']:+.4f}  {ends}  n = {result['n']}"
            )
        Path(training_args.output_dir, "before_after.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    parser = make_parser("grpo_flux.py")
    raise SystemExit(run_command(parser.prog, lambda: main(*parser.parse_args_and_config(is_launched=True))))
