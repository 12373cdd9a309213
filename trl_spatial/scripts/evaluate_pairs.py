"""The action `trl_spatial evaluate pairs`."""

import argparse
import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..store import cache_folder, lock_folder
from .datasets import load_dataset_dict, pick_split
from .parser import check_device, quick_imports


if TYPE_CHECKING:
    from ..endpoints import Prices, Spend
    from ..evaluation.pair_run import PairRun
    from ..evaluation.pair_set import PairSet

CONTROLS = ("flip", "image_only", "prompt_swap")  # as in `evaluation.pair_controls`, which takes seconds to import
MMRB2 = "mmrb2:"

PAIRS_EXAMPLES = """\
  # rules and a reward model on rendered scenes
  trl_spatial evaluate pairs --dataset pairs --scorers rules pixels spatialscore:SpatialScore-7B --output_dir runs/pairs

  # a judge behind a server, for at most 5 dollars; prices are per million tokens read and written
  trl_spatial evaluate pairs --dataset ORG/SpatialReward --limit 365 --output_dir runs/judge \\
      --scorers judge-pairwise:https://api.openai.com/v1#gpt-5 --prices gpt-5=1.25/10 --max_cost 5

  # pairs with human preferences, downloaded with the benchmark authors' program
  trl_spatial evaluate pairs --dataset mmrb2:MMRB2 --scorers pickscore spatialscore:SpatialScore-7B --output_dir runs/mmrb2
"""


def add_pairs(commands: argparse._SubParsersAction) -> None:
    """Adds the action to the parser of `trl_spatial evaluate`."""
    parser = commands.add_parser(
        "pairs",
        help="measure how often scorers order the two images of a pair correctly",
        description="Measure how often image scorers order the two images of a preference pair correctly, with intervals, paired "
        "tests and controls. Every answer is kept in the output folder; the same command continues an interrupted run, and more "
        "scorers can be added to it.",
        examples=PAIRS_EXAMPLES,
    )
    parser.add_argument(
        "--dataset",
        metavar="REF",
        required=True,
        help="Preference pairs: a folder written by `save_to_disk`, a .parquet, .json, .jsonl or .csv file, a dataset on the Hub "
        "(ORG/NAME, ORG/NAME@REVISION, hub/NAME), or mmrb2:FOLDER for Multimodal RewardBench 2.",
    )
    parser.add_argument("--config_name", help="Configuration of a dataset on the Hub.")
    parser.add_argument("--split", default="test", help="Split of the dataset; a file is the split `train`.")
    parser.add_argument(
        "--scorers",
        nargs="+",
        required=True,
        metavar="NAME[:MODEL]",
        help="Scorers: rules, pixels, spatialscore:MODEL, clipscore, pickscore, image-reward, hpsv2:FOLDER, hpsv3:MODEL, "
        "hpsv3++:FOLDER, geneval:MODEL, vqascore:MODEL, unified-reward:MODEL, judge-pairwise:MODEL, judge-pointwise:MODEL, or a "
        "function module:function. For vqascore, unified-reward and the judges, MODEL may be http://HOST:PORT/v1#MODEL.",
    )
    parser.add_argument("--output_dir", required=True, help="Folder of the run: a new one, or one to continue.")
    parser.add_argument("--limit", type=int, help="Use only the first pairs, this many; by default all.")
    parser.add_argument(
        "--controls",
        nargs="+",
        choices=CONTROLS,
        default=list(CONTROLS),
        help="Additional ways to show each pair: mirrored, without a prompt, with the prompt of another pair.",
    )
    parser.add_argument(
        "--no_controls", action="store_const", const=[], dest="controls", help="Only show pairs as they are."
    )
    parser.add_argument("--batch_size", type=int, default=8, help="Number of pairs passed to a scorer at a time.")
    parser.add_argument("--device", help="Device, e.g. cuda:1; by default the first GPU if there is one.")
    add_spending(parser)


