"""DPG-Bench: long prompts, broken down into yes/no questions, some of which depend on others."""

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path, PurePosixPath
from statistics import fmean
from typing import Any

from PIL import Image

from .base import Benchmark, DataFile, Evidence, ImageKey, Item, Metric, OfficialError, Protocol, Question, images_of
from .grids import SUFFIXES, choose_grid, drawn_tiles, grid_of, open_tile, single_path, tile_names, write_grid
from .yesno import SPATIAL_PARTS, drop_unfounded, is_answer, make_metric, read_answer


_COMMIT = "3c228f1dc6c4d3cad0a47493816151a419f14db3"
_FILE = "dpg_bench.csv"
_COLUMNS = ("item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language")
_SPATIAL = "relation - spatial"


class DPGBench(Benchmark):
    """
    DPG-Bench ([ELLA](https://huggingface.co/papers/2403.05135)). All questions are asked about each of the four images
    of a prompt, which are stored in one grid; a yes counts unless a question that it depends on is answered no.

    Its official judge is mPLUG-large, which answers in one word. Other judges are told to.
    """

    name = "dpg-bench"
    title = "DPG-Bench"
    source = f"https://github.com/TencentQQGYLab/ELLA/tree/{_COMMIT}/dpg_bench"
    license = "Apache-2.0"
    paper = "https://huggingface.co/papers/2403.05135"
    files = (
        # no hash: the file was too large for the source archive from which hashes were taken
        DataFile(_FILE, f"https://raw.githubusercontent.com/TencentQQGYLab/ELLA/{_COMMIT}/dpg_bench/{_FILE}", ""),
    )
    num_images = 4
    judges = frozenset({"vision"})

    def load(self, folder: Path) -> list[Item]:
        rows = _read_rows(folder / _FILE)
        is_numeric = all(len(row["dependency"]) == 1 for row in rows)
        rows_of: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            rows_of[row.pop("item")].append(row)
        items = []
        for id, own in rows_of.items():
            prompt = own[0]["text"]
            data = {"rows": [{key: row[key] for key in row if key != "text"} for row in own]}
            is_spatial = any(category_of(row) == _SPATIAL for row in own)
            items.append(Item(id, prompt, data | {"is_numeric_table": is_numeric}, is_spatial))
        return items

    def image_path(self, item: Item, number: int) -> str:
        return single_path(f"{item.id}.png", number, self.num_images)

    def assign(self, items: Sequence[Item], files: Sequence[str], protocol: Protocol) -> dict[ImageKey, str]:
        if protocol == "official":
            # names end at the first dot; two files with the same name both count
            by_name: dict[str, list[str]] = defaultdict(list)
            for file in files:
                if "/" not in file and PurePosixPath(file).suffix.lower() in SUFFIXES:
                    by_name[file.split(".")[0]].append(file)
            return {
                (item.id, number): tile
                for item in items
                for number, tile in enumerate(
                    tile for file in by_name[item.id] for tile in tile_names(file, self.num_images)
                )
            }
        by_stem: dict[str, list[str]] = defaultdict(list)
        for file in files:
            path = PurePosixPath(file)
            if len(path.parts) == 1 and path.suffix.lower() in SUFFIXES:
                by_stem[path.stem].append(file)
        assigned: dict[ImageKey, str] = {}
        for item in items:
            if grid := choose_grid(item, f"{item.id}.png", by_stem[item.id]):
                assigned |= {(item.id, number): tile for number, tile in drawn_tiles(grid, self.num_images, files)}
        return assigned

    def finish(self, folder: Path, items: Sequence[Item]) -> None:
        for item in items:
            write_grid(folder, item, f"{item.id}.png", self.num_images)

    def open(self, folder: Path, file: str) -> Image.Image:
        return open_tile(folder, file, self.num_images)

    def questions(self, item: Item, protocol: Protocol) -> list[Question]:
        return [
            Question(
                key=str(number),
                kind="text",
                text=f"{row['question']}\nAnswer with one word, in lower case: yes or no.",
                options={"max_tokens": 128, "temperature": 0.0},
                is_usable=is_answer,
            )
            for number, row in enumerate(item.data["rows"])
        ]

    def official(self, items: Sequence[Item], evidence: Evidence) -> dict[str, float | None]:
        if items and all(item.data["is_numeric_table"] for item in items):
            raise OfficialError(
                f"every dependency in {_FILE} is a single number, so that the column is read as numbers, which cannot be split at commas."
            )
        scores: list[float] = []
        categories: dict[str, list[float]] = defaultdict(list)
        for item in items:
            for numbers in _files_of(item, evidence, self.num_images):
                tiles = [_official_tile(item, evidence, number) for number in numbers]
                if any(tile is None for tile in tiles):
                    continue  # the program reports the file as failed and drops it
                scores.append(fmean(tile[0] for tile in tiles if tile))
                for category, score in tiles[-1][1] if tiles[-1] else ():
                    categories[category].append(score)
        numbers_: dict[str, float | None] = {"overall": 100 * fmean(scores) if scores else None}
        broad: dict[str, list[float]] = defaultdict(list)
        for category in sorted(categories):
            broad[broad_category(category)] += categories[category]
        numbers_ |= {f"L1 {name}": 100 * fmean(broad[name]) for name in sorted(broad)}
        return numbers_ | {f"L2 {name}": 100 * fmean(categories[name]) for name in sorted(categories)}

    def fixed(self, items: Sequence[Item], evidence: Evidence) -> list[Metric]:
        overall: list[tuple[str, float]] = []
        found: dict[str, list[tuple[str, float]]] = defaultdict(list)
        for item, number in images_of(items, self.num_images):
            rows = item.data["rows"]
            answers = {i: read_answer(evidence.reply(item, number, str(i))) or False for i in range(len(rows))}
            founded = drop_unfounded(answers, _parents(rows))
            overall.append((item.id, fmean(map(float, founded.values()))))
            for i, row in enumerate(rows):
                category = category_of(row)
                found[f"L1 {broad_category(category)}"].append((item.id, founded[i]))
                found[f"L2 {category}"].append((item.id, founded[i]))
                found[f"L2 {category}, without dependencies"].append((item.id, answers[i]))
                if category == _SPATIAL:
                    for part in ("front and behind", "orientation"):
                        if SPATIAL_PARTS[part].search(row["question"]):
                            found[f"{_SPATIAL}: {part}"].append((item.id, founded[i]))
        return [
            make_metric("overall", overall, is_headline=True),
            *(make_metric(name, found[name], is_headline=name == f"L2 {_SPATIAL}") for name in sorted(found)),
        ]


