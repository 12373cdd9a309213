"""How fast are the recipes at true size on one GPU, which levers help, and does memory stay below `--estimate`?

    python recipes/bench_gpu.py --output bench_gpu

Runs FLUX.1-dev, Qwen-Image and SpatialScore on Qwen2.5-VL-7B in their true architectures with random weights, so no model files
are needed. The generators' rows are updates of [`DiffusionGRPOTrainer`] with the recipes' own settings, including KL and its
reference pass, on one group of `--num_images` images; rows with "filter" train on half of them. Text encoders and rewards are left
out unless the row says "real": they run once per prompt and alongside the generator. The targets are 1 image per second for
FLUX.1-dev, 0.5 for Qwen-Image with guidance, and 45 % of the matmul ceiling for training SpatialScore.

Rows run in order of priority. Each is written as soon as it is measured, and the same command resumes after the last one; with
`--minutes`, it stops before a row that would not fit. A row that fails is recorded with what it had measured so far. To measure it
again, remove it from the JSON file. `--tiny` runs the same code on tiny models, also on the CPU.
"""

import argparse
import gc
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from gpu.clock import copy_bandwidth, matmul_ceiling
from gpu.prediction import Prediction, predict
from gpu.rows import Row, all_rows

from trl_spatial.store import write_atomically


UNFINISHED = "did not end"
# the targets for one H100: images per second, or share of the matmul ceiling
MARKS = {
    "FLUX.1-dev: filter, window 2, compile": ("images_per_second", 1.0),
    "Qwen-Image, guided: filter, window 2, compile": ("images_per_second", 0.5),
    "SpatialScore-7B: training, 1024²": ("share_of_ceiling", 0.45),
}


class Results:
    """
    The measurements so far, which are saved after every row.

    Args:
        output (`str`):
            Path of the JSON file and of the table, without their extensions.

    Exits the program if the JSON file is damaged.
    """

    def __init__(self, output: str):
        path = Path(output)
        self.path, self.table = (path.with_name(f"{path.name}.{ending}") for ending in ("json", "md"))
        self.rows: dict[str, dict[str, Any]] = {}
        self.about: dict[str, Any] = {}
        if self.path.is_file():
            try:
                stored = json.loads(self.path.read_text(encoding="utf-8"))
                self.rows, self.about = dict(stored["rows"]), dict(stored["about"])
            except (ValueError, KeyError, TypeError) as error:
                sys.exit(f"{self.path} is damaged ({error!r}). Repair or remove it, or choose another --output.")

    def begin(self, device: torch.device, settings: dict[str, Any], command: str) -> None:
        """Records the device, versions and settings; exits if existing rows were measured with others."""
        now = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            "versions": {module.__name__: module.__version__ for module in (torch, diffusers, transformers)},
            "settings": settings,
        }
        for key, value in now.items():
            if self.about.get(key, value) != value:
                sys.exit(f"{self.path} holds rows of other {key}: {self.about[key]}, and now they are {value}. "
                         "Choose another --output.")  # fmt: skip
        if not self.about:
            self.about = {**now, "ceiling": matmul_ceiling(device), "bandwidth": copy_bandwidth(device)}
        self.about["command"] = command

    def add(self, name: str, values: dict[str, Any]) -> None:
        """Adds measurements to a row and saves both files."""
        row = self.rows.setdefault(name, {})
        for key, value in values.items():
            row[key] = {**row.get(key, {}), **value} if isinstance(value, dict) else value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps({"about": self.about, "rows": self.rows}, indent=2) + "\n")
        write_atomically(self.table, to_markdown(self.about, self.rows))


