"""`trl_spatial data`: build a preference dataset, make pairs of rendered scenes, validate a dataset."""

import argparse
import json
import sys
from pathlib import Path

from ..cli import run_command
from ..store import begin_folder, new_folder, read_record, write_record
from . import building
from .building import BUILD_EXAMPLES, add_building
from .datasets import load_dataset_dict, pick_split
from .parser import SpatialParser


MAKE_EXAMPLES = """\
  trl_spatial data make --num_pairs 1000 --output pairs
  trl_spatial data make --num_pairs 20000 --num_test_pairs 2000 --image_size 256 --num_proc 8 --output pairs
  trl_spatial data make --num_pairs 500 --relations left_of right_of --levels 1 --both_directions --output flips
"""
VALIDATE_EXAMPLES = """\
  trl_spatial data validate pairs
  trl_spatial data validate ORG/SpatialReward --splits test --max_rows 1000 --json
  trl_spatial data validate pairs --output pairs-statistics
"""


def make_parser(prog: str = "trl_spatial data") -> SpatialParser:
    parser = SpatialParser(
        prog=prog,
        description="Build, make and check preference datasets.",
        examples=MAKE_EXAMPLES + BUILD_EXAMPLES + VALIDATE_EXAMPLES,
    )
    commands = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_make(commands)
    add_building(commands)
    _add_validate(commands)
    return parser


def _add_make(commands: argparse._SubParsersAction) -> None:
    make = commands.add_parser(
        "make",
        help="make preference pairs of rendered scenes",
        description="Make preference pairs of rendered scenes, with a train and a test split that share no scene. Pass the "
        "folder to `trl_spatial reward --dataset` or `datasets.load_from_disk`.",
        examples=MAKE_EXAMPLES,
    )
    make.add_argument("--num_pairs", type=int, required=True, help="Number of training pairs.")
    make.add_argument("--num_test_pairs", type=int, default=0, help="Number of test pairs; 0: no test split.")
    make.add_argument("--output", required=True, help="Output folder; it must be empty or not exist yet.")
    make.add_argument("--seed", type=int, default=0, help="Seed; the same seed gives the same pairs.")
    make.add_argument("--image_size", type=int, default=64, help="Width and height of the images, in pixels.")
    make.add_argument("--levels", type=int, nargs="+", default=[1, 2, 3], help="Numbers of changed relations.")
    make.add_argument("--relations", nargs="+", help="Kinds of relations; by default all.")
    make.add_argument(
        "--num_objects", type=int, nargs=2, default=[2, 4], metavar=("LEAST", "LARGEST"), help="Objects in a scene."
    )
    make.add_argument(
        "--num_relations",
        type=int,
        nargs=2,
        default=[1, 4],
        metavar=("LEAST", "LARGEST"),
        help="Relations in a prompt.",
    )
    make.add_argument(
        "--both_directions", action="store_true", help="Write every pair twice, the second time reversed."
    )
    make.add_argument("--num_proc", type=int, help="Number of processes.")


def _add_validate(commands: argparse._SubParsersAction) -> None:
    validate = commands.add_parser(
        "validate",
        help="check the rows of a preference dataset and count what is in it",
        description="Check a preference dataset: its columns, every row, every image to its last byte, and whether splits "
        "share images or prompts. The exit code is 1 if there are errors, and 0 if there are only warnings or none.",
        examples=VALIDATE_EXAMPLES,
    )
    validate.add_argument(
        "dataset",
        metavar="REF",
        help="Folder written by `save_to_disk`; a .parquet, .json, .jsonl or .csv file, or a folder of them; or a dataset "
        "on the Hub: ORG/NAME, ORG/NAME@REVISION, or hub/NAME for one of your own.",
    )
    validate.add_argument("--config_name", help="Configuration of a dataset on the Hub.")
    validate.add_argument("--splits", nargs="+", metavar="SPLIT", help="Splits to check; by default all.")
    validate.add_argument("--max_rows", type=int, help="Check only the first rows of each split; by default all.")
    validate.add_argument(
        "--output",
        help="Folder for statistics.json (what --json prints) and statistics.png; it must be empty or not exist yet.",
    )
    validate.add_argument("--json", action="store_true", help="Print JSON instead of a report.")


def main(args: argparse.Namespace) -> None:
    {"make": _make, "validate": _validate}.get(args.action, building.main)(args)


def _make(args: argparse.Namespace) -> None:
    if args.num_pairs == args.num_test_pairs == 0:
        raise ValueError(
            "`--num_pairs` and `--num_test_pairs` are 0: there is nothing to make. Set at least one to a positive number."
        )
    output = Path(args.output)
    arguments = {name: value for name, value in vars(args).items() if name not in ("output", "num_proc")}
    if read_record(output / "arguments.json") == arguments:
        print(f"{output} already holds these pairs.")
        return
    new_folder(args.output)
    from datasets import DatasetDict

    from ..scenes import RELATIONS, make_preference_dataset

    dataset = DatasetDict(
        {
            split: make_preference_dataset(
                num_pairs,
                split=split,
                seed=args.seed,
                levels=args.levels,
                num_objects=tuple(args.num_objects),
                num_relations=tuple(args.num_relations),
                relations=args.relations or tuple(RELATIONS),
                image_size=args.image_size,
                both_directions=args.both_directions,
                num_proc=args.num_proc,
            )
            for split, num_pairs in (("train", args.num_pairs), ("test", args.num_test_pairs))
            if num_pairs
        }
    )
    # all or nothing, so that a killed run leaves nothing that the next one would refuse
    partial = output.with_name(f".{output.name}.partial")
    begin_folder(partial)
    dataset.save_to_disk(partial)
    write_record(partial / "arguments.json", arguments)
    partial.replace(output)
    rows = ", ".join(f"{len(pairs)} rows in the {split} split" for split, pairs in dataset.items())
    print(f"Saved to {output}: {rows}")


def _validate(args: argparse.Namespace) -> None:
    output = new_folder(args.output) if args.output is not None else None
    if output is not None:
        try:
            from ..data import charts
        except ModuleNotFoundError as error:
            raise ValueError(f'--output draws a figure with {error.name}: pip install "trl-spatial[data]"') from error
    from ..data import format_report, validate_splits

    splits = load_dataset_dict(args.dataset, config_name=args.config_name)
    if args.splits:
        splits = {split: pick_split(splits, split, args.dataset, option="--splits") for split in args.splits}
    report = validate_splits(splits, max_rows=args.max_rows, show_progress=True)
    text = json.dumps(report.to_dict(), indent=1, ensure_ascii=False)
    print(text if args.json else format_report(report, args.dataset), flush=True)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "statistics.json").write_text(f"{text}\n", encoding="utf-8")
        charts.save_statistics(report.statistics, output / "statistics.png", title=args.dataset)
        print(f"Saved to {output}: statistics.json, statistics.png", file=sys.stderr)
    if report.errors:
        number = len(report.errors)
        raise ValueError(f"{args.dataset} has {number:,} error{'' if number == 1 else 's'}; the report lists them.")


if __name__ == "__main__":
    raise SystemExit(run_command("trl_spatial data", lambda: main(*make_parser().parse_args_and_config())))