def category_of(row: Mapping[str, Any]) -> str:
    """Category of a question, such as `"relation - spatial"`."""
    return row["tuple"].split("(")[0].strip()


def broad_category(category: str) -> str:
    """`"relation"` for `"relation - spatial"`."""
    return category.split("-")[0].strip()


def official_rows(item: Item) -> dict[int, Mapping[str, Any]]:
    """
    Returns the questions of an item that the official program uses, by their numbers: without the first row of the
    table, and only those after the last gap if the item's rows are not consecutive.
    """
    rows = [row for row in item.data["rows"] if row["row"] > 0]
    starts = [0, *(i + 1 for i, (one, other) in enumerate(pairwise(rows)) if other["row"] != one["row"] + 1)]
    return {row["id"]: row for row in rows[starts[-1] :]}


def _official_tile(item: Item, evidence: Evidence, number: int) -> tuple[float, list[tuple[str, float]]] | None:
    """
    Returns the score of an image, and (category, answer) of each question, as the official program computes them;
    `None` if it fails on this image.
    """
    key_of = {id(row): str(i) for i, row in enumerate(item.data["rows"])}
    rows = official_rows(item)
    replies = {qid: evidence.reply(item, number, key_of[id(row)]) for qid, row in rows.items()}
    if not rows or None in replies.values():
        return None
    scores = {qid: float(reply == "yes") for qid, reply in replies.items()}
    categories = [(category_of(row), scores[qid]) for qid, row in rows.items()]
    for qid, row in rows.items():  # in file order, in place: a parent may already have been set to 0
        for parent in row["dependency"]:
            if parent == 0:
                continue
            if parent not in scores:
                return None
            if scores[parent] == 0:
                scores[qid] = 0.0
                break
    return fmean(scores.values()), categories


def _files_of(item: Item, evidence: Evidence, num_images: int) -> list[list[int]]:
    """Returns the numbers of the images of an item, grouped by file."""
    files: dict[str, list[int]] = defaultdict(list)
    for number in evidence.numbers(item):
        files[grid_of(evidence.images[item.id, number], num_images)].append(number)
    return list(files.values())


def _parents(rows: Sequence[Mapping[str, Any]]) -> dict[int, list[int]]:
    """Returns position of a question → positions of the questions that it depends on."""
    positions: dict[int, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        positions[row["id"]].append(i)
    return {i: [p for parent in row["dependency"] for p in positions.get(parent, ())] for i, row in enumerate(rows)}


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if missing := [column for column in _COLUMNS if column not in (reader.fieldnames or ())]:
                raise ValueError(f"{path} has no column {', '.join(missing)}.")
            for number, row in enumerate(reader):
                rows.append(_read_row(path, number, row))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None
    if not rows:
        raise ValueError(f"{path} has no rows.")
    return rows


def _read_row(path: Path, number: int, row: Mapping[str, str | None]) -> dict[str, Any]:
    where = f"{path}, row {number + 1}"
    if empty := [column for column in _COLUMNS if not (row[column] or "").strip()]:
        raise ValueError(f"{where} has nothing in {', '.join(empty)}.")
    texts = {column: str(row[column]) for column in _COLUMNS}
    if "/" in texts["item_id"]:
        raise ValueError(f"{where} has the item_id {texts['item_id']!r}, which cannot name a file.")
    try:
        id, dependency = int(texts["proposition_id"]), [int(part) for part in texts["dependency"].split(",")]
    except ValueError:
        raise ValueError(
            f"{where} has the proposition_id {texts['proposition_id']!r} and the dependency {texts['dependency']!r}, and they must be "
            "a whole number, and whole numbers with commas between them."
        ) from None
    return {
        "item": texts["item_id"],
        "row": number,
        "id": id,
        "dependency": dependency,
        "tuple": texts["tuple"],
        "question": texts["question_natural_language"],
        "text": texts["text"],
    }
