"""The actions of `trl_spatial data` that build a preference dataset."""

import argparse
import json
import os
import secrets
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from ..store import PROCESS, lock_folder, read_record, write_atomically, write_record


if TYPE_CHECKING:
    from ..data.building.build_store import BuildStore


BUILD_EXAMPLES = """\
  # a small dataset of rendered scenes, on a laptop
  trl_spatial data build recipes/data/small.yaml

  # what the paper's own recipe would take: calls, GPU hours, money; nothing is drawn
  trl_spatial data build recipes/data/spatialreward.yaml --estimate

  # stage by stage; people review between filter and export
  trl_spatial data prompts recipe.yaml
  trl_spatial data render STORE --engine ray --num_workers 8
  trl_spatial data review STORE
  trl_spatial data export STORE --output SpatialReward
  trl_spatial data status STORE
"""
_HELP = {
    "build": "build a preference dataset from a recipe: all stages",
    "prompts": "first stage: write prompts",
    "perturb": "second stage: change relations in the prompts",
    "render": "third stage: draw both images of every pair",
    "filter": "fourth stage: have judges check every pair",
    "review": "fifth stage: serve a page where people judge the pairs that judges disagree on",
    "export": "sixth stage: write the accepted pairs as a dataset",
    "stats": "write a page that shows what is in the dataset",
    "status": "show the progress of every stage, and why pairs were dropped",
}
_STAGES = ("prompts", "perturb", "render", "filter")


def add_building(commands: argparse._SubParsersAction) -> None:
    """Adds the actions to the parser of `trl_spatial data`."""
    for action, text in _HELP.items():
        parser = commands.add_parser(
            action, help=text, description=f"{text[0].upper()}{text[1:]}.", examples=BUILD_EXAMPLES
        )
        parser.add_argument(
            "store", metavar="STORE", help="Recipe (a YAML file that names the folder of the dataset), or that folder."
        )
        if action in ("build", *_STAGES):
            parser.add_argument(
                "--estimate", action="store_true", help="Only print what would be done and what it would cost."
            )
        if action in ("build", "render"):
            parser.add_argument(
                "--engine",
                default="local",
                choices=["local", "ray"],
                help="Where images are drawn: in this process, or by Ray workers.",
            )
            parser.add_argument("--num_workers", type=int, help="Ray workers; by default one per GPU, or per core.")
            parser.add_argument("--address", help="Ray cluster to use; by default one is started on this machine.")
        if action in ("build", "export"):
            parser.add_argument("--output", help="Folder of the dataset; by default `dataset` in the store.")
        if action == "export":
            parser.add_argument(
                "--format",
                default="hub",
                choices=["hub", "flow-factory", "diffusion-dpo"],
                help="hub: Parquet and a card, for `trl_spatial push`; the others are the formats of those trainers.",
            )
        if action == "review":
            _add_review(parser)
        if action == "status":
            parser.add_argument("--json", action="store_true", help="Print JSON instead of text.")


