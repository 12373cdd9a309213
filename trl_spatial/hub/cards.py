"""Cards of repositories: a template of `hub_cards/`, filled with what a run has recorded of itself."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
)


CARD_FILE = "card.json"
SAMPLES_FILE = "samples.png"
PAPER = {
    "title": "Enhancing Spatial Understanding in Image Generation via Reward Modeling",
    "id": "2602.24233",
    "citation": """\
@inproceedings{tang2026enhancing,
    title        = {{Enhancing Spatial Understanding in Image Generation via Reward Modeling}},
    author       = {Tang and others},
    year         = 2026,
    booktitle    = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
    eprint       = {arXiv:2602.24233},
}""",
}


def card_template(name: str) -> Path:
    """
    Returns the path of a card template of `hub_cards/`, which lies in the package when it is installed from a wheel and
    beside it in a checkout.

    Args:
        name (`str`):
            File name of the template.

    Raises:
        `FileNotFoundError`: If there is none.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "hub_cards", package.parent / "hub_cards"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"There is no card template {name} in {package / 'hub_cards'} or beside {package}.")


@dataclass(frozen=True)
class Result:
    """
    One measured number.

    Args:
        metric (`str`):
            What was measured, such as `"accuracy"`.
        value (`float`):
            The number.
        num_samples (`int`, *optional*):
            On how many independent samples.
        unit (`str`, *optional*):
            What a sample is: `"pairs"`, `"prompts"`.
        interval (`tuple[float, float]`, *optional*):
            95 % confidence interval.
        dataset (`str`, *optional*):
            What it was measured on, in words.
        dataset_id (`str`, *optional*):
            Id of that dataset on the Hub.
        split (`str`, *optional*):
            Split of it.
    """

    metric: str
    value: float
    num_samples: int | None = None
    unit: str | None = None
    interval: tuple[float, float] | None = None
    dataset: str | None = None
    dataset_id: str | None = None
    split: str | None = None

    @property
    def where(self) -> str:
        """The dataset and its split in words."""
        return " ".join(part for part in (self.dataset_id or self.dataset or "held-out data", self.split) if part)


