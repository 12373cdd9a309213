"""`trl_spatial score`: score images for prompts."""

import argparse
import itertools
import json
import math
import os
import sys
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..cli import run_command
from .datasets import load_dataset_dict, pick_split
from .parser import SpatialParser, check_device, quick_imports
from .places import new_file


if TYPE_CHECKING:
    from ..gaussian_reward.scoring import SpatialScore


Row = tuple[int, Any, Any, str]  # number, prompt, image, name of the image

EXAMPLES = """\
  # rank images for one prompt
  trl_spatial score --model ORG/SpatialScore-7B --prompt "a red cup to the left of a blue book" a.png b.png c.png

  # score pairs of a prompt and an image; each line of pairs.jsonl is {"prompt": "...", "image": "a.png"}
  trl_spatial score --model SpatialScore-7B --input pairs.jsonl --output scores.jsonl

  # one image column of a dataset
  trl_spatial score --model SpatialScore-7B --input ORG/SpatialReward --split test --image_column chosen --json
"""


def make_parser(prog: str = "trl_spatial score") -> SpatialParser:
    parser = SpatialParser(
        prog=prog,
        usage=f"{prog} --model MODEL (--prompt PROMPT IMAGE [IMAGE ...] | --input INPUT) [OPTIONS]",
        description="Score images for prompts: the mean of the score says how well the image matches the prompt's objects and "
        "their positions. The standard deviation is the spread that the model gives the score, not a measure of its confidence.",
        examples=EXAMPLES,
    )
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="Image files to score for --prompt and rank.")
    parser.add_argument(
        "--model",
        required=True,
        help="Checkpoint, with an adapter or merged: a folder, or a name on the Hub (ORG/NAME, ORG/NAME@REVISION, hub/NAME).",
    )
    parser.add_argument("--revision", help="Branch, tag or commit of the checkpoint on the Hub.")
    parser.add_argument("--backbone", help="Folder or Hub id of the backbone, if it is not where the checkpoint says.")
    parser.add_argument("--prompt", help="Text that the images were made from.")
    parser.add_argument(
        "--input",
        help="Prompts and images: a .jsonl, .json, .csv or .parquet file (image paths are relative to it), a dataset "
        "folder, or a dataset on the Hub (ORG/NAME, ORG/NAME@REVISION, hub/NAME).",
    )
    parser.add_argument("--input_config", help="Configuration of --input, if it is a dataset on the Hub.")
    parser.add_argument("--split", default="train", help="Split of --input; a file is the split `train`.")
    parser.add_argument("--prompt_column", default="prompt", help="Column of --input with the prompts.")
    parser.add_argument("--image_column", default="image", help="Column of --input with the images.")
    parser.add_argument("--batch_size", type=int, default=8, help="Images per forward pass.")
    parser.add_argument("--device", help="Device, e.g. cuda:1; by default the first GPU if there is one.")
    parser.add_argument(
        "--dtype", default="auto", choices=["auto", "bfloat16", "float16", "float32"], help="Type of the weights."
    )
    parser.add_attention_argument()
    parser.add_argument("--json", action="store_true", help="Print JSON lines instead of a table.")
    parser.add_argument("--output", type=new_file, help="File to write the scores to, as JSON lines.")
    return parser


def main(args: argparse.Namespace) -> None:
    if (args.prompt is None) == (args.input is None):
        raise ValueError("Give either --prompt and image files, or --input.")
    if args.input is not None and args.images:
        raise ValueError(f"With --input, no image files are expected, but got {args.images[0]}.")
    if args.prompt is not None and not args.images:
        raise ValueError("--prompt needs at least one image file.")
    if args.batch_size < 1:
        raise ValueError(f"--batch_size is {args.batch_size}. Use at least 1.")
    check_device("--device", args.device)
    if args.prompt is not None:
        rows: Sequence[Row] = [(number, args.prompt, image, image) for number, image in enumerate(args.images)]
    else:
        rows = InputRows(args.input, args.split, args.prompt_column, args.image_column, config_name=args.input_config)

    if args.output is not None:  # fail before the work, not after it
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        with open(args.output, "a", encoding="utf-8"):
            pass
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # an ASCII-only terminal must not end the run
            stream.reconfigure(errors="backslashreplace")

    with quick_imports():
        from .. import SpatialScore

    scorer = SpatialScore.from_pretrained(
        args.model,
        revision=args.revision,
        backbone=args.backbone,
        dtype=args.dtype,
        device=args.device,
        attn_implementation=args.attn_implementation,
    )
    model = f"{args.model}@{scorer.fingerprint}"
    if args.prompt is not None:
        rank_images(args, scorer, rows, model)
    else:
        score_input(args, scorer, rows, model)


