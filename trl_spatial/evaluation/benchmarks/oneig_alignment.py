"""OneIG-Bench, alignment part: yes/no questions about grids of images, some of which depend on others."""

import csv
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from statistics import fmean
from typing import Any

from PIL import Image

from .base import Benchmark, DataFile, Evidence, ImageKey, Item, Metric, OfficialError, Protocol, Question, images_of
from .grids import SUFFIXES, choose_grid, drawn_tiles, open_tile, single_path, tile_names, write_grid
from .layouts import find_model
from .yesno import SPATIAL_PARTS, drop_unfounded, is_answer, make_metric, read_answer


_COMMIT = "2240296c34014d2d775bef294a3bed876bf38b39"
_PAGE = f"https://raw.githubusercontent.com/OneIG-Bench/OneIG-Benchmark/{_COMMIT}"
_PROMPTS = "OneIG-Bench.csv"
_COLUMNS = ("category", "id", "prompt_en")
# folder → category in the prompt file
CLASSES = {"anime": "Anime_Stylization", "human": "Portrait", "object": "General_Object"}


class OneIGAlignment(Benchmark):
    """
    [OneIG-Bench](https://huggingface.co/papers/2506.07977), alignment, in English. As in DPG-Bench, a yes counts unless a question that
    it depends on is answered no; the official program considers only direct dependencies. Its judge is Qwen2.5-VL-7B.
    """

    name = "oneig-alignment"
    title = "OneIG-Bench (alignment)"
    source = f"https://github.com/OneIG-Bench/OneIG-Benchmark/tree/{_COMMIT}"
    license = "none stated"
    paper = "https://huggingface.co/papers/2506.07977"
    files = (
        DataFile(_PROMPTS, f"{_PAGE}/{_PROMPTS}", "e06c65b32252d82406fb1a27f13022b38d432c899a2486eb49ab0c100f83b3e1"),
        *(
            DataFile(f"{name}.json", f"{_PAGE}/scripts/alignment/Q_D/{name}.json", sha256)
            for name, sha256 in (
                ("anime", "21ea3d0360e69d72bc5f4cbb93b203d293d16f5c2f626634a52b990119e0a6e3"),
                ("human", "0e92b25c6bc4091cac05fa0f4269b3b37465a7cd43ca2768f55f56149cdbf13b"),
                ("object", "350dfdf72c2da143c78a7544d4c554faf6698c1ba4fcd27c7a9cc9199d487e0e"),
            )
        ),
    )
    num_images = 4
    judges = frozenset({"vision"})

    def load(self, folder: Path) -> list[Item]:
        prompts = _read_prompts(folder / _PROMPTS)
        items = []
        for name in CLASSES:
            path = folder / f"{name}.json"
            for id, row in _read_object(path).items():
                where = f"{path}, row {id!r}"
                if (prompt := prompts.get((CLASSES[name], id))) is None:
                    raise ValueError(f"{where} has no prompt of the category {CLASSES[name]} in {_PROMPTS}.")
                questions = read_questions(row, where)
                is_spatial = any(SPATIAL_PARTS["spatial"].search(question["text"]) for question in questions)
                items.append(Item(f"{name}/{id}", prompt, {"questions": questions}, is_spatial))
        return items

    def image_path(self, item: Item, number: int) -> str:
        return single_path(_grid_path(item, find_model((), ())), number, self.num_images)

    def assign(self, items: Sequence[Item], files: Sequence[str], protocol: Protocol) -> dict[ImageKey, str]:
        model = find_model(files, CLASSES)
        entries: dict[str, set[str]] = defaultdict(set)  # class → entries of its folder
        for file in files:
            parts = PurePosixPath(file).parts
            if len(parts) > 2 and parts[1] == model:
                entries[parts[0]].add("/".join(parts[:3]))
        known, assigned = set(files), dict[ImageKey, str]()
        for item in items:
            name, _, id = item.id.partition("/")
            beginning = f"{name}/{model}/{id}"
            found = sorted(entry for entry in entries[name] if entry.startswith(beginning))
            if protocol == "official":
                tiles = list(enumerate(tile_names(found[0], self.num_images) if len(found) == 1 else ()))
            else:
                grid = choose_grid(item, _grid_path(item, model), [f for f in found if _may_be(f, beginning)])
                tiles = drawn_tiles(grid, self.num_images, files) if grid else []
            if found and (found[0] in known or protocol == "fixed"):
                assigned |= {(item.id, number): tile for number, tile in tiles}
        return assigned

    def finish(self, folder: Path, items: Sequence[Item]) -> None:
        for item in items:
            write_grid(folder, item, _grid_path(item, find_model((), ())), self.num_images)

    def open(self, folder: Path, file: str) -> Image.Image:
        """See [`Benchmark.open`]. A black image is one that was not drawn, and cannot be read."""
        image = open_tile(folder, file, self.num_images)
        if image.getbbox() is None:
            raise ValueError("is black, as where no image was drawn")
        return image

    def questions(self, item: Item, protocol: Protocol) -> list[Question]:
        return [
            Question(
                key=str(question["id"]),
                kind="text",
                text=f'{question["text"]}\nAnswer with the single word "Yes" or "No".',
                options={"max_tokens": 128, "temperature": 0.0},
                is_usable=is_answer,
            )
            for question in item.data["questions"]
        ]

    def official(self, items: Sequence[Item], evidence: Evidence) -> dict[str, float | None]:
        scores = []
        for item in items:
            if numbers := evidence.numbers(item):
                ids = [question["id"] for question in item.data["questions"]]
                if sorted(ids) != list(range(1, len(ids) + 1)):
                    raise OfficialError(
                        f"the questions of item {item.id!r} have the numbers {ids}, and the program counts from 1 without a gap."
                    )
                scores.append(fmean(_official_image(item, number, evidence) for number in numbers))
        return {"alignment": fmean(scores) if scores else None}

    def fixed(self, items: Sequence[Item], evidence: Evidence) -> list[Metric]:
        values: dict[str, list[tuple[str, float]]] = defaultdict(list)
        for item, number in images_of(items, self.num_images):
            questions = item.data["questions"]
            replies = {question["id"]: evidence.reply(item, number, str(question["id"])) for question in questions}
            founded = drop_unfounded(
                {id: read_answer(reply) is True for id, reply in replies.items()},
                {question["id"]: question["parents"] for question in questions},
            )
            score = fmean(founded.values())
            values["alignment"].append((item.id, score))
            values[f"alignment: {item.id.partition('/')[0]}"].append((item.id, score))
            for question in questions:
                for part, words in SPATIAL_PARTS.items():
                    if words.search(question["text"]):
                        values[f"questions: {part}"].append((item.id, founded[question["id"]]))
        return [make_metric(name, values[name], is_headline=name == "alignment") for name in sorted(values)]


