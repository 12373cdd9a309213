"""The export stage: writes the accepted pairs as a dataset for the Hub, or in the formats of other trainers."""

import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value, disable_progress_bars, enable_progress_bars, is_progress_bar_enabled

from ...preferences.benchmark import SPLIT
from ...preferences.images import load_image
from ...scenes import RELATIONS
from ...scenes.dataset import FEATURES
from ...store import (
    MARKER,
    begin_folder,
    is_complete,
    mark_complete,
    marked_files,
    new_folder,
    write_record,
)
from .build_store import BuildStore
from .decisions import decide_pairs
from .filter import OTHER, DrawnPair, drawn_pairs
from .render import SIDES, license_of
from .writers import scene_weights


SHARD_BYTES = 500 * 10**6
ROWS_PER_GROUP = 100  # the Hub's dataset viewer reads one row group at a time
EXPORT_FILE = "export.json"  # marks a folder that a later export may replace
NUM_PREVIEWED, PREVIEW_SIZE = 100, 256

EXPORTED = Features(
    {
        **FEATURES,
        "pair": Value("string"),
        "direction": Value("string"),
        "operation": Value("string"),
        "dimension": Value("string"),
        "decided_by": Value("string"),
        "license": Value("string"),
        "quality_gap": Value("float32"),
        "chosen_image": Value("string"),
        "rejected_image": Value("string"),
        "chosen_recipe": Value("string"),
        "rejected_recipe": Value("string"),
    }
)


def split_scenes(weights: Mapping[str, float], shares: Mapping[str, float], store: BuildStore) -> dict[str, str]:
    """
    Assigns each scene to one split. Adding prompts does not change the assignment.

    Args:
        weights (`Mapping[str, float]`):
            Scene → its weight among the prompts.
        shares (`Mapping[str, float]`):
            Split → share of the prompts, without the training split, which gets the rest.
        store ([`BuildStore`]):
            Its seed decides.

    Returns:
        `dict[str, str]`: scene → split. A split is as large as whole scenes allow, and has one scene at least as long as one
        is left for training.
    """
    scenes = sorted(weights)
    order = [scenes[i] for i in store.rng("splits").permutation(len(scenes))]
    splits = {}
    for split, share in shares.items():
        wanted, have = share * sum(weights.values()), 0.0
        while share > 0 and len(order) > 1 and (have == 0 or have + weights[order[0]] / 2 < wanted):
            scene = order.pop(0)
            splits[scene] = split
            have += weights[scene]
    return splits | dict.fromkeys(order, "train")


def accepted_rows(store: BuildStore) -> dict[str, list[tuple[DrawnPair, str]]]:
    """
    The rows of the dataset: each accepted pair in both directions.

    Returns:
        `dict[str, list[tuple[DrawnPair, str]]]`: split → pairs with the side whose prompt the row has. Those of the split
        `benchmark` are taken from the scenes of the split `test`, and are there in one direction.
    """
    recipe = store.recipe.export
    pairs = drawn_pairs(store)
    accepted = [pairs[id] for id, decision in decide_pairs(store).items() if decision.outcome == "accepted"]
    shares = {"test": recipe.test, "validation": recipe.validation}
    split_of = split_scenes(scene_weights(store.recipe.prompts), shares, store)
    rows: dict[str, list[tuple[DrawnPair, str]]] = {"train": [], "validation": [], "test": []}
    for pair in accepted:
        rows[split_of[pair.prompt["scene"]]] += [(pair, side) for side in SIDES]  # type: ignore[union-attr, misc]
    rows[SPLIT] = _benchmark(store, rows["test"])
    measured = {pair.prompt["id"] for pair, _ in rows[SPLIT]}
    rows["test"] = [row for row in rows["test"] if row[0].prompt["id"] not in measured]
    return {split: part for split, part in rows.items() if part}