def add_spending(parser: argparse.ArgumentParser) -> None:
    """Adds the options about the cost of models behind servers."""
    parser.add_argument("--max_cost", type=float, help="Limit on the cost of models behind servers, in US dollars.")
    parser.add_argument(
        "--prices",
        nargs="+",
        default=[],
        metavar="MODEL=INPUT/OUTPUT",
        help="US dollars per million tokens that a model behind a server reads and writes.",
    )


def main(args: argparse.Namespace) -> None:
    """Runs the action."""
    if args.batch_size < 1:
        raise ValueError(f"--batch_size is {args.batch_size}. It must be at least 1.")
    check_device("--device", args.device)
    specs = list(dict.fromkeys(args.scorers))
    with quick_imports():
        from ..evaluation.pair_run import PairRun, read_run
        from ..evaluation.pair_tables import make_results
        from ..evaluation.scorers import find_scorer

    for spec in specs:  # fail before the work, not after it
        find_scorer(spec)
    prices = {spec: find_prices(spec.partition(":")[2], args.prices, args.max_cost is not None) for spec in specs}
    pairs = _load_pairs(args)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        run = PairRun(folder, pairs)
        spend = run.spend() if args.max_cost is None else run.spend(args.max_cost)
        for spec in specs:
            _measure(run, spec, args, spend, prices[spec])
        run.save_images(make_results(*read_run(folder))["examples"])
        print(write_tables(folder))


def write_tables(folder: Path) -> str:
    """Makes the tables of a run from its records: results.json, results.md and report.html in its folder. Returns the Markdown."""
    from ..evaluation.pair_run import replay_pairs
    from ..evaluation.pair_text import describe_pairs
    from ..evaluation.report import write_report

    results = replay_pairs(folder)
    write_report(folder, results)
    return f"{describe_pairs(results)}\nSaved to {folder}: results.json, results.md, report.html, cards/"


def _load_pairs(args: argparse.Namespace) -> "PairSet":
    from ..evaluation.mmrb2 import load_mmrb2
    from ..evaluation.pair_set import PairSet
    from ..hub.references import find_reference

    if args.dataset.startswith(MMRB2):
        return PairSet(load_mmrb2(args.dataset.removeprefix(MMRB2)), args.dataset, limit=args.limit)
    rows = pick_split(
        load_dataset_dict(args.dataset, config_name=args.config_name), args.split, args.dataset, option="--split"
    )
    path, reference = Path(args.dataset), find_reference(args.dataset, kind="dataset")
    return PairSet(
        rows,
        args.dataset,
        limit=args.limit,
        folder=path.parent if path.is_file() else path,
        dataset_id=None if reference.is_local else reference.name,
        split=args.split,
    )


def _measure(run: "PairRun", spec: str, args: argparse.Namespace, spend: "Spend", prices: "Prices | None") -> None:
    from ..evaluation.scorers import make_scorer

    if not run.tasks(spec, args.controls):
        print(f"{spec}: already measured", file=sys.stderr)
        return
    cache = cache_folder() / "answers.sqlite"
    scorer = make_scorer(spec, device=args.device, spend=spend, cache=cache, prices=prices)
    run.measure(spec, scorer, args.controls, batch_size=args.batch_size)
    del scorer
    free_memory()


def free_memory() -> None:
    """Gives back the memory of a model that is no longer used, for the next one."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def find_prices(reference: str, given: list[str], is_limited: bool) -> "Prices | None":
    """The prices of a model, if it is behind a server and they are given; a `ValueError` if they are needed for the limit."""
    from ..endpoints import Prices

    known = {}
    for text in given:
        model, _, numbers = text.rpartition("=")
        try:
            read, written = map(float, numbers.split("/"))
        except ValueError:
            raise ValueError(
                f"--prices {text} does not have the form MODEL=INPUT/OUTPUT, such as gpt-5=1.25/10."
            ) from None
        known[model] = Prices(input_per_million=read, output_per_million=written)
    if not reference.startswith(("http://", "https://")):
        return None
    model = reference.partition("#")[2]
    if is_limited and model not in known:
        raise ValueError(
            f"--max_cost needs the price of {model}: --prices {model}=INPUT/OUTPUT, or 0/0 if it is free."
        )
    return known.get(model)
