"""
The filter stage: judges, who see one image at a time, decide which pairs are valid; people review what they dispute.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from ...judges.questions import JudgedRelation
from ...preferences.images import load_image
from ...rewards import load_reward
from .build_store import BuildStore
from .judges import Judge, Shown, make_judge
from .render import SIDES


CHUNK = 32  # pairs recorded at once
OTHER = dict(zip(SIDES, reversed(SIDES), strict=True))


@dataclass(frozen=True)
class DrawnPair:
    """
    A pair with both images drawn.

    Args:
        id (`str`):
            Id of the pair.
        prompt (`dict`), edit (`dict`):
            Records of the prompt and of its perturbation.
        images (`dict[str, dict]`):
            Side → record of the image.
    """

    id: str
    prompt: dict[str, Any]
    edit: dict[str, Any]
    images: dict[str, dict[str, Any]]

    def text(self, side: str) -> str:
        """The prompt of a side."""
        return (self.prompt if side == "original" else self.edit)["prompt"]

    def relations(self, side: str) -> list[dict[str, Any]]:
        """The relations that the prompt of a side states."""
        return (self.prompt if side == "original" else self.edit)["relations"]

    def changed(self, side: str) -> list[dict[str, Any]]:
        """The relations that the prompt of a side states and that of the other does not."""
        return [operation["before" if side == "original" else "after"] for operation in self.edit["operations"]]


def drawn_pairs(store: BuildStore) -> dict[str, DrawnPair | str]:
    """Returns id of a pair → the pair, or why an image is missing, in order; skips pairs that are not drawn yet."""
    prompts, edits = store.accepted_prompts(), store.accepted_edits()
    images: dict[str, dict[str, Any]] = {}
    for record in store.images:
        images.setdefault(record["pair"], {})[record["side"]] = record
    pairs: dict[str, DrawnPair | str] = {}
    for id, sides in sorted(images.items()):
        prompt = id.rsplit("-", 1)[0]
        if len(sides) == len(SIDES) and prompt in prompts and prompt in edits:
            refused = next((image["refusal"] for image in sides.values() if image["image"] is None), None)
            pairs[id] = refused or DrawnPair(id, prompts[prompt], edits[prompt], sides)
    return pairs


def filter_pairs(store: BuildStore, *, progress: bool = True) -> None:
    """
    Judges the pairs that were not judged yet.

    Each pair is judged in two directions: the original image should show every relation of the original prompt, and the
    edited image none of those that were changed; and the other way round.

    Args:
        store ([`BuildStore`]):
            Where verdicts are recorded.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Raises:
        `ValueError`: If a judge cannot judge these images.
        [`~endpoints.BudgetReached`]: If `filter.max_cost` is spent.
    """
    done = {record["id"] for record in store.verdicts}
    pairs = drawn_pairs(store)
    todo = [pair for id, pair in pairs.items() if id not in done and isinstance(pair, DrawnPair)]
    if not todo:
        return
    recipe = store.recipe.filter
    spend = store.spend("filter")
    judges = [make_judge(spec, store, spend) for spec in recipe.judges]
    quality = None if recipe.quality is None else load_reward(recipe.quality)
    with tqdm(total=len(pairs), initial=len(done), desc="Verdicts", unit="pair", disable=not progress) as bar:
        for start in range(0, len(todo), CHUNK):
            chunk = todo[start : start + CHUNK]
            answers = {judge.name: _ask(store, judge, chunk) for judge in judges}
            qualities = None if quality is None else _qualities(store, quality, chunk)
            store.verdicts.append(
                [
                    _record(
                        store,
                        pair,
                        {name: found[pair.id] for name, found in answers.items()},
                        None if qualities is None else qualities[pair.id],
                    )
                    for pair in chunk
                ]
            )
            bar.update(len(chunk))


def _ask(store: BuildStore, judge: Judge, pairs: Sequence[DrawnPair]) -> dict[str, dict[str, list[JudgedRelation]]]:
    """
    Returns id of a pair → side → answers about its image: one per relation of its own prompt, then one per relation
    that only the other prompt states.
    """

    def ask(item: tuple[DrawnPair, str]) -> list[JudgedRelation]:
        pair, side = item
        image = pair.images[side]
        shown = Shown(
            store.files.get(image["image"]), pair.text(side), image["seed"],
            store.recipe.render.generators[image["generator"]],
        )  # fmt: skip
        return judge.ask(shown, pair.relations(side) + pair.changed(OTHER[side]))

    items = [(pair, side) for pair in pairs for side in SIDES]
    answers: dict[str, dict[str, list[JudgedRelation]]] = {pair.id: {} for pair in pairs}
    for number, answer in judge.map(ask, items):
        if isinstance(answer, BaseException):
            raise answer
        pair, side = items[number]
        answers[pair.id][side] = answer
    return answers


def _qualities(store: BuildStore, quality: Any, pairs: Sequence[DrawnPair]) -> dict[str, dict[str, float | None]]:
    images = [load_image(store.files.get(pair.images[side]["image"])) for pair in pairs for side in SIDES]
    given = quality(prompts=["an image"] * len(images), images=images)
    values = (None if value is None or not math.isfinite(value) else float(value) for value in given)
    return {pair.id: {side: next(values) for side in SIDES} for pair in pairs}


def _record(
    store: BuildStore,
    pair: DrawnPair,
    answers: Mapping[str, Mapping[str, list[JudgedRelation]]],
    qualities: Mapping[str, float | None] | None,
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "id": pair.id,
        "answers": {
            name: {side: [[given.answer, given.raw, given.served_model] for given in found[side]] for side in SIDES}
            for name, found in answers.items()
        },
        "directions": {
            side: _combine([_direction(pair, side, found) for found in answers.values()]) for side in SIDES
        },
        # people review a random share, whatever the judges say
        "is_sampled": bool(store.rng("review", pair.id).random() < store.recipe.filter.review_share),
    }
    if qualities is not None:
        record["quality"] = dict(qualities)
        values = list(qualities.values())
        if None in values or abs(values[0] - values[1]) > store.recipe.filter.max_quality_gap:  # type: ignore[operator]
            record["dropped"] = f"quality gap: {values}"
    return record


def _direction(pair: DrawnPair, side: str, answers: Mapping[str, list[JudgedRelation]]) -> str:
    """
    Combines one judge's answers on whether the image of `side` shows the prompt of `side` and the other image does
    not: `"pass"`, `"fail"` or `"cannot_tell"`.
    """
    other = OTHER[side]
    num_own = len(pair.relations(side))
    right = [given.answer for given in answers[side][:num_own]]
    wrong = [given.answer for given in answers[other][len(pair.relations(other)) :]]
    if "no" in right or "yes" in wrong:
        return "fail"
    return "cannot_tell" if "cannot_tell" in right + wrong else "pass"


def _combine(verdicts: Sequence[str]) -> str:
    return verdicts[0] if len(set(verdicts)) == 1 and verdicts[0] != "cannot_tell" else "disputed"


def judge_agreement(store: BuildStore) -> dict[str, float]:
    """Kind of a relation → share of the answers on which all judges agree, where there are several judges."""
    agreed: dict[str, list[bool]] = {}
    pairs = drawn_pairs(store)
    for record in store.verdicts:
        pair = pairs.get(record["id"], "its prompt is missing")
        if len(record["answers"]) < 2 or isinstance(pair, str):
            continue
        for side in SIDES:
            asked = pair.relations(side) + pair.changed(OTHER[side])
            for relation, *given in zip(asked, *(found[side] for found in record["answers"].values()), strict=True):
                agreed.setdefault(relation["relation"], []).append(len({answer[0] for answer in given}) == 1)
    return {name: sum(values) / len(values) for name, values in sorted(agreed.items())}


def iterate_decided(store: BuildStore) -> Iterator[tuple[DrawnPair, dict[str, Any]]]:
    """The pairs that were judged, with their verdicts."""
    pairs = drawn_pairs(store)
    for record in store.verdicts:
        pair = pairs.get(record["id"])
        if isinstance(pair, DrawnPair):
            yield pair, record
