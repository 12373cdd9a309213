"""`trl_spatial push`: upload a model, a dataset or a Space to the Hub."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..cli import run_command
from .datasets import load_dataset_dict
from .parser import SpatialParser


if TYPE_CHECKING:
    from ..hub.checkpoints import Kind


EXAMPLES = """\
  # a trained reward model; LoRA weights of a diffusion model
  trl_spatial push SpatialScore-7B --to hub/SpatialScore-7B
  trl_spatial push FLUX.1-dev-SpatialScore --to ORG/FLUX.1-dev-SpatialScore --private

  # a dataset: Parquet, images included, and a card
  trl_spatial push pairs --to hub/SpatialReward --license apache-2.0

  # list what would be uploaded and what would not
  trl_spatial push SpatialScore-7B --to ORG/SpatialScore-7B --dry-run
"""


def make_parser(prog: str = "trl_spatial push") -> SpatialParser:
    parser = SpatialParser(
        prog=prog,
        usage=f"{prog} RUN --to NAME [OPTIONS]",
        description="Upload a folder to the Hub with a card that says how it was made and measured: a SpatialScore checkpoint, LoRA "
        "weights or a pipeline, a dataset, a Space. Only the files that belong to such a folder are uploaded; training states "
        "and other files stay here, and a file with a token or a local path is rejected. After an interruption, run the same "
        "command again to continue.",
        examples=EXAMPLES,
    )
    parser.add_argument("run", metavar="RUN", help="Folder of a training run, a merged model, a dataset or a Space.")
    repository = "Repository: ORG/NAME, or hub/NAME for NAME under your own namespace."
    parser.add_argument("--to", required=True, metavar="NAME", help=repository)
    parser.add_argument("--private", action="store_true", help="Make the repository private if it is new.")
    parser.add_argument(
        "--dry-run",
        "--dry_run",
        action="store_true",
        help="Show what would be uploaded and what would not, and upload nothing.",
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="Delete the other files of the repository in the same commit. Its history keeps them.",
    )
    parser.add_argument(
        "--base_model",
        help="Hub id of the base model, if RUN was trained from a local copy of it: ORG/NAME or hub/NAME.",
    )
    parser.add_argument("--license", help="License for the card, as a Hub license identifier such as apache-2.0.")
    parser.add_argument(
        "--config_name", default="default", help="For a dataset: name of its configuration in the repository."
    )
    parser.add_argument("--max_shard_size", default="500MB", help="For a dataset: maximum size of a Parquet shard.")
    return parser


def main(args: argparse.Namespace) -> None:
    from ..data.kinds import DATASET
    from ..diffusion_grpo.kinds import LORA, PIPELINE, TRANSFORMER
    from ..gaussian_reward.kinds import BACKBONE, SPATIAL_SCORE
    from ..hub.checkpoints import find_kind
    from ..hub.references import find_repository
    from ..space.build import SPACE

    kind = find_kind(args.run, (SPATIAL_SCORE, LORA, PIPELINE, TRANSFORMER, SPACE, DATASET, BACKBONE))
    repo_id = find_repository(args.to, kind=kind.repo_type)
    if kind.repo_type == "dataset":
        push_dataset(args, repo_id)
    else:
        push_folder(args, repo_id, kind)


def push_folder(args: argparse.Namespace, repo_id: str, kind: "Kind") -> None:
    """Upload a model or a Space, or show what would be uploaded."""
    from ..hub.checkpoints import collect_files, lacks_base_model, list_kept
    from ..hub.references import find_repository
    from ..hub.safety import check_public
    from ..hub.upload import create_repository, push_files

    base_model = None if args.base_model is None else find_repository(args.base_model, kind="model")
    files = collect_files(args.run, repo_id, kind=kind, base_model=base_model, license=args.license)
    if lacks_base_model(files):
        raise ValueError(
            f"{args.run} is an adapter for a local copy of its base model, so nobody else could load it. Name the base model on "
            "the Hub with --base_model ORG/NAME, or push a whole model: `trl_spatial merge --model "
            f"{args.run} --output MERGED`."
        )
    private = (Path(args.run),)
    if args.dry_run:
        check_public(files, private=private)
        show_plan(repo_id, kind, files, list_kept(args.run, files))
        return
    address = create_repository(repo_id, repo_type=kind.repo_type, private=args.private or None)
    push_files(
        files,
        repo_id,
        repo_type=kind.repo_type,
        message=f"Upload {kind.name}",
        private=private,
        replace=args.replace,
    )
    print(f"Pushed {len(files)} files, {format_size(files.values())}, to {address}")


def push_dataset(args: argparse.Namespace, repo_id: str) -> None:
    """Upload a dataset, or show what would be uploaded."""
    from ..data import export
    from ..data.kinds import FURTHER_CONFIGURATIONS, NOTES_FILE

    splits = export.prepare_splits(load_dataset_dict(args.run), args.run)
    # written by `trl_spatial data export`
    notes = Path(args.run) / NOTES_FILE
    others = {
        name: export.prepare_splits(load_dataset_dict(args.run, config_name=name), args.run)
        for name in (FURTHER_CONFIGURATIONS if notes.is_file() else ())
    }
    text = notes.read_text(encoding="utf-8") if notes.is_file() else None
    report = export.check_splits(splits)
    for finding in report.warnings[:5]:
        print(f"warning: {finding.place}: {finding.value} {finding.reason}")
    rows = ", ".join(f"{len(pairs):,} rows in the {split} split" for split, pairs in splits.items())
    if args.dry_run:
        card = export.card_files(
            splits, repo_id, report, config_name=args.config_name, license=args.license, notes=text
        )
        print(f"Would push a dataset to {repo_id}: {rows}, as Parquet, and {', '.join(card)}")
        return
    address = export.push_dataset(
        splits,
        repo_id,
        report,
        config_name=args.config_name,
        private=args.private or None,
        max_shard_size=args.max_shard_size,
        license=args.license,
        notes=text,
        others=others,
    )
    print(f"Pushed {rows} to {address}")


def show_plan(repo_id: str, kind: "Kind", files: dict[str, Path | bytes], kept: list[str]) -> None:
    """Print the files that would be uploaded, with their sizes, and what would stay."""
    print(f"Would push {kind.name} to {repo_id}:")
    for name, source in sorted(files.items()):
        print(f"  {format_size([source]):>9}  {name}")
    print(f"  {format_size(files.values()):>9}  in {len(files)} files")
    print(f"Would stay here: {', '.join(kept) or 'nothing'}")


def format_size(sources: Iterable[Path | bytes]) -> str:
    """The size of files together: 1536 bytes → `1.5 kB`."""
    size: float = sum(len(source) if isinstance(source, bytes) else source.stat().st_size for source in sources)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


if __name__ == "__main__":
    raise SystemExit(run_command("trl_spatial push", lambda: main(*make_parser().parse_args_and_config())))
