"""SpatialBench-UC: prompts of two objects in a relation, with counterfactual twins, and a checker that may abstain."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...judges.views import VIEWS
from ...store import write_atomically
from .base import (
    Benchmark,
    DataFile,
    Evidence,
    ImageKey,
    Item,
    Metric,
    OfficialError,
    Protocol,
    Question,
    images_of,
    read_json_lines,
)
from .numbering import number_images
from .spatialbench_uc_rules import RELATIONS, Checked, check_image
from .spatialbench_uc_tables import Sample, Twin, evaluate_table, report_table


_COMMIT = "c038188f0ff9ce835adb7bccbe8241b4ee7a1a4a"
_REPOSITORY = "amineross/SpatialBench-UC"
_RUN = "trl_spatial"  # official image names begin with the name of the run
_FIRST, _SECOND = "boxes", "boxes of the second detector"
_MISSING_IMAGE = Checked("UNDECIDABLE", "missing image")
_RATES = (
    "pass_rate_overall",
    "coverage",
    "pass_rate_conditional",
    "undecidable_rate",
    "mean_confidence",
    "prompt_pass_rate",
    "prompt_coverage",
    "prompt_pass_rate_all",
    "cf_both_pass_rate",
    "cf_one_sided_rate",
    "cf_both_fail_rate",
)


class SpatialBenchUC(Benchmark):
    """SpatialBench-UC 1.0.1: 50 pairs of objects in four relations, in 100 pairs of twins."""

    name = "spatialbench-uc"
    title = "SpatialBench-UC"
    source = f"https://github.com/{_REPOSITORY}/tree/{_COMMIT}"
    license = "CC BY 4.0"
    paper = "https://huggingface.co/papers/2601.13462"
    files = (
        DataFile(
            "prompts.jsonl",
            f"https://raw.githubusercontent.com/{_REPOSITORY}/{_COMMIT}/data/prompts/v1.0.1/prompts.jsonl",
            "e13c0ed8f962acb7fed702c689e384184759f17317373bce0ef633667c244d8d",
        ),
    )
    detector_threshold = 0.5
    num_images = 4
    judges = frozenset({"detector", "second_detector"})

    def load(self, folder: Path) -> list[Item]:
        path = folder / self.files[0].name
        rows = read_json_lines(path)
        known: dict[str, dict[str, Any]] = {}
        for number, row in enumerate(rows, start=1):
            if fault := _find_fault(row):
                raise ValueError(f"{path}, row {number}: {fault}.")
            if row["prompt_id"] in known:
                raise ValueError(f"{path}, row {number} repeats the prompt_id {row['prompt_id']!r}.")
            known[row["prompt_id"]] = row
        for number, row in enumerate(rows, start=1):
            twin = known.get(row["counterfactual"]["prompt_id"])
            if twin is None or twin["counterfactual"]["prompt_id"] != row["prompt_id"]:
                raise ValueError(
                    f"{path}, row {number}: the twin of {row['prompt_id']!r} is {row['counterfactual']['prompt_id']!r}, which is no "
                    f"prompt of the file or has another twin."
                )
        return [Item(row["prompt_id"], row["prompt"], row) for row in rows]

    def image_path(self, item: Item, number: int) -> str:
        return f"images/{_RUN}_{item.id}_seed{number:04d}.png"

    def assign(self, items: Sequence[Item], files: Sequence[str], protocol: Protocol) -> dict[ImageKey, str]:
        """
        Assigns files to images by the names that the official generator gives, `images/RUN_PROMPT_seedNUMBER.png`,
        which agree with the official manifest. The fixed protocol also accepts other file types and images outside
        that folder, and renumbers seeds that are too large in order.

        Raises:
            `ValueError`: If two files are the same image.
        """
        ids = {item.id for item in items}
        folders, types = (("images",), "png") if protocol == "official" else (("images", ""), "png|jpe?g|webp")
        named = []
        for file in files:
            folder, _, name = file.rpartition("/")
            parts = re.fullmatch(rf"(.+)_seed(\d+)\.(?:{types})", name)
            if folder in folders and parts is not None and (id := _known_ending(parts[1], ids)) is not None:
                named.append((id, int(parts[2]), file))
        # the official program accepts any seed
        most = self.num_images if protocol == "fixed" else max((number for _, number, _ in named), default=0) + 1
        return number_images(named, most)

    def finish(self, folder: Path, items: Sequence[Item]) -> None:
        """Writes the manifest of the existing images, which the official program reads."""
        rows = [
            {
                "sample_id": Path(path).stem,
                "run_id": _RUN,
                "prompt_id": item.id,
                "image_path": path,
                "prompt": item.prompt,
                "relation": item.data["relation"],
                "object_a": item.data["object_a"]["coco_label"],
                "object_b": item.data["object_b"]["coco_label"],
            }
            for item, number in images_of(items, self.num_images)
            if (folder / (path := self.image_path(item, number))).is_file()
        ]
        write_atomically(folder / "manifest.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))

    def questions(self, item: Item, protocol: Protocol) -> list[Question]:
        options = {"classes": list(dict.fromkeys(_labels(item)))}
        return [
            Question(_FIRST, "boxes", options=options),
            *(Question(_view_key(view), "boxes", options=options | {"view": view}) for view in VIEWS),
            Question(_SECOND, "boxes", options=options | {"detector": "second"}),
        ]

    def check(self, item: Item, number: int, evidence: Evidence) -> Checked | None:
        """Returns the verdict on an image, or `None` if it is missing or the first detector failed."""
        reply = evidence.reply(item, number, _FIRST)
        if (item.id, number) not in evidence.images or reply is None:
            return None
        changed = [evidence.reply(item, number, _view_key(view)) for view in VIEWS]
        second = evidence.reply(item, number, _SECOND)
        return check_image(
            item.data["relation"],
            _labels(item),
            reply["size"],
            reply["boxes"],
            [view and view["boxes"] for view in changed],
            [second and second["boxes"]],
        )

    def official(self, items: Sequence[Item], evidence: Evidence) -> dict[str, float | None]:
        by_id = {item.id: item for item in items}
        samples = [
            Sample(id, by_id[id].data["relation"], checked.verdict, checked.reason, checked.confidence)
            for id, number in evidence.images
            if id in by_id and (checked := self.check(by_id[id], number, evidence)) is not None
        ]
        if not samples:
            raise OfficialError("No image of the manifest could be judged: it has no total to print.")
        twins = [Twin(item.id, item.data["counterfactual"]["prompt_id"]) for item in items]
        report = report_table(samples, twins, self.num_images)
        by_relation = {
            f"{relation}/{name}": row[name]
            for relation, row in evaluate_table(samples)["by_relation"].items()
            for name in _RATES
            if name in row
        }
        return {name: report[name] for name in _RATES} | by_relation

    def fixed(self, items: Sequence[Item], evidence: Evidence) -> list[Metric]:
        images = images_of(items, self.num_images)
        ids = np.array([item.id for item, _ in images], dtype=str)
        relations = np.array([item.data["relation"] for item, _ in images], dtype=str)
        verdicts = np.array(
            [(self.check(item, number, evidence) or _MISSING_IMAGE).verdict for item, number in images], dtype=str
        )
        is_decided = verdicts != "UNDECIDABLE"

        def share(name: str, values: np.ndarray, where: np.ndarray | slice = slice(None), **options: Any) -> Metric:
            return Metric(name, values[where].astype(float), ids[where].tolist(), **options)

        passes = verdicts == "PASS"
        return [
            share("pass rate", passes, is_headline=True),
            *(share(f"pass rate: {name}", passes, relations == name) for name in dict.fromkeys(relations.tolist())),
            share("abstention", ~is_decided),
            share("selective risk", verdicts == "FAIL", is_decided),
            *self._prompt_metrics(items, verdicts.reshape(len(items), self.num_images)),
        ]

    def _prompt_metrics(self, items: Sequence[Item], verdicts: np.ndarray) -> list[Metric]:
        """Makes the metrics over prompts, and over pairs of twins, from verdicts `(num_items, num_images)`."""
        ids = [item.id for item in items]
        passes = verdicts == "PASS"
        has_pass = dict(zip(ids, passes.any(axis=1).tolist(), strict=True))
        twins = {item.id: item.data["counterfactual"]["prompt_id"] for item in items}
        pairs = [(id, twin) for id, twin in twins.items() if twin in twins and id < twin]
        return [
            Metric("prompts with a pass", passes.any(axis=1).astype(float), ids),
            Metric("prompts with passes only", passes.all(axis=1).astype(float), ids),
            Metric(
                "twins that both pass",
                np.array([has_pass[id] and has_pass[twin] for id, twin in pairs], dtype=float),
                [id for id, _ in pairs],
            ),
        ]


def _find_fault(row: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with a row of the benchmark's file, or `None`."""
    for name in ("prompt_id", "pair_id", "prompt"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            return f"{name} is {row.get(name)!r}, not a text"
    if not re.fullmatch(r"[\w.-]+", row["prompt_id"]):
        return f"prompt_id is {row['prompt_id']!r}, which cannot be part of a file name"
    if row.get("relation") not in RELATIONS:
        return f"relation is {row.get('relation')!r}, none of {', '.join(RELATIONS)}"
    for name, part in (("object_a", "coco_label"), ("object_b", "coco_label"), ("counterfactual", "prompt_id")):
        found = row.get(name)
        if not isinstance(found, dict) or not isinstance(found.get(part), str) or not found[part].strip():
            return f"{name} is {found!r}, which has no {part}"
    return None


def _labels(item: Item) -> tuple[str, str]:
    return item.data["object_a"]["coco_label"], item.data["object_b"]["coco_label"]


def _view_key(view: str) -> str:
    return f"{_FIRST}, {view}"


def _known_ending(name: str, ids: set[str]) -> str | None:
    """Returns the longest id that `name` ends with, after the name of a run, or `None`."""
    words = name.split("_")
    endings = ("_".join(words[start:]) for start in range(len(words)))
    return next((ending for ending in endings if ending in ids), None)
