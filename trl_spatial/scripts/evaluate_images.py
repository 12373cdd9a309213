"""The actions of `trl_spatial evaluate` for images: `images`, `compare`."""

import argparse
import math
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..evaluation.benchmarks import BENCHMARKS
from ..evaluation.benchmarks.base import PROTOCOLS, Protocol
from ..store import PROCESS, cache_folder, lock_folder, write_atomically, write_record
from ..yaml_text import load_yaml
from .evaluate_pairs import add_spending, find_prices, free_memory
from .places import folder_or_name


if TYPE_CHECKING:
    from ..evaluation.image_run import ImagePlan


IMAGE_EXAMPLES = """\
  # offline in seconds: five prompts of our own in GenEval's format, drawn by a renderer, judged by its exact rules
  trl_spatial evaluate images --benchmark geneval --data example --generator flat --detector flat --colors flat --output_dir run

  # before and after reinforcement learning
  trl_spatial evaluate images --benchmark geneval --generator black-forest-labs/FLUX.1-dev \\
      --detector facebook/mask2former-swin-small-coco-instance --colors openai/clip-vit-large-patch14 --output_dir before
  trl_spatial evaluate images --benchmark geneval --generator black-forest-labs/FLUX.1-dev --lora FLUX.1-dev-SpatialScore \\
      --detector facebook/mask2former-swin-small-coco-instance --colors openai/clip-vit-large-patch14 --output_dir after
  trl_spatial evaluate compare before after

  # estimate the cost before anything is drawn or asked
  trl_spatial evaluate images --benchmark tiif --generator Qwen/Qwen-Image --vision https://HOST/v1#MODEL \\
      --prices MODEL=1.25/10 --output_dir tiif --dry_run

  # existing images, in the benchmark's own layout
  trl_spatial evaluate images --benchmark dpg-bench --images FOLDER --vision Qwen/Qwen2.5-VL-7B-Instruct --output_dir dpg
"""
_ROLE_HELP = {
    "vision": "Vision-language model that answers questions: a folder, a name on the Hub, http://HOST:PORT/v1#MODEL, or "
    "module:function.",
    "detector": "Detector that finds objects: a folder, a name on the Hub, module:function, or `flat`, the exact rules of rendered "
    "scenes.",
    "second_detector": "Second detector, for benchmarks that use two.",
    "colors": "Zero-shot image classification model that names colors, module:function, or `flat`.",
    "depth": "Depth model, module:function, or `flat`.",
}


def add_images(commands: argparse._SubParsersAction) -> None:
    """Adds the action `images`."""
    parser = commands.add_parser(
        "images",
        help="measure a generator, or a folder of images, on a public benchmark",
        description="Measure a generator, or a folder of images, on a public benchmark: by the official program's rules, including "
        "its bugs, and by rules without them. An interrupted run can be continued.",
        examples=IMAGE_EXAMPLES,
    )
    parser.add_argument(
        "--benchmark",
        required=True,
        choices=sorted(BENCHMARKS),
        metavar="NAME",
        help=f"The benchmark: {', '.join(sorted(BENCHMARKS))}.",
    )
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="Folder of the benchmark's files, or `example` for a few prompts of our own in its format. By default the files are "
        "downloaded once from where they are published.",
    )
    parser.add_argument(
        "--generator",
        help="What draws the images: a pipeline on the Hub or in a folder, a renderer of scenes (flat, tabletop), or a YAML file "
        "with an entry in the format of `trl_spatial data build`.",
    )
    parser.add_argument("--lora", help="LoRA weights for --generator: a folder or a name on the Hub.")
    parser.add_argument(
        "--images",
        type=folder_or_name,
        metavar="FOLDER",
        help="Folder of images in the benchmark's layout, instead of --generator.",
    )
    for role, text in _ROLE_HELP.items():
        parser.add_argument(f"--{role}", metavar="JUDGE", help=text)
    parser.add_argument("--output_dir", required=True, help="Folder of the run.")
    parser.add_argument("--protocol", default="both", choices=[*PROTOCOLS, "both"], help="Which rules to apply.")
    parser.add_argument("--spatial_only", action="store_true", help="Use only the spatial part of the prompts.")
    parser.add_argument("--limit", type=int, help="Number of prompts, evenly spread; by default all.")
    parser.add_argument("--num_images", type=int, help="Images per prompt; by default the benchmark's number.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the images.")
    parser.add_argument(
        "--trained_on",
        nargs="+",
        default=[],
        metavar="NAME",
        help="Benchmarks that the generator was trained on, if any.",
    )
    parser.add_argument("--engine", default="local", choices=["local", "ray"], help="Where images are drawn.")
    parser.add_argument("--num_workers", type=int, help="Ray workers; by default one per GPU, or per core.")
    add_spending(parser)
    parser.add_argument("--dry_run", action="store_true", help="Only print what would be done and what it would take.")
    parser.add_argument(
        "--skip_self_test",
        action="store_true",
        help="Do not test the judges on pictures whose content is known. A broken judge then looks like bad images.",
    )