def rank_images(args: argparse.Namespace, scorer: "SpatialScore", rows: Sequence[Row], model: str) -> None:
    """Scores the images of --prompt and shows the best first."""
    records: list[dict[str, Any]] = []
    for start in range(0, len(rows), max(64, args.batch_size)):
        chunk = rows[start : start + max(64, args.batch_size)]
        records += score_records(scorer, chunk, model, batch_size=args.batch_size)
    records.sort(key=lambda record: -record.get("mean", -math.inf))
    records = [{"rank": rank, **record} for rank, record in enumerate(records, start=1)]
    if args.output is not None:
        Path(args.output).write_text("".join(map(to_line, records)), encoding="utf-8")
    show_scores(args, records)


def score_input(args: argparse.Namespace, scorer: "SpatialScore", rows: Sequence[Row], model: str) -> None:
    """Scores the rows of --input, those that --output lacks, and shows all of them. Only one part of them is in memory."""
    if args.output is not None:
        keep_scored(args, rows, model)
    with tempfile.TemporaryFile() if args.output is None else open(args.output, "r+b") as file:
        scores = ScoreFile(file, len(rows))
        missing = (number for number, place in enumerate(scores.places) if place < 0)
        while chunk := [rows[number] for number in itertools.islice(missing, max(64, args.batch_size))]:
            scores.append(score_records(scorer, chunk, model, batch_size=args.batch_size))
        show_scores(args, scores)


def show_scores(args: argparse.Namespace, records: Iterable[dict[str, Any]]) -> None:
    """Prints records; iterates over them several times."""
    num_rows, num_bad = 0, 0
    shown: list[str] = []
    for record in records:
        num_rows += 1
        if "error" in record:
            num_bad += 1
            if len(shown) < 5:
                shown.append(f"row {record['row']}: {record['error']}")
    if args.output is not None:
        print(f"{num_rows - num_bad} scores saved to {args.output}", file=sys.stderr)
    if args.json:
        for record in records:
            print(to_line(record), end="")
    else:
        print_table(records)
    if num_bad:
        more = f" and {num_bad - 5} more" if num_bad > 5 else ""
        raise ValueError(f"{num_bad} of {num_rows} rows have no score: {'; '.join(shown)}{more}")


class ScoreFile:
    """
    The scores of rows, as JSON lines in a file open for reading and writing. Lines are written in any order and read
    in the order of the rows; only their positions are in memory.
    """

    def __init__(self, file: IO[bytes], num_rows: int):
        self.file = file
        self.places = array("q", [-1]) * num_rows
        place = 0
        for line in file:
            self.places[json.loads(line)["row"]] = place
            place += len(line)

    def append(self, records: list[dict[str, Any]]) -> None:
        place = self.file.seek(0, os.SEEK_END)
        lines = [to_line(record).encode() for record in records]
        for record, line in zip(records, lines, strict=True):
            self.places[record["row"]] = place
            place += len(line)
        self.file.write(b"".join(lines))
        self.file.flush()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for place in self.places:
            self.file.seek(place)
            yield json.loads(self.file.readline())


def to_line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def keep_scored(args: argparse.Namespace, rows: Sequence[Row], model: str) -> None:
    """Removes from --output what an interrupted run did not score: bad rows, and a last line that was cut off."""
    output = Path(args.output)
    partial = output.with_name(
        f".{output.name}.{os.getpid()}.partial"
    )  # the old file stays until the new one is complete
    try:
        with (
            output.open(encoding="utf-8", newline="\n") as old,
            partial.open("w", encoding="utf-8", newline="\n") as new,
        ):
            for line in old:
                if not line.endswith("\n"):
                    break
                if "error" not in check_line(line, args, rows, model):
                    new.write(line)
        partial.replace(output)
    finally:
        partial.unlink(missing_ok=True)


def check_line(line: str, args: argparse.Namespace, rows: Sequence[Row], model: str) -> dict[str, Any]:
    """The record in a line of --output, which must be of the same input and model."""
    try:
        record = json.loads(line)
        number, prompt, _, name = rows[record["row"]]
        is_same = (record["row"], record["prompt"], record["image"]) == (number, prompt, name)
        earlier = record["model"]
    except (ValueError, KeyError, TypeError, IndexError):
        is_same = False
    if not is_same:
        raise ValueError(
            f"{args.output} holds rows other than those of {args.input}. Delete it, or name another file."
        )
    if earlier != model:
        raise ValueError(f"{args.output} holds scores of {earlier}, not of {model}. Delete it, or name another file.")
    return record