def run_row(name: str, row: Row, args: argparse.Namespace, device: torch.device, results: Results) -> None:
    """Measures a row. What it has reported is kept even if it then fails."""
    results.add(name, {"note": UNFINISHED})
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def report(values: dict[str, Any]) -> None:
        if device.type == "cuda":  # some rows reset the peak in every phase
            peaks = torch.cuda.max_memory_allocated(device) / 2**30, values.get("peak_gib", 0.0)
            values["peak_gib"] = max(*peaks, results.rows[name].get("peak_gib", 0.0))
        results.add(name, values)

    start, note, is_device_lost = time.monotonic(), "", False
    try:
        row.measure(args, device, report)
    except torch.OutOfMemoryError as error:
        note = f"out of memory: {str(error).splitlines()[0]}"
    except Exception as error:  # a kernel or a library that this machine lacks: the next row may run
        traceback.print_exc()
        note = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        is_device_lost = isinstance(error, torch.AcceleratorError)
    results.add(name, {"note": note, "minutes": (time.monotonic() - start) / 60})
    if is_device_lost:
        sys.exit(
            f"{name}: {note}. This process can use the device no more: the same command continues with the next row."
        )
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def to_markdown(about: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    """Formats the table of measurements next to predictions."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"{about['device']}, {versions}. Ceiling of a matrix product: {about['ceiling'] / 1e12:.1f} TFLOP/s; of a copy: "
        f"{about['bandwidth'] / 1e12:.2f} TB/s. `{about['command']}`",
        "",
        "| row | per s | predicted | seconds of each phase | peak GiB | share of ceiling | note |",
        "|---|---|---|---|---|---|---|",
    ]
    predictions: dict[str, Prediction] = {} if about["settings"]["tiny"] else predict()
    for name, row in rows.items():
        lines.append(_line(name, row, predictions.get(name), about))
    return "\n".join(lines) + "\n"


def _line(name: str, row: dict[str, Any], prediction: Prediction | None, about: dict[str, Any]) -> str:
    rate = row.get("images_per_second", row.get("pairs_per_second"))
    unit = "pairs" if "pairs_per_second" in row else "images"
    share = None
    if rate is not None and prediction is not None:
        share = rate * prediction.flops / about["ceiling"]
    notes = [row["note"]] if row["note"] else []
    if name in MARKS and about["device"] != "CPU" and not about["settings"]["tiny"]:
        key, mark = MARKS[name]
        reached = share if key == "share_of_ceiling" else rate
        if reached is not None:
            notes.append(f"the mark of an H100, {mark:g}, is {'passed' if reached >= mark else 'missed'}")
    if "estimated_gib" in row:
        notes.append("; ".join(f"{phase} {size:.1f} GiB estimated" for phase, size in row["estimated_gib"].items()))
    phases = [f"{phase} {seconds:.3g}" for phase, seconds in row.get("seconds", {}).items() if phase != "step"]
    peaks = [f"{phase} {size:.1f}" for phase, size in row.get("phases_gib", {}).items()]
    cells = [
        "" if rate is None else f"{rate:.3g} {unit}",
        "" if prediction is None or prediction.rate is None else f"{prediction.rate:.3g}",
        ", ".join(phases),
        ", ".join(peaks) or (f"{row['peak_gib']:.1f}" if "peak_gib" in row else ""),
        "" if share is None else f"{share:.0%}",
        "; ".join(notes),
    ]
    return f"| {name} | {' | '.join(cells)} |"


def predicted_table() -> str:
    """Formats the predictions of all rows, without measuring any."""
    lines = ["| row | predicted per s | TFLOP each | minutes it may take |", "|---|---|---|---|"]
    predictions = predict()
    for name, row in all_rows().items():
        prediction = predictions.get(name)
        rate = "" if prediction is None or prediction.rate is None else f"{prediction.rate:.2f}"
        flops = "" if prediction is None else f"{prediction.flops / 1e12:.0f}"
        lines.append(f"| {name} | {rate} | {flops} | {row.minutes:g} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--output", help="writes OUTPUT.json and OUTPUT.md; continues what is there")
    what.add_argument(
        "--predict", action="store_true", help="print what is predicted of every row, and measure nothing"
    )
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only rows whose name has one of these in it")
    parser.add_argument("--minutes", type=float, help="end before a row that would take longer than this in all")
    parser.add_argument("--size", type=int, default=512, help="width and height of trained images in pixels")
    parser.add_argument(
        "--num_images", type=int, default=8, help="images of a group, a multiple of 4 and --batch_size"
    )
    parser.add_argument("--batch_size", type=int, default=4, help="images, or pairs, at once")
    parser.add_argument("--repeats", type=int, default=2, help="updates, or calls, after one that sets everything up")
    parser.add_argument("--tiny", action="store_true", help="tiny models at 64²: whether it runs")
    args = parser.parse_args(argv)
    if args.predict:
        print(predicted_table())
        return {}
    if args.tiny:
        args.size, args.num_images, args.batch_size, args.repeats = 64, 4, 2, 1
    rows = {name: row for name, row in all_rows().items() if not args.only or any(text in name for text in args.only)}
    if unknown := [text for text in args.only or () if not any(text in name for name in rows)]:
        parser.error(f"--only: no row has {' or '.join(map(repr, unknown))} in its name")
    start = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = Results(args.output)
    settings = {key: value for key, value in vars(args).items() if key not in ("output", "only", "minutes", "predict")}
    command = " ".join(["python recipes/bench_gpu.py", *(sys.argv[1:] if argv is None else argv)])
    results.begin(device, settings, command)
    for name, row in rows.items():
        if name in results.rows:
            continue
        if args.minutes is not None and (time.monotonic() - start) / 60 + row.minutes > args.minutes:
            print(f"{name} may take {row.minutes:g} minutes more: the same command continues with it", flush=True)
            break
        run_row(name, row, args, device, results)
        print(name, results.rows[name], flush=True)
    return {"about": results.about, "rows": results.rows}


if __name__ == "__main__":
    main()
