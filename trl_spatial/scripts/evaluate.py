"""`trl_spatial evaluate`: measure scorers on preference pairs, and generators on public benchmarks."""

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from ..cli import run_command
from ..store import lock_folder, read_record
from . import evaluate_images, evaluate_pairs
from .evaluate_images import IMAGE_EXAMPLES, add_compare, add_images
from .evaluate_pairs import PAIRS_EXAMPLES, add_pairs
from .parser import SpatialParser


def make_parser(prog: str = "trl_spatial evaluate") -> SpatialParser:
    parser = SpatialParser(
        prog=prog,
        description="Measure image scorers on preference pairs, and image generators on public benchmarks. Every number "
        "comes with its uncertainty, every answer is kept, and an interrupted run can be continued.",
        examples=PAIRS_EXAMPLES + IMAGE_EXAMPLES,
    )
    commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    add_pairs(commands)
    add_images(commands)
    add_compare(commands)
    replay = commands.add_parser(
        "replay",
        help="rebuild the tables of a run from its records, without a model",
        description="Rebuild the tables and the page of a run from its records: no model is loaded, and no images are needed.",
        examples="  trl_spatial evaluate replay RUN\n",
    )
    replay.add_argument("run", metavar="RUN", help="Folder of a run of `evaluate pairs` or `evaluate images`.")
    return parser


def main(args: argparse.Namespace) -> None:
    actions: dict[str, Callable[[argparse.Namespace], None]] = {
        "pairs": evaluate_pairs.main,
        "images": evaluate_images.run_images,
        "compare": evaluate_images.run_compare,
        "replay": _replay,
    }
    if find_spec("matplotlib") is None:  # fail before the work, not after it
        raise ValueError('The page of results needs matplotlib: pip install "trl-spatial[evaluate]"')
    actions[args.action](args)


def _replay(args: argparse.Namespace) -> None:
    folder = Path(args.run)
    kind = read_record(folder / "plan.json").get("kind")
    write_tables = {"pairs": evaluate_pairs.write_tables, "images": evaluate_images.write_tables}.get(str(kind))
    if write_tables is None:
        raise ValueError(f"{folder} holds no run of `evaluate pairs` or `evaluate images`.")
    with lock_folder(folder):
        print(write_tables(folder))


if __name__ == "__main__":
    raise SystemExit(run_command("trl_spatial evaluate", lambda: main(*make_parser().parse_args_and_config())))