def _benchmark(store: BuildStore, rows: list[tuple[DrawnPair, str]]) -> list[tuple[DrawnPair, str]]:
    """
    Selects the benchmark: one row for each of at most half of the prompts, with one changed relation in about half of
    them and more in the others, and the two directions in alternation.
    """
    # first pair of each prompt, first prompts first: prompts added later do not change the order of these
    order = list({rows[2 * i][0].prompt["id"]: i for i in reversed(range(len(rows) // 2))}.values())[::-1]
    wanted = min(store.recipe.export.num_benchmark_pairs, len(order) // 2)
    numbers = {is_one: [i for i in order if (rows[2 * i][0].edit["level"] == 1) == is_one] for is_one in (True, False)}
    num_one = min(len(numbers[True]), max(wanted // 2, wanted - len(numbers[False])))
    chosen = sorted(numbers[True][:num_one] + numbers[False][: wanted - num_one])
    return [rows[2 * i + place % 2] for place, i in enumerate(chosen)]


def make_row(store: BuildStore, pair: DrawnPair, side: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """
    A row of the dataset.

    Args:
        store ([`BuildStore`]):
            Where the images are.
        pair ([`~data.building.filter.DrawnPair`]), side (`str`):
            The pair, and the side whose prompt and image are chosen.
        facts (`Mapping[str, Any]`):
            What else is known of the pair: `decided_by` and `quality_gap`.

    Returns:
        `dict[str, Any]`: values of the columns `EXPORTED`.
    """
    other = OTHER[side]
    chosen, rejected = pair.images[side], pair.images[other]
    spec = store.recipe.render.generators[chosen["generator"]]
    first, second = ("before", "after") if side == "original" else ("after", "before")
    operations = [
        {"operation": operation["operation"], "before": operation[first], "after": operation[second]}
        for operation in pair.edit["operations"]
    ]
    return {
        "prompt": pair.text(side),
        "chosen": {"bytes": store.files.get(chosen["image"]), "path": None},
        "rejected": {"bytes": store.files.get(rejected["image"]), "path": None},
        "perturbed_prompt": pair.text(other),
        "level": pair.edit["level"],
        "operations": operations,
        "relations": [{key: relation[key] for key in ("relation", "arguments")} for relation in pair.relations(side)],
        "scene": pair.prompt["scene"],
        "generator": str(spec.get("name") or spec.get("model")),
        "seed": chosen["seed"],
        "pair": pair.id,
        "direction": side,
        "operation": operations[0]["operation"],
        "dimension": RELATIONS[operations[0]["before"]["relation"]].dimension,
        "license": license_of(store, chosen["generator"]),
        "chosen_image": chosen["image"],
        "rejected_image": rejected["image"],
        "chosen_recipe": json.dumps(chosen["recipe"], sort_keys=True),
        "rejected_recipe": json.dumps(rejected["recipe"], sort_keys=True),
        **facts,
    }


def iterate_rows(store: BuildStore, rows: list[tuple[DrawnPair, str]]) -> Iterator[dict[str, Any]]:
    """The rows with their images, one at a time."""
    decisions, verdicts = decide_pairs(store), {record["id"]: record for record in store.verdicts}
    for pair, side in rows:
        quality = verdicts[pair.id].get("quality")
        gap = None if quality is None else abs(quality["original"] - quality["edited"])
        yield make_row(store, pair, side, {"decided_by": decisions[pair.id].by, "quality_gap": gap})


def _export_hub(store: BuildStore, rows: dict[str, list[tuple[DrawnPair, str]]], folder: Path) -> None:
    from .card import write_card

    splits = {}
    for split, part in rows.items():
        splits[split] = Dataset.from_generator(
            lambda part=part: iterate_rows(store, part),
            features=EXPORTED,
            cache_dir=str(folder / ".cache"),
            split=split,
            fingerprint=f"{store.recipe.seed}-{split}",
        )
    for split, dataset in splits.items():
        _write_parquet(dataset, folder / "data", split)
        _write_parquet(dataset.remove_columns(["chosen", "rejected"]), folder / "text", split)
    first = next(iter(splits.values()))
    _write_parquet(first.select(range(min(NUM_PREVIEWED, len(first)))).map(_shrink), folder / "preview", "train")
    write_card(store, splits, folder)


def _write_parquet(dataset: Dataset, folder: Path, split: str) -> None:
    folder.mkdir(exist_ok=True)
    num_shards = max(-(-dataset.data.nbytes // SHARD_BYTES), 1)
    for number in range(num_shards):
        shard = dataset.shard(num_shards, number, contiguous=True)
        shard.to_parquet(folder / f"{split}-{number:05d}-of-{num_shards:05d}.parquet", batch_size=ROWS_PER_GROUP)


def _shrink(row: dict[str, Any]) -> dict[str, Any]:
    for column in ("chosen", "rejected"):
        row[column].thumbnail((PREVIEW_SIZE, PREVIEW_SIZE))
    return row


def _export_flow_factory(store: BuildStore, rows: dict[str, list[tuple[DrawnPair, str]]], folder: Path) -> None:
    """Writes the format of Flow-Factory's offline DPO: JSON lines with exactly the schema's keys, and images."""
    for split, part in rows.items():
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for row in iterate_rows(store, part):
                media = {}
                for column in ("chosen", "rejected"):
                    name = f"images/{row[f'{column}_image']}"
                    (folder / "images").mkdir(exist_ok=True)
                    (folder / name).write_bytes(row[column]["bytes"])
                    media[column] = {"media": [{"type": "image", "path": name}]}
                record = {
                    "schema_version": 2,
                    "input": {"prompt": row["prompt"], "media": []},
                    "supervision": {"type": "preference", **media},
                    "metadata": {
                        key: row[key] for key in ("pair", "direction", "level", "scene", "generator", "seed")
                    },
                }
                file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _export_diffusion_dpo(store: BuildStore, rows: dict[str, list[tuple[DrawnPair, str]]], folder: Path) -> None:
    """Writes the columns that the Diffusion-DPO scripts read: two JPEG files, which one is better, and the caption."""
    features = Features({"jpg_0": Value("binary"), "jpg_1": Value("binary"), "label_0": Value("int64"),
                         "caption": Value("string")})  # fmt: skip

    def generate(part: list[tuple[DrawnPair, str]]) -> Iterator[dict[str, Any]]:
        for row in iterate_rows(store, part):
            # random order, so that position does not reveal the preferred image
            is_first = int(store.rng("order", row["pair"], row["direction"]).integers(2))
            images = [_jpeg(row["chosen"]["bytes"]), _jpeg(row["rejected"]["bytes"])]
            yield {
                "jpg_0": images[1 - is_first],
                "jpg_1": images[is_first],
                "label_0": is_first,
                "caption": row["prompt"],
            }

    for split, part in rows.items():
        dataset = Dataset.from_generator(
            lambda part=part: generate(part), features=features, cache_dir=str(folder / ".cache"), split=split
        )
        _write_parquet(dataset, folder / "data", split)


def _jpeg(image: bytes) -> bytes:
    buffer = io.BytesIO()
    load_image(image).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


FORMATS: dict[str, Callable[[BuildStore, dict[str, list[tuple[DrawnPair, str]]], Path], None]] = {
    "hub": _export_hub,
    "flow-factory": _export_flow_factory,
    "diffusion-dpo": _export_diffusion_dpo,
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the progress bars of `datasets`, which shows one per file."""
    was_shown = is_progress_bar_enabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if was_shown:
            enable_progress_bars()


def export_dataset(store: BuildStore, output: Path, *, form: str = "hub") -> dict[str, int]:
    """
    Writes the accepted pairs to a folder, completely or not at all.

    Args:
        store ([`BuildStore`]):
            The dataset that was built.
        output (`Path`):
            The folder. What an earlier export has left there is replaced.
        form (`str`, *optional*, defaults to `"hub"`):
            `"hub"`: Parquet with the configurations `default`, `text` (no images) and `preview`, a card, and `eval.yaml` if there is
            the split `benchmark`;
            `"flow-factory"`: its folder for offline DPO; `"diffusion-dpo"`: Parquet with the columns of those scripts.

    Returns:
        `dict[str, int]`: split → number of rows.

    Raises:
        `ValueError`: If no pair was accepted yet, or the folder holds something else.
    """
    rows = accepted_rows(store)
    if not rows:
        raise ValueError(
            f"No pair of {store.folder} was accepted yet. `trl_spatial data status {store.folder}` says where they stand."
        )
    files = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    if not (EXPORT_FILE in files and is_complete(output) and files <= {*(marked_files(output) or {}), MARKER}):
        new_folder(str(output))  # raises if the folder holds anything else
    partial = output.with_name(f".{output.name}.partial")
    begin_folder(partial)
    with _quiet():
        FORMATS[form](store, rows, partial)
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    write_record(partial / EXPORT_FILE, {"format": form})
    mark_complete(partial)
    shutil.rmtree(output, ignore_errors=True)
    partial.replace(output)
    return {split: len(part) for split, part in rows.items()}
