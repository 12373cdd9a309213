"""
An evaluation of images in its own folder: plan, images, answers and tables. Every step can be interrupted and resumed.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from PIL import Image

from ..endpoints import RecordedSpend
from ..generation.engines import draw_jobs, process_state
from ..generation.jobs import DrawnImage, ImageJob
from ..store import PROCESS, RecordLog, SharedLog, read_record, write_atomically, write_record
from ..training.processes import fail_together
from .benchmarks import make_benchmark
from .benchmarks.base import PROTOCOLS, Benchmark, Evidence, ImageKey, Item, Protocol, Question, images_of
from .data_files import find_data, hash_data
from .judging import Task


_FLUSH = 16  # images recorded at once
PLAN_FILE, FILES_FILE = "plan.json", "files.json"
ITEMS_FILE = "items.jsonl"  # is written before the plan


@dataclass(frozen=True)
class ImagePlan:
    """
    The plan of an evaluation of images.

    Args:
        benchmark (`str`):
            Name of the benchmark.
        judges (`Mapping[str, str]`):
            Role → name of the judge, as [`~evaluation.judging.load_judges`] takes it.
        generator (`Mapping[str, Any]`, *optional*):
            The generator, as [`~generation.painters.make_painter`] takes it. If not set, the images exist already.
        images (`str`, *optional*):
            Folder of images in the benchmark's official layout, drawn elsewhere.
        num_images (`int`, *optional*):
            Images for each prompt. If not set, the benchmark's.
        limit (`int`, *optional*):
            Number of prompts to use, evenly spread. If not set, all.
        spatial_only (`bool`, *optional*, defaults to `False`):
            Whether to use only the spatial part.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the images.
        trained_on (`Sequence[str]`, *optional*):
            Names of benchmarks that the generator is known to have been trained on.
        data_hash (`str`, *optional*):
            Hash of the benchmark's data.

    Raises:
        `ValueError`: If there is not exactly one of `generator` and `images`, a number is out of its range, or `trained_on` names no
            benchmark.
    """

    benchmark: str
    judges: Mapping[str, str]
    generator: Mapping[str, Any] | None = None
    images: str | None = None
    num_images: int | None = None
    limit: int | None = None
    spatial_only: bool = False
    seed: int = 0
    trained_on: Sequence[str] = ()
    data_hash: str = ""

    def __post_init__(self) -> None:
        if (self.generator is None) == (self.images is None):
            raise ValueError("Name either a generator, which draws the images, or a folder of images.")
        for name in self.trained_on:
            make_benchmark(name)  # raises if there is no such benchmark
        for name in ("num_images", "limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"`{name}` is {value}. It must be at least 1.")

    def make_benchmark(self) -> Benchmark:
        """The benchmark, with the number of images of this plan."""
        benchmark = make_benchmark(self.benchmark)
        if self.num_images is not None:
            benchmark.num_images = self.num_images  # type: ignore[misc]
        return benchmark


class ImageRun:
    """
    The folder of an evaluation of images.

    Args:
        folder (`Path`):
            The folder.
        plan ([`ImagePlan`], *optional*):
            The plan. If not set, that of the folder.

    Attributes:
        items (`list[Item]`):
            The prompts, once [`begin`] was called or if the folder holds them.

    Raises:
        `ValueError`: If the folder holds something else, or an evaluation with another plan.
    """

    def __init__(self, folder: Path, plan: ImagePlan | None = None):
        self.folder = folder
        found = read_record(folder / PLAN_FILE)
        if plan is None:
            if found.get("kind") != "images":
                raise ValueError(
                    f"{folder} is not the folder of an image evaluation: it has no {PLAN_FILE} of `evaluate images`."
                )
            plan = ImagePlan(**{key: value for key, value in found.items() if key != "kind"})
        elif (
            not found
            and folder.is_dir()
            and any(path.name[0] != "." and path.name != ITEMS_FILE for path in folder.iterdir())
        ):
            raise ValueError(f"{folder} is not empty and does not hold an evaluation. Name another folder.")
        self.plan = plan
        self.benchmark = plan.make_benchmark()
        self.images = SharedLog(folder, "images")
        self.answers = RecordLog(folder / "answers.jsonl")
        self.items = [Item(**record) for record in RecordLog(folder / ITEMS_FILE)]

    @property
    def image_folder(self) -> Path:
        """The folder of the images."""
        return self.folder / "images" if self.plan.images is None else Path(self.plan.images)

    def prepare(self, data: str | None) -> dict[str, Any]:
        """
        Reads the benchmark's data and compares the plan with that of the folder. Nothing is written.

        Args:
            data (`str`, *optional*):
                See [`~evaluation.data_files.find_data`].

        Returns:
            `dict`: The plan, as it is recorded.

        Raises:
            `ValueError`: If the data is unavailable or damaged, or the folder was begun with another plan.
        """
        folder = find_data(self.benchmark, data)
        try:
            loaded = self.benchmark.load(folder)
        except ValueError as error:
            if any((folder / file.name).is_file() for file in self.benchmark.files):
                raise
            first = self.benchmark.files[0]
            raise ValueError(
                f"{folder} holds no file of {self.benchmark.title}, such as {first.name}: {first.url}. ({error})"
            ) from None
        items = select_items(loaded, self.plan.limit, self.plan.spatial_only)
        if not items:
            raise ValueError(f"There are no prompts left of {self.benchmark.title} in {folder}.")
        self.plan = replace(self.plan, data_hash=hash_data(folder))
        now = json.loads(json.dumps({"kind": "images", **asdict(self.plan)}))
        then = read_record(self.folder / PLAN_FILE)
        is_begun = self.images.is_begun or self.answers.path.is_file()
        if then and then != now and is_begun:
            name = next(name for name in now if then.get(name) != now[name])
            raise ValueError(
                f"{self.folder} was begun with {name} {then.get(name)!r}, which is {now[name]!r} now. Restore it, or name another folder."
            )
        self.items = items
        return now

    def begin(self, data: str | None) -> None:
        """As [`prepare`], and records the prompts and the plan in the folder."""
        plan = self.prepare(data)
        if PROCESS == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(asdict(item), ensure_ascii=False) for item in self.items)
            write_atomically(self.folder / ITEMS_FILE, "".join(f"{line}\n" for line in lines))
            write_record(self.folder / PLAN_FILE, plan)

    def spend(self, limit_usd: float = math.inf) -> RecordedSpend:
        """Returns the spending limit for judges on servers, in US dollars."""
        return RecordedSpend(limit_usd, RecordLog(self.folder / "payments.jsonl"))

    def missing_jobs(self) -> list[ImageJob]:
        """Returns the images that are still to be drawn. Refused images are not requested again."""
        refused = {(record["item"], record["image"]) for record in self.images if record["refusal"] is not None}
        return [
            ImageJob(f"{item.id}/{number}", item.prompt, self._seed_of(item, number))
            for item, number in images_of(self.items, self.benchmark.num_images)
            if (item.id, number) not in refused
            and not (self.image_folder / self.benchmark.image_path(item, number)).is_file()
        ]

    def generate(self, *, engine: str = "local", num_workers: int | None = None, progress: bool = True) -> None:
        """
        Draws the images that are missing, into the benchmark's official layout.

        Args:
            engine (`str`, *optional*, defaults to `"local"`), num_workers (`int`, *optional*), progress (`bool`, *optional*):
                See [`~generation.engines.draw_jobs`].

        Raises:
            `ValueError`: If the generator cannot be loaded.
            [`~generation.jobs.DrawingError`]: If an image cannot be drawn.
        """
        if self.plan.generator is None:
            return
        jobs = self.missing_jobs()
        if engine == "local":
            process_state().wait_for_everyone()  # no process may draw before all have listed the same jobs
        items = {item.id: item for item in self.items}
        drawn: list[dict[str, Any]] = []
        with fail_together("Drawing images"):
            try:
                for image in draw_jobs(
                    self.plan.generator, jobs, engine=engine, num_workers=num_workers, progress=progress and bool(jobs)
                ):
                    drawn.append(self._keep(items, image))
                    if len(drawn) == _FLUSH:
                        self.images.append(drawn)
                        drawn = []
            finally:  # keep what was drawn before an error or an interruption
                self.images.append(drawn)
        if PROCESS == 0:
            self.benchmark.finish(self.image_folder, self.items)

    def open(self, file: str) -> Image.Image:
        """See [`~evaluation.benchmarks.base.Benchmark.open`]."""
        return self.benchmark.open(self.image_folder, file)

    def files(self) -> list[str]:
        """Every file in the folder of images, relative to it, sorted."""
        folder = self.image_folder
        if not folder.is_dir():
            raise ValueError(f"There is no folder of images {folder}.")
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    def tasks(self, protocols: Sequence[Protocol] = PROTOCOLS) -> list[Task]:
        """
        Returns the existing images, and the questions about each. Records the list of files, so that tables can be
        made without the images.

        Raises:
            `ValueError`: If the folder has no image of the benchmark, or states that images are those of other
                prompts.
        """
        files = self.files()
        self.benchmark.check_folder(self.image_folder, self.items)
        if not any(self.assignments(files).values()) and not self.refusals():
            raise ValueError(
                f"None of the {len(files):,} files in {self.image_folder} is an image of {self.benchmark.title}. The image of its "
                f"first prompt would be {self.benchmark.image_path(self.items[0], 0)}."
            )
        both = [protocol for protocol in PROTOCOLS if protocol in (*protocols, *self.protocols())]
        write_record(self.folder / FILES_FILE, {"files": files, "protocols": both})
        items = {item.id: item for item in self.items}
        questions: dict[tuple[str, str], dict[str, Question]] = {}
        for protocol, assignment in self.assignments(files).items():
            for (id, _), file in assignment.items() if protocol in protocols else ():
                asked = questions.setdefault((id, file), {})
                asked |= {question.key: question for question in self.benchmark.questions(items[id], protocol)}
        return [Task(id, file, list(asked.values())) for (id, file), asked in questions.items()]

    def question_kinds(self) -> set[str]:
        """The kinds of questions to the vision-language model, by either protocol."""
        kinds: set[str] = {
            question.kind
            for protocol in PROTOCOLS
            for item in self.items
            for question in self.benchmark.questions(item, protocol)
        }
        return kinds - {"boxes"}

    def assignments(self, files: Sequence[str]) -> dict[Protocol, dict[ImageKey, str]]:
        """Assigns files to images, by protocol."""
        return {protocol: self.benchmark.assign(self.items, files, protocol) for protocol in PROTOCOLS}

    def evidence(self) -> dict[Protocol, Evidence]:
        """Collects the evidence in the records, by protocol, without reading images."""
        unreadable = self.unreadable()
        replies: dict[tuple[str, str], dict[str, list[Any]]] = {}
        for answer in self.answers:
            replies.setdefault((answer["item"], answer["file"]), {})[answer["question"]] = answer["replies"]
        evidence = {}
        for protocol, assignment in self.assignments(self.listed_files()).items():
            images = {key: file for key, file in assignment.items() if file not in unreadable}
            evidence[protocol] = Evidence(
                images,
                {
                    (id, number, question): given
                    for (id, number), file in images.items()
                    for question, given in replies.get((id, file), {}).items()
                },
            )
        return evidence

    def listed_files(self) -> list[str]:
        """Returns the files that existed when judges were last asked."""
        return read_record(self.folder / FILES_FILE).get("files", [])

    def protocols(self) -> list[Protocol]:
        """The protocols for which judges were asked."""
        return read_record(self.folder / FILES_FILE).get("protocols", [])

    def unreadable(self) -> dict[str, str]:
        """File → why it could not be read, when judges were asked."""
        reasons = {answer["file"]: answer.get("unreadable") for answer in self.answers}  # the last answer counts
        return {file: reason for file, reason in reasons.items() if reason is not None}

    def refusals(self) -> dict[ImageKey, str]:
        """Returns (item, image) → why it was not drawn."""
        return {(r["item"], r["image"]): r["refusal"] for r in self.images if r["refusal"] is not None}

    def _keep(self, items: Mapping[str, Item], image: DrawnImage) -> dict[str, Any]:
        id, _, number = image.id.rpartition("/")
        path = self.image_folder / self.benchmark.image_path(items[id], int(number))
        if image.png is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, image.png)
        return {
            "item": id,
            "image": int(number),
            "refusal": image.refusal,
            "recipe": image.recipe,
            "seconds": round(image.seconds, 3),
            "cost": round(image.cost, 6),
        }

    def _seed_of(self, item: Item, number: int) -> int:
        # 31 bits, the most that servers accept; independent of the generator, so that all start from the same noise
        key = repr((self.plan.seed, item.id, item.prompt, number)).encode()
        return int.from_bytes(blake2b(key, digest_size=8).digest(), "big") >> 33


def select_items(items: Iterable[Item], limit: int | None, spatial_only: bool) -> list[Item]:
    """Selects all or only spatial items, at most `limit`, evenly spread, so that every kind of prompt is included."""
    chosen = [item for item in items if item.is_spatial or not spatial_only]
    if limit is None or limit >= len(chosen):
        return chosen
    return [chosen[number * len(chosen) // limit] for number in range(limit)]