def read_questions(row: Any, where: str) -> list[dict[str, Any]]:
    """
    The questions of a prompt.

    Args:
        row (`Any`):
            What the file says: `question` and `dependency`, JSON objects or texts of JSON objects, by the number of the question.
        where (`str`):
            Names the file and the row.

    Returns:
        `list[dict]`: `id`, `text`, and `parents`, the questions it rests on.

    Raises:
        `ValueError`: If the row has another form.
    """
    parts = {}
    for name in ("question", "dependency"):
        value = row.get(name) if isinstance(row, Mapping) else None
        try:
            value = json.loads(value) if isinstance(value, str) else value
            parts[name] = {int(id): entry for id, entry in value.items()}  # type: ignore[union-attr]
        except (ValueError, AttributeError):
            raise ValueError(f"{where} has no {name} by number: {str(value)[:80]!r}.") from None
    texts, parents = parts["question"], parts["dependency"]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts.values()):
        raise ValueError(f"{where} has no questions, or an empty one.")
    if strange := sorted(parents.keys() - texts.keys()):
        raise ValueError(f"{where} has dependencies of the questions {strange}, which do not exist.")
    for id, own in parents.items():
        if not isinstance(own, list) or not all(isinstance(parent, int) for parent in own):
            raise ValueError(f"{where} has the dependency {own!r} of question {id}, which must be a list of numbers.")
    return [{"id": id, "text": text, "parents": parents.get(id, [])} for id, text in texts.items()]


def _official_image(item: Item, number: int, evidence: Evidence) -> float:
    """Scores an image; a yes counts if its direct parents were answered yes, whatever those depend on."""
    questions = item.data["questions"]
    answers = {question["id"]: evidence.reply(item, number, str(question["id"])) == "Yes" for question in questions}
    return fmean(
        answers[question["id"]] and all(answers.get(parent, True) for parent in question["parents"])
        for question in questions
    )


def _grid_path(item: Item, model: str) -> str:
    name, _, id = item.id.partition("/")
    return f"{name}/{model}/{id}.png"


def _may_be(file: str, beginning: str) -> bool:
    """Whether a file is an image whose name does not continue with another digit of the id."""
    rest = file.removeprefix(beginning)
    return PurePosixPath(file).suffix.lower() in SUFFIXES and not rest[:1].isdigit()


def _read_prompts(path: Path) -> dict[tuple[str, str], str]:
    """Reads (category, id) → prompt."""
    prompts: dict[tuple[str, str], str] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            if missing := [column for column in _COLUMNS if column not in (reader.fieldnames or ())]:
                raise ValueError(f"{path} has no column {', '.join(missing)}.")
            for number, row in enumerate(reader, start=1):
                if row["category"] in CLASSES.values():
                    if not (row["prompt_en"] or "").strip():
                        raise ValueError(f"{path}, row {number} has no prompt_en.")
                    prompts[row["category"], row["id"]] = row["prompt_en"]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None
    return prompts


def _read_object(path: Path) -> dict[str, Any]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}.") from None
    if not isinstance(rows, dict) or not rows:
        raise ValueError(f"{path} is not a JSON object of questions.")
    return rows
