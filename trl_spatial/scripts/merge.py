"""`trl_spatial merge`: fold a checkpoint's LoRA adapter into its backbone."""

import argparse

from ..cli import run_command
from ..store import new_folder
from .parser import SpatialParser, quick_imports


EXAMPLES = """\
  trl_spatial merge --model SpatialScore-7B --output SpatialScore-7B-merged
  trl_spatial merge --model ORG/SpatialScore-7B --output merged --dtype bfloat16 --backbone /models/Qwen2.5-VL-7B-Instruct
"""


def make_parser(prog: str = "trl_spatial merge") -> SpatialParser:
    parser = SpatialParser(
        prog=prog,
        description="Fold a checkpoint's LoRA adapter into its backbone. The merged checkpoint loads without PEFT and "
        "without the backbone, and gives the same scores.",
        examples=EXAMPLES,
    )
    parser.add_checkpoint_arguments("Checkpoint with an adapter")
    parser.add_argument("--output", required=True, help="Output folder; it must be empty or not exist yet.")
    return parser


def main(args: argparse.Namespace) -> None:
    output = new_folder(args.output)
    with quick_imports():
        from .. import SpatialScore

    scorer = SpatialScore.from_pretrained(args.model, revision=args.revision, backbone=args.backbone, dtype=args.dtype)
    scorer.merge(output)
    print(f"Merged checkpoint saved to {output}")


if __name__ == "__main__":
    raise SystemExit(run_command("trl_spatial merge", lambda: main(*make_parser().parse_args_and_config())))