def _add_review(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on; by default this machine only.")
    parser.add_argument("--port", type=int, default=8765, help="Port to listen on.")
    parser.add_argument(
        "--to_label_studio", metavar="FILE", help="Write the pairs and votes as Label Studio tasks, and exit."
    )
    parser.add_argument(
        "--from_label_studio", metavar="FILE", help="Add the votes of a Label Studio export, and exit."
    )


def main(args: argparse.Namespace) -> None:
    """Runs one of the actions."""
    from ..data.building.build_store import BuildStore

    store = BuildStore(args.store)
    actions: dict[str, Callable[[argparse.Namespace, BuildStore], None]] = {
        "review": _review,
        "export": _export,
        "status": _status,
    }
    actions.get(args.action, _run)(args, store)


def _run(args: argparse.Namespace, store: "BuildStore") -> None:
    from ..data.building.build import STAGES, run_stage
    from ..data.building.plan import format_plan, plan

    if getattr(args, "estimate", False):
        print(format_plan(plan(store)))
        return
    if PROCESS > 0 and args.action != "render":
        raise ValueError(f"`data {args.action}` runs in one process. Only `data render` can be launched in several.")
    options = {name: getattr(args, name) for name in ("engine", "num_workers", "address") if hasattr(args, name)}
    with ExitStack() as stack:
        store.open(stack)
        if PROCESS == 0:
            print(format_plan(plan(store)), flush=True)
        for stage in STAGES if args.action == "build" else (args.action,):
            if message := run_stage(store, stage, output=_output(args, store), **options):
                print(message, flush=True)


def _output(args: argparse.Namespace, store: "BuildStore") -> Path:
    return store.folder / "dataset" if getattr(args, "output", None) is None else Path(args.output)


def _export(args: argparse.Namespace, store: "BuildStore") -> None:
    from ..data.building.build import describe_export
    from ..data.building.export import export_dataset

    output = _output(args, store)
    print(describe_export(store, output, export_dataset(store, output, form=args.format)))


def _status(args: argparse.Namespace, store: "BuildStore") -> None:
    from ..data.building.plan import format_status, status

    found = status(store)
    print(json.dumps(found, indent=1) if args.json else format_status(found))


def _review(args: argparse.Namespace, store: "BuildStore") -> None:
    from ..data.building.decisions import review_items
    from ..data.building.filter import drawn_pairs
    from ..data.review import VoteLog, create_review_app, from_label_studio, serve_review, to_label_studio
    from ..data.review.server import LOOPBACK

    items = review_items(store)
    if not items:
        raise ValueError(
            "There is nothing to review: the judges agree on every pair, and no share of pairs is set aside for reviewers (see "
            f"`trl_spatial data status {store.folder}`)."
        )
    with ExitStack() as stack:
        (store.folder / "review").mkdir(exist_ok=True)
        stack.enter_context(lock_folder(store.folder / "review"))  # a separate lock: other stages can run meanwhile
        votes = VoteLog(store.votes_file)
        if args.to_label_studio is not None:
            tasks = to_label_studio(items, votes.current().values())
            text = json.dumps(tasks, indent=1, ensure_ascii=False) + "\n"
            write_atomically(args.to_label_studio, text)
            print(f"Saved to {args.to_label_studio}: {len(tasks):,} tasks")
            return
        if args.from_label_studio is not None:
            try:
                given = from_label_studio(json.loads(Path(args.from_label_studio).read_text(encoding="utf-8")))
            except ValueError as error:
                raise ValueError(f"{args.from_label_studio}: {error}") from error
            if unknown := sorted({vote["item"].rpartition(":")[0] for vote in given} - drawn_pairs(store).keys()):
                raise ValueError(
                    f"{args.from_label_studio} has votes on {unknown[0]}, which is not a pair of this store."
                )
            print(f"Added {sum(votes.add_changed(vote) for vote in given):,} of {len(given):,} votes.")
            return
        reviewers = _reviewer_tokens(store)
        app = create_review_app(
            items,
            votes,
            reviewers=reviewers,
            votes_per_item=store.recipe.review.votes_per_item,
            seed=store.recipe.seed,
            allowed_hosts=LOOPBACK if args.host in LOOPBACK else [args.host] if args.host != "0.0.0.0" else ["*"],
        )
        for token, name in reviewers.items():
            print(f"{name}: http://{args.host}:{args.port}/?token={token}", flush=True)
        print("Press Ctrl-C to stop; votes are kept.", file=sys.stderr, flush=True)
        serve_review(app, host=args.host, port=args.port)


def _reviewer_tokens(store: "BuildStore") -> dict[str, str]:
    """Returns token → name of each reviewer; tokens are kept on disk, so that addresses stay valid."""
    path = store.folder / "reviewers.json"
    tokens = {token: name for token, name in read_record(path).items() if name in store.recipe.review.reviewers}
    for name in store.recipe.review.reviewers:
        if name not in tokens.values():
            tokens[secrets.token_urlsafe(16)] = name
    write_record(path, tokens)
    if os.name == "posix":
        path.chmod(0o600)
    return tokens
