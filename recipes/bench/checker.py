"""How often does the checker, which sees only pixels, agree with the graph that an image was rendered from?

    python recipes/bench/checker.py --num_scenes 10000

Renders every scene twice, the second time with one relation changed. On the first image, the checker must find every object and
every relation of the graph satisfied; on the second, it must find the changed relation violated. Prints a table by relation and a
line of JSON. `--degrade` shows how well the checker tolerates degraded images.
"""

import argparse
import io
import json
import sys
import time
from collections import Counter
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

from trl_spatial.scenes import (
    RELATIONS,
    Operation,
    PlacedObject,
    SceneGraph,
    Verdict,
    perturb,
    place_together,
    render_layout,
    sample_graph,
    sample_style,
)
from trl_spatial.scenes.checking import check_scene
from trl_spatial.statistics import accuracy_interval


MIN_AGREEMENT = 0.999  # on undegraded images; below it, the script fails


def blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(1.0))


def add_noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    pixels = np.asarray(image) + rng.normal(0.0, 10.0, np.asarray(image).shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def compress(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return Image.open(buffer).convert("RGB")


DEGRADATIONS: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    "none": lambda image, rng: image,
    "blur": blur,  # Gaussian, standard deviation 1 pixel
    "noise": add_noise,  # standard deviation 10 of 255
    "jpeg": compress,  # quality 75
}


def sample_layouts(rng: np.random.Generator) -> tuple[SceneGraph, list[Operation], list[list[PlacedObject]]]:
    """Samples a graph of 2 to 6 objects and 1 to 4 relations, a change of one relation, and layouts of both graphs."""
    while True:
        num_objects = int(rng.integers(2, 7))
        num_relations = int(rng.integers(1, 2 if num_objects == 2 else min(num_objects, 4) + 1))
        graph = sample_graph(rng, num_objects=num_objects, num_relations=num_relations, size_probability=0.1)
        try:
            changed, operations = perturb(graph, rng)
            return graph, operations, place_together([graph, changed], rng)
        except ValueError:
            continue  # crowded: no relation of this graph can be changed


def measure(num_scenes: int, image_size: int, seed: int, degrade: str = "none") -> dict:
    """
    Returns counts `{name: (agreed, total)}`, by relation on original and on changed scenes and for all objects, and the processor
    milliseconds per check.
    """
    counts: dict[str, Counter] = {"satisfied": Counter(), "violated": Counter(), "objects": Counter()}
    totals: dict[str, Counter] = {key: Counter() for key in counts}
    seconds = 0.0
    for i in tqdm(range(num_scenes), desc="Scenes", unit="scene"):
        rng = np.random.default_rng([seed, i])
        graph, operations, layouts = sample_layouts(rng)
        style = sample_style(graph.entities, rng)
        images = [DEGRADATIONS[degrade](render_layout(layout, style, image_size), rng) for layout in layouts]
        start = time.process_time()
        check, changed_check = (check_scene(image, graph) for image in images)
        seconds += (time.process_time() - start) / 2
        totals["objects"]["all"] += len(graph.entities)
        counts["objects"]["all"] += len(graph.entities) - len(check.missing) - len(check.duplicated) - len(check.extra)
        for result in check.relations:
            totals["satisfied"][result.relation.name] += 1
            counts["satisfied"][result.relation.name] += result.verdict == Verdict.SATISFIED
        before = {operation.before for operation in operations}
        for result in changed_check.relations:
            if result.relation in before:
                totals["violated"][result.relation.name] += 1
                counts["violated"][result.relation.name] += result.verdict == Verdict.VIOLATED
    return {
        "counts": {key: {name: (counts[key][name], n) for name, n in totals[key].items()} for key in counts},
        "milliseconds_per_image": 1e3 * seconds / num_scenes,
    }


def summarize(measured: dict, args: argparse.Namespace) -> dict:
    """Agreement with 95 % intervals, overall and by relation."""

    def rate(agreed: int, total: int) -> dict:
        interval = accuracy_interval(np.repeat([1.0, 0.0], [agreed, total - agreed]))
        return {"agreement": interval.estimate, "low": interval.low, "high": interval.high, "n": total}

    summary: dict = {"image_size": args.image_size, "num_scenes": args.num_scenes, "degrade": args.degrade}
    for key, counts in measured["counts"].items():
        summary[key] = rate(*np.sum(list(counts.values()), axis=0).tolist())
        if key != "objects":
            summary[f"{key}_by_relation"] = {name: rate(*counts[name]) for name in RELATIONS if name in counts}
    return summary | {"milliseconds_per_image": round(measured["milliseconds_per_image"], 2)}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_scenes", type=int, default=10_000)
    parser.add_argument("--image_size", type=int, default=64, help="width and height, in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--degrade", choices=DEGRADATIONS, default="none", help="what is done to the images before")
    args = parser.parse_args(argv)
    summary = summarize(measure(args.num_scenes, args.image_size, args.seed, args.degrade), args)
    print(f"{'relation':<12}{'found satisfied':>24}{'changed, found violated':>28}")
    rows = [(name, summary["satisfied_by_relation"], summary["violated_by_relation"]) for name in RELATIONS]
    rows.append(("all", {"all": summary["satisfied"]}, {"all": summary["violated"]}))
    for name, *columns in rows:
        cells = [f"{c[name]['agreement']:.2%} of {c[name]['n']}" if name in c else "" for c in columns]
        print(f"{name:<12}{cells[0]:>24}{cells[1]:>28}")
    print(f"objects     {summary['objects']['agreement']:>15.2%} of {summary['objects']['n']}")
    print(f"{summary['milliseconds_per_image']} ms per image")
    print(json.dumps(summary))
    return summary


if __name__ == "__main__":
    result = main()
    agreement = min(result[key]["agreement"] for key in ("satisfied", "violated", "objects"))
    is_short = result["degrade"] == "none" and agreement < MIN_AGREEMENT
    sys.exit(f"The agreement is {agreement:.4f}, below {MIN_AGREEMENT}." if is_short else 0)
