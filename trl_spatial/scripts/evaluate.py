"""`trl_spatial evaluate`: measure scorers of images on preference pairs."""

import argparse
from collections.abc import Callable

from ..cli import run_command
from . import evaluate_pairs
from .evaluate_pairs import PAIRS_EXAMPLES, add_pairs
from .parser import SpatialParser


def make_parser(prog: str = "trl_spatial evaluate") -> SpatialParser:
    parser = SpatialParser(
        prog=prog,
        description="Measure what scorers of images know about space. Every number comes with its uncertainty, every answer is "
        "kept, and an interrupted run continues.",
        examples=PAIRS_EXAMPLES,
    )
    commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add_pairs(commands)
    return parser


def main(args: argparse.Namespace) -> None:
    actions: dict[str, Callable[[argparse.Namespace], None]] = {"pairs": evaluate_pairs.main}
    actions[args.action](args)


if __name__ == "__main__":
    raise SystemExit(run_command("trl_spatial evaluate", lambda: main(*make_parser().parse_args_and_config())))