class InputRows(Sequence):
    """
    The rows of `--input`, read from the disk as they are needed; their images are not decoded.

    Raises:
        `ValueError`: If there is no such split or column.
    """

    def __init__(
        self, name_or_path: str, split: str, prompt_column: str, image_column: str, *, config_name: str | None = None
    ):
        from datasets import Image

        rows = pick_split(
            load_dataset_dict(name_or_path, config_name=config_name), split, name_or_path, option="--split"
        )
        for option, column in (("--prompt_column", prompt_column), ("--image_column", image_column)):
            if column not in rows.column_names:
                raise ValueError(
                    f"{name_or_path} has no column {column!r}; name one of {', '.join(rows.column_names)} with {option}."
                )
        self.is_embedded = isinstance(rows.features[image_column], Image)
        if self.is_embedded:
            rows = rows.cast_column(image_column, Image(decode=False))
        self.rows, self.folder = rows, Path(name_or_path).parent
        self.prompt_column, self.image_column = prompt_column, image_column

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number):
        row = self.rows[number]
        prompt, image = row[self.prompt_column], row[self.image_column]
        if self.is_embedded:
            return number, prompt, image, (image or {}).get("path") or f"row {number}"
        if not isinstance(image, str):
            return number, prompt, image, f"row {number}"
        return number, prompt, image if "://" in image else str(self.folder / image), image


def score_records(scorer: "SpatialScore", rows: Sequence[Row], model: str, *, batch_size: int) -> list[dict[str, Any]]:
    """A record of each row: mean and std of the score, or the error of a bad row."""
    numbers, prompts, images, names = (list(column) for column in zip(*rows, strict=True))
    known = [
        {"row": number, "prompt": prompt, "image": name}
        for number, prompt, name in zip(numbers, prompts, names, strict=True)
    ]
    try:
        scores = scorer.score(prompts, images, batch_size=batch_size)
    except ValueError as error:
        if len(rows) == 1:
            message = str(error)  # it counts rows within this call, which has only one
            name = "The image" if names[0] == f"row {numbers[0]}" else str(names[0])
            for own, shown in (
                ("images[0]", name),
                ("The prompt of row 0", "The prompt"),
                ("prompts[0]", "The prompt"),
            ):
                if message.startswith(own):
                    message = shown + message.removeprefix(own)
            return [{**known[0], "error": message, "model": model}]
        half = len(rows) // 2
        return [
            record
            for part in (rows[:half], rows[half:])
            for record in score_records(scorer, part, model, batch_size=batch_size)
        ]
    return [
        {**record, "mean": float(mean), "std": float(std), "model": model}
        for record, mean, std in zip(known, scores.mean, scores.std, strict=True)
    ]


def print_table(records: Iterable[dict[str, Any]]) -> None:
    """Prints the records that have a score. Iterates over them twice: for the widths of the columns, then to print."""
    columns: list[str] = []
    widths: list[int] = []
    for record in records:
        if "error" in record:
            continue
        if not columns:  # a prompt shared by all rows is already on the command line
            hidden = {"row", "model"} | ({"prompt"} if "rank" in record else set())
            columns = [name for name in record if name not in hidden]
            widths = [len(name) for name in columns]
        widths = [max(width, len(cell)) for width, cell in zip(widths, cells_of(record, columns), strict=True)]
    if not columns:
        print()
        return
    scored = (cells_of(record, columns) for record in records if "error" not in record)
    for row in itertools.chain([columns], scored):
        padded = [
            cell.rjust(width) if name in ("rank", "mean", "std") else cell.ljust(width)
            for name, cell, width in zip(columns, row, widths, strict=True)
        ]
        print("  ".join(padded).rstrip())


def cells_of(record: dict[str, Any], columns: list[str]) -> list[str]:
    cells = [f"{record[name]:.3f}" if isinstance(record[name], float) else str(record[name]) for name in columns]
    return [cell if len(cell) <= 60 else f"{cell[:57]}..." for cell in cells]


if __name__ == "__main__":
    raise SystemExit(run_command("trl_spatial score", lambda: main(*make_parser().parse_args_and_config())))