def add_compare(commands: argparse._SubParsersAction) -> None:
    """Adds the action `compare`."""
    parser = commands.add_parser(
        "compare",
        help="compare runs on the same benchmark, prompt by prompt",
        description="Compare runs on the same benchmark with the first one: paired differences with intervals, permutation "
        "tests corrected for multiple comparisons, and reasons to doubt the comparison.",
        examples="  trl_spatial evaluate compare before after --output_dir comparison\n",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Folders of `evaluate images` runs.")
    parser.add_argument("--output_dir", help="Folder for compare.json, compare.md and report.html.")


def run_images(args: argparse.Namespace) -> None:
    """Runs `evaluate images`."""
    from ..evaluation.estimates import describe_estimate, estimate_run
    from ..evaluation.image_run import ImageRun
    from ..evaluation.judging import ask_judges, unanswered
    from ..evaluation.roles import check_roles, load_judges
    from ..generation.engines import process_state
    from ..judges.loading import ModelSettings
    from ..training.processes import fail_together

    protocols: tuple[Protocol, ...] = PROTOCOLS if args.protocol == "both" else (args.protocol,)
    folder = Path(args.output_dir)
    run = ImageRun(folder, _plan_of(args))
    check_roles(run.benchmark, run.plan.judges)
    prices = find_prices(run.plan.judges.get("vision", ""), args.prices, args.max_cost is not None)
    if args.dry_run:
        run.prepare(args.data)
        print(describe_estimate(estimate_run(run, protocols, prices)))
        return
    process_state()
    with ExitStack() as stack:
        with fail_together("Preparing the run"):
            if PROCESS == 0:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock_folder(folder))
            run.begin(args.data)
            spend = run.spend(math.inf if args.max_cost is None else args.max_cost)
            load = partial(
                load_judges,
                run.plan.judges,
                ModelSettings(spend=spend, prices=prices, cache=cache_folder() / "answers.sqlite"),
                threshold=run.benchmark.detector_threshold,
                counting_threshold=run.benchmark.counting_threshold,
                tested_kinds=() if args.skip_self_test else run.question_kinds() or ("text",),
            )
            if PROCESS == 0:
                print(describe_estimate(estimate_run(run, protocols, prices)), flush=True)
                if run.plan.generator is not None and run.missing_jobs():
                    load()  # find a bad judge before drawing anything; its memory is freed for the generator
                    free_memory()
        run.generate(engine=args.engine, num_workers=args.num_workers)
        if PROCESS > 0:
            return
        tasks = run.tasks(protocols)
        if unanswered(tasks, run.answers):
            ask_judges(tasks, load(), run.open, run.answers)
        print(write_tables(folder))


def _plan_of(args: argparse.Namespace) -> "ImagePlan":
    from ..evaluation.image_run import ImagePlan

    judges = {role: getattr(args, role) for role in _ROLE_HELP if getattr(args, role) is not None}
    generator = None if args.generator is None else _read_generator(args.generator)
    if args.lora is not None:
        if generator is None:
            raise ValueError("--lora needs --generator: the pipeline that the weights are for.")
        generator = {**generator, "lora": args.lora}
    return ImagePlan(
        benchmark=args.benchmark,
        judges=judges,
        generator=generator,
        images=args.images,
        num_images=args.num_images,
        limit=args.limit,
        spatial_only=args.spatial_only,
        seed=args.seed,
        trained_on=args.trained_on,
    )


def _read_generator(name: str) -> Mapping[str, Any]:
    from ..generation.painters import RENDERERS, check_spec
    from ..hub.references import UnknownReferenceError, find_reference

    spec: Any = {"name": name}
    if name.endswith((".yaml", ".yml", ".json")):
        try:
            spec = load_yaml(Path(name).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"The generator {name} cannot be read: {error}") from None
        if not isinstance(spec, dict):
            raise ValueError(f"{name} contains {spec!r:.80}. It should be a mapping, such as {{name: ORG/MODEL}}.")
    kind = check_spec(spec)
    if kind == "pipeline":
        try:
            find_reference(spec["name"], kind="model")
        except UnknownReferenceError:
            raise ValueError(
                f"There is no generator {spec['name']!r}. Name a pipeline (a folder, ORG/NAME or ORG/NAME@REVISION on the Hub, "
                f"hub/NAME), a renderer ({', '.join(RENDERERS)}), or a YAML file."
            ) from None
    return spec


def write_tables(folder: Path) -> str:
    """Makes the tables of a run from its records: results.json, results.md and report.html in its folder. Returns the Markdown."""
    from ..evaluation.image_results import describe_results, image_results, save_pictures
    from ..evaluation.image_run import ImageRun
    from ..evaluation.report import write_report
    from ..evaluation.sharing import write_shared_results

    run = ImageRun(folder)
    results = image_results(run)
    text = describe_results(results)
    _save(run.folder, results, "results", text)
    write_shared_results(run.folder, results)
    save_pictures(run, results)
    write_report(run.folder, results)
    return f"{text}\nSaved to {run.folder}: results.json, results.md, report.html"


def run_compare(args: argparse.Namespace) -> None:
    """Runs `evaluate compare`."""
    from ..evaluation.compare import compare_runs, describe_comparison
    from ..evaluation.image_run import ImageRun
    from ..evaluation.report import write_report

    comparison = compare_runs([ImageRun(Path(folder)) for folder in args.runs])
    text = describe_comparison(comparison)
    print(text)
    if args.output_dir is not None:
        folder = Path(args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        _save(folder, comparison, "compare", text)
        write_report(folder, comparison)
        print(f"Saved to {folder}: compare.json, compare.md, report.html")


def _save(folder: Path, results: Mapping[str, Any], name: str, text: str) -> None:
    write_record(folder / f"{name}.json", results)
    write_atomically(folder / f"{name}.md", text)