@dataclass(frozen=True)
class Card:
    """
    What is known about a model or a dataset, and the template that tells it. Saved as `card.json` beside what it describes,
    it is filled again for every place that goes to.

    Args:
        template (`str`):
            File name of the template in `hub_cards/`.
        front_matter (`dict[str, Any]`):
            Metadata of the repository but for what follows: `library_name`, `pipeline_tag`, `license`, `tags`.
        values (`dict[str, Any]`, *optional*):
            What the template shows: anything that JSON holds.
        results (`list[Result]`, *optional*):
            What was measured.
        base_model (`str`, *optional*):
            Hub id of the model that was trained.
        dataset (`str`, *optional*):
            Hub id of the dataset it was trained on.
        readme_digest (`str`, *optional*):
            SHA-256 of the `README.md` that was made of it, by which one that somebody has edited is told from it.
    """

    template: str
    front_matter: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    results: list[Result] = field(default_factory=list)
    base_model: str | None = None
    dataset: str | None = None
    readme_digest: str | None = None

    @classmethod
    def load(cls, folder: str | Path) -> "Card | None":
        """
        Reads the card of a folder, or returns `None` if it has none.

        Raises:
            `ValueError`: If `card.json` is not one of ours.
        """
        file = Path(folder) / CARD_FILE
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            results = [
                Result(**item | {"interval": tuple(item["interval"]) if item.get("interval") else None})
                for item in content.pop("results", [])
            ]
            return cls(**content, results=results)
        except (ValueError, TypeError, AttributeError) as error:  # not JSON, not UTF-8, not these fields
            raise ValueError(f"{file} is not the card of a run ({error}). Remove it and write a README.md.") from error

    def save(self, folder: str | Path, *, model_id: str | None = None) -> None:
        """
        Writes `card.json` and `README.md`.

        Args:
            folder (`str` or `Path`):
                Where to; it must be there.
            model_id (`str`, *optional*):
                What users load. Defaults to the folder's name.
        """
        folder = Path(folder)
        has_samples = (folder / SAMPLES_FILE).is_file()
        for name, content in self.files(model_id or folder.absolute().name, has_samples=has_samples).items():
            (folder / name).write_bytes(content)

    def files(self, model_id: str, *, has_samples: bool = False) -> dict[str, bytes]:
        """`README.md` and `card.json`, by their names; arguments as for [`~Card.render`]."""
        readme = self.render(model_id, has_samples=has_samples).encode()
        recorded = replace(self, readme_digest=hashlib.sha256(readme).hexdigest())
        content = json.dumps(asdict(recorded), indent=1, ensure_ascii=False) + "\n"
        return {"README.md": readme, CARD_FILE: content.encode()}

    def has_made(self, readme: Path) -> bool:
        """Whether a `README.md` is as the card was filled, and not edited since."""
        return hashlib.sha256(readme.read_bytes()).hexdigest() == self.readme_digest

    def with_results(self, results: list[Result], **values: Any) -> "Card":
        """The same card with other results, and with more values."""
        return replace(self, results=results, values=self.values | values)

    def render(self, model_id: str, *, has_samples: bool = False) -> str:
        """
        Fills the template.

        Args:
            model_id (`str`):
                What users load: the id of the repository, or a folder.
            has_samples (`bool`, *optional*, defaults to `False`):
                Whether the picture `samples.png` lies beside the card.

        Returns:
            `str`: the text of `README.md`, front matter included.
        """
        model_name = model_id.split("/")[-1]
        data = ModelCardData(
            **self.front_matter,
            base_model=self.base_model,
            datasets=self.dataset,
            model_name=model_name if self.results else None,
            eval_results=[_legacy_result(self, result) for result in self.results] or None,
        )
        card = ModelCard.from_template(
            data,
            template_path=str(card_template(self.template)),
            model_id=model_id,
            model_name=model_name,
            base_model=self.base_model,
            dataset=self.dataset,
            results=[_row(result) for result in self.results],
            samples=SAMPLES_FILE if has_samples else None,
            paper=PAPER,
            **self.values,
        )
        return str(card)

    def result_files(self) -> dict[str, bytes]:
        """The results of datasets on the Hub, in the Hub's new format: name in the repository → content."""
        files = {}
        for result in self.results:
            if result.dataset_id is None:
                continue
            notes = [f"{result.num_samples} {result.unit or 'samples'}"] if result.num_samples else []
            if result.interval:
                notes.append("95 % interval {:.4g} to {:.4g}".format(*result.interval))
            entry = EvalResultEntry(
                dataset_id=result.dataset_id,
                task_id=_slug(" ".join(part for part in (result.split, result.metric) if part)),
                value=_rounded(result.value),
                notes=", ".join(notes) or None,
            )
            content = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
            name = _slug(f"{result.dataset_id} {result.split or ''} {result.metric}")
            files[f".eval_results/{name}.yaml"] = content.encode()
        return files


def training_values(
    settings: dict[str, Any], *, trainer_name: str, hardware: str, training_time: str | None, packages: tuple[str, ...]
) -> dict[str, Any]:
    """
    What the cards of all trainings show.

    Args:
        settings (`dict[str, Any]`):
            What the training was set to; entries that are `None` are left out.
        trainer_name (`str`):
            Name of the trainer.
        hardware (`str`):
            What it ran on.
        training_time (`str`, *optional*):
            How long it took.
        packages (`tuple[str, ...]`):
            Packages whose versions are shown.
    """
    return {
        "settings": {name: value for name, value in settings.items() if value is not None},
        "trainer_name": trainer_name,
        "hardware": hardware,
        "training_time": training_time,
        "versions": {name: version(name) for name in packages},
    }


def _legacy_result(card: Card, result: Result) -> EvalResult:
    task = card.front_matter.get("pipeline_tag") or "other"
    args = {
        "num_samples": result.num_samples,
        "confidence_interval_95": [_rounded(end) for end in result.interval] if result.interval else None,
    }
    return EvalResult(
        task_type=task,
        dataset_type=result.dataset_id or _slug(result.dataset or "held-out data"),
        dataset_name=result.dataset_id or result.dataset or "held-out data",
        dataset_split=result.split,
        metric_type=_slug(result.metric),
        metric_name=result.metric,
        metric_value=_rounded(result.value),
        metric_args={name: value for name, value in args.items() if value is not None} or None,
    )


def _row(result: Result) -> dict[str, str]:
    """A result as the cells of a table."""
    interval = "" if result.interval is None else "{:.4g} to {:.4g}".format(*result.interval)
    number = "" if result.num_samples is None else f"{result.num_samples:,} {result.unit or 'samples'}"
    return {
        "metric": result.metric,
        "value": f"{result.value:.4g}",
        "interval": interval,
        "number": number,
        "where": result.where,
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _slug(text: str) -> str:
    kept = "".join(letter if letter.isalnum() else "_" for letter in text.lower())
    return "_".join(part for part in kept.split("_") if part)
