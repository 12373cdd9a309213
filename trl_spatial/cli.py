"""`trl_spatial <command>`: a command is a module of `trl_spatial.scripts` with `make_parser()` and `main()`.

Only the standard library is imported here, so that `trl_spatial --help` answers at once; a command's module, and with it
torch and transformers, is imported when the command runs.
"""

import argparse
import difflib
import importlib
import os
import subprocess
import sys
from collections.abc import Iterable

from . import __version__


COMMANDS = {
    "demo": "the whole method in a small world: reward model, reinforcement learning, an exact judge, a report",
    "reward": "train a spatial reward model on preference pairs",
    "grpo": "fine-tune FLUX.1, Qwen-Image, Stable Diffusion 3 or Z-Image by rewards for their images",
    "score": "score images for prompts with a trained reward model",
    "merge": "fold a checkpoint's LoRA adapter into its backbone",
    "data": "make and validate datasets of preference pairs",
    "push": "upload a model, a dataset or a Space to the Hub, with its card",
    "serve": "score images over HTTP: a reward in a process of its own",
    "space": "build or run a page that scores images",
}
# Training commands run through `accelerate launch`, as in TRL's CLI: they also take its arguments.
LAUNCHED_COMMANDS = {"reward", "grpo"}

EXAMPLES = """\
examples:
  trl_spatial demo
  trl_spatial reward --dataset ORG/SpatialReward --output_dir SpatialScore-7B
  trl_spatial grpo --dataset prompts.txt --rewards SpatialScore-7B --output_dir FLUX.1-dev-SpatialScore
  trl_spatial score --model SpatialScore-7B --prompt "a red cup to the left of a blue book" cup.png
  trl_spatial push SpatialScore-7B --to hub/SpatialScore-7B
  trl_spatial COMMAND --help
"""


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Text that names the candidates that `word` may have been meant for, or nothing if none is near."""
    # --batch-size and --batch_size are one option: name it as it is documented
    by_name = {candidate.lstrip("-").replace("-", "_"): candidate for candidate in sorted(candidates)}
    matches = difflib.get_close_matches(word.lstrip("-").replace("-", "_"), by_name, n=3, cutoff=0.7)
    return f"; did you mean {' or '.join(by_name[match] for match in matches)}?" if matches else ""


def make_parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {name:<9} {text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="trl_spatial",
        usage="trl_spatial COMMAND [OPTIONS]",
        description=f"Spatial reward models and reinforcement learning for text-to-image models.\n\ncommands:\n{commands}",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"trl_spatial {__version__}")
    return parser


def launch(module_name: str, argv: list[str]) -> int:
    """Run a training script through `accelerate launch`; arguments that are not the script's own are the launcher's."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    script = importlib.import_module(module_name)
    launcher = launch_command_parser()
    launch_args, script_args = script.make_parser().split_launch_args(argv, launcher)
    try:
        launch_command(launcher.parse_args([*launch_args, "--module", module_name, *script_args]))
    except subprocess.CalledProcessError as error:  # the script has told the reason
        return error.returncode
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the CLI; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    if not argv:
        parser.print_help()
        return 0
    command, *argv = argv
    if command.startswith("-"):
        _, unknown = parser.parse_known_args([command])
        if unknown:
            parser.error(f"unknown option {command}{nearest(command, ['--help', '--version'])}")
    if command not in COMMANDS:
        parser.error(f"unknown command {command!r}{nearest(command, COMMANDS)}\ncommands: {', '.join(COMMANDS)}")

    module_name = f"{__package__}.scripts.{command}"
    if command in LAUNCHED_COMMANDS:
        return launch(module_name, argv)
    script = importlib.import_module(module_name)
    arguments = script.make_parser().parse_args_and_config(argv)
    try:
        script.main(*arguments)
    except (OSError, ValueError) as error:
        if "TRL_SPATIAL_TRACEBACK" in os.environ:
            raise
        print(f"trl_spatial {command}: error: {error}", file=sys.stderr)
        print("(TRL_SPATIAL_TRACEBACK=1 in the environment shows where)", file=sys.stderr)
        return 1
    return 0
