"""`trl_spatial demo`: the whole method of the paper on a laptop, from preference pairs to a better generator."""

from pathlib import Path
from typing import Any

from ..demo.settings import DemoSettings
from .parser import SpatialParser, quick_imports


EXAMPLES = """\
  # the full demo, about five minutes on two cores
  trl_spatial demo

  # a smaller one in two minutes, in another folder
  trl_spatial demo --quick --output_dir runs/glance

  # other pairs and prompts, and more updates of the generator
  trl_spatial demo --seed 1 --grpo_steps 300 --output_dir runs/demo-1
"""


def make_parser(prog: str = "trl_spatial demo") -> SpatialParser:
    return SpatialParser(
        DemoSettings,
        prog=prog,
        description="Run the whole method on rendered scenes: train a spatial reward model, fine-tune a tiny FLUX by reinforcement "
        "learning with it, and judge the images by exact rules. After an interruption, run the same command again to continue.",
        examples=EXAMPLES,
    )


def main(settings: DemoSettings) -> None:
    try:
        with quick_imports():
            from ..demo.run import run_demo
            from ..store import write_atomically
    except ModuleNotFoundError as error:
        raise ValueError(f"The demo needs {error.name}: pip install 'trl-spatial[demo]'") from error

    results = run_demo(settings)
    text = format_results(results)
    output_dir = Path(settings.output_dir)
    write_atomically(output_dir / "results.md", text)
    print(f"\n{text}\nWritten to {output_dir}: report.html, results.json, results.md, reward/, grpo/", flush=True)


def format_results(results: dict[str, Any]) -> str:
    """The results as Markdown tables."""
    lines = ["| SpatialScore, held-out pairs | accuracy | 95 % interval | pairs |", "|---|---|---|---|"]
    titles = {"all": "all", "level": "changes: {}", "relation": "one change, {}", "operation": "one change by {}"}
    reward_model = results["reward_model"]
    for group, title in titles.items():
        for name, row in reward_model["accuracy"][group].items():
            lines.append(f"| {title.format(name)} | {_cells(row)} | {row['num_pairs']} |")
    flip, generator = reward_model["flip_test"], results["generator"]
    lines += [
        "",
        f"Calibration of P(chosen): expected calibration error {reward_model['expected_calibration_error']:.3f}",
        f"Flip test: {flip['same_order']['estimate']:.3f} of pairs keep their order when image and text are mirrored; accuracy "
        f"on the mirrored pairs {flip['accuracy']['estimate']:.3f}",
        "",
        f"| tiny FLUX, {generator['num_images']} images of held-out prompts | before | 95 % interval | after | 95 % interval |",
        "|---|---|---|---|---|",
    ]
    titles = {
        "spatial_accuracy": "spatial accuracy (objects present and correctly placed)",
        "objects_present": "objects present",
        "relations_correct": "correctly placed, of the images with all objects",
    }
    before, after = generator["before"], generator["after"]
    lines += [
        f"| {title} | {_cells(before[name])} | {_cells(after[name])} |"
        for name, title in titles.items()
        if name in before and name in after  # a metric is missing if no image has all objects
    ]
    for name, title in {"reward": "mean SpatialScore", "diversity": "diversity (pixel distance)"}.items():
        lines.append(f"| {title} | {before[name]:.3f} | | {after[name]:.3f} | |")
    cost = results["training"]["cost"]
    lines += [
        "",
        f"Cost: {cost['evaluations_per_image']:g} transformer evaluations per image "
        f"({cost['evaluations_per_image_unfiltered']:g} without the filter), {cost['num_images']} images, "
        f"{cost['seconds']:.0f} s",
        f"Time: {results['seconds'] // 60:.0f} min {results['seconds'] % 60:.0f} s",
        "",
    ]
    return "\n".join(lines)


def _cells(interval: dict[str, float]) -> str:
    return f"{interval['estimate']:.3f} | {interval['low']:.3f} – {interval['high']:.3f}"
