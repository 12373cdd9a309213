"""Model and dataset cards: templates from `hub_cards/`, filled in with the record of a run."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
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
    Returns the path of a card template; a `FileNotFoundError` if there is none of that name. `hub_cards/` is in the package if it
    was installed from a wheel, and beside it in a checkout.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "hub_cards", package.parent / "hub_cards"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"There is no card template {name} in {package / 'hub_cards'} or beside {package}.")


@cache
def _compile(name: str) -> jinja2.Template:
    """The template of that name. It is compiled once: that takes longer than to fill it in at each checkpoint."""
    return jinja2.Template(card_template(name).read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Result:
    """
    A measured number of a metric, such as `"accuracy"`: how many independent samples of which unit (`"pairs"`, `"prompts"`) there were,
    its 95 % interval, and a description, Hub id and split of the dataset.
    """

    metric: str
    value: float
    num_samples: int | None = None
    unit: str | None = None
    interval: tuple[float, float] | None = None
    dataset: str | None = None
    dataset_id: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Card:
    """
    The record of a model and the template in `hub_cards/` that presents it. The record is saved as `card.json` beside the model, and
    the template is filled in again for each repository that the model is uploaded to.

    `front_matter` holds `library_name`, `pipeline_tag`, `license` and `tags`; `values`, as JSON, is for the template; `base_model` and
    `dataset` are Hub ids; a `README.md` with another SHA-256 than `readme_digest` has been edited.
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
            `ValueError`: If `card.json` is damaged or was not written by [`~Card.save`].
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
        except (ValueError, RecursionError, TypeError, AttributeError) as error:  # not a JSON object with these fields
            raise ValueError(f"{file} is not the card of a run ({error}). Remove it and write a README.md.") from error

    def save(self, folder: str | Path, *, model_id: str | None = None) -> None:
        """Writes `card.json` and `README.md` to an existing folder. `model_id` is the name that users load, by default the folder's."""
        folder = Path(folder)
        has_samples = (folder / SAMPLES_FILE).is_file()
        for name, content in self.files(model_id or folder.absolute().name, has_samples=has_samples).items():
            partial = folder / f".{name}.partial"  # an interruption leaves the old file intact
            partial.write_bytes(content)
            partial.replace(folder / name)

    def files(self, model_id: str, *, has_samples: bool = False) -> dict[str, bytes]:
        """`README.md` and `card.json`, by their names; arguments as for [`~Card.render`]."""
        readme = self.render(model_id, has_samples=has_samples).encode()
        recorded = replace(self, readme_digest=hashlib.sha256(readme).hexdigest())
        content = json.dumps(asdict(recorded), indent=1, ensure_ascii=False) + "\n"
        return {"README.md": readme, CARD_FILE: content.encode()}

    def has_made(self, readme: Path) -> bool:
        """Whether a `README.md` is the rendered one, not edited since."""
        return hashlib.sha256(readme.read_bytes()).hexdigest() == self.readme_digest

    def with_results(self, results: list[Result], **values: Any) -> "Card":
        """Returns the card with other results and with additional values."""
        return replace(self, results=results, values=self.values | values)

    def render(self, model_id: str, *, has_samples: bool = False) -> str:
        """
        Fills in the template; returns the text of `README.md`, front matter included. `model_id` is the name that users load, the id of
        the repository or a folder; with `has_samples`, the picture `samples.png` is beside the card.
        """
        model_name = model_id.split("/")[-1]
        data = ModelCardData(
            **self.front_matter,
            base_model=self.base_model,
            datasets=self.dataset,
            model_name=model_name if self.results else None,
            eval_results=[self._model_index_entry(result) for result in self.results] or None,
        )
        values = (
            data.to_dict()
            | self.values
            | dict(
                card_data=data.to_yaml(),
                model_id=model_id,
                model_name=model_name,
                base_model=self.base_model,
                dataset=self.dataset,
                results=[_row(result) for result in self.results],
                samples=SAMPLES_FILE if has_samples else None,
                paper=PAPER,
            )
        )
        return str(ModelCard(_compile(self.template).render(values)))

    def _model_index_entry(self, result: Result) -> EvalResult:
        args = {
            "num_samples": result.num_samples,
            "confidence_interval_95": [_rounded(end) for end in result.interval] if result.interval else None,
        }
        return EvalResult(
            task_type=self.front_matter.get("pipeline_tag") or "other",
            dataset_type=result.dataset_id or _slug(result.dataset or "held-out data"),
            dataset_name=result.dataset_id or result.dataset or "held-out data",
            dataset_split=result.split,
            metric_type=_slug(result.metric),
            metric_name=result.metric,
            metric_value=_rounded(result.value),
            metric_args={name: value for name, value in args.items() if value is not None} or None,
        )

    def result_files(self) -> dict[str, bytes]:
        """See [`result_files`]."""
        return result_files(self.results)


def result_files(results: Iterable[Result]) -> dict[str, bytes]:
    """Results measured on datasets of the Hub, in its newer format: name in the repository → content."""
    files = {}
    for result in results:
        if result.dataset_id is None:
            continue
        notes = [f"{result.num_samples} {result.unit or 'samples'}"] if result.num_samples else []
        if result.interval:
            notes.append("95 % interval {:.4g} to {:.4g}".format(*result.interval))
        entry = EvalResultEntry(
            dataset_id=result.dataset_id,
            task_id=task_id(result.metric, result.split),
            value=_rounded(result.value),
            notes=", ".join(notes) or None,
        )
        name = _slug(f"{result.dataset_id} {result.split or ''} {result.metric}")
        content = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
        files[f".eval_results/{name}.yaml"] = content.encode()
    return files


def task_id(metric: str, split: str | None = None) -> str:
    """The name of a leaderboard of a dataset: in its `eval.yaml`, and in the results of models."""
    return _slug(f"{split or ''} {metric}")


def _row(result: Result) -> dict[str, str]:
    """Formats a result as the cells of a table row."""
    interval = "" if result.interval is None else "{:.4g} to {:.4g}".format(*result.interval)
    number = "" if result.num_samples is None else f"{result.num_samples:,} {result.unit or 'samples'}"
    return {
        "metric": result.metric,
        "value": f"{result.value:.4g}",
        "interval": interval,
        "number": number,
        "where": " ".join(
            part for part in (result.dataset_id or result.dataset or "held-out data", result.split) if part
        ),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _slug(text: str) -> str:
    kept = "".join(letter if letter.isalnum() else "_" for letter in text.lower())
    return "_".join(part for part in kept.split("_") if part)
