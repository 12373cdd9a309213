"""GenEval 2: the probability of the correct answer to a question about each atom of a prompt."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

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
from .matching import match_files


COMMIT = "a6e82d2289e8d418f27f0adee77908b07060eea3"
SKILLS = ("object", "attribute", "count", "position", "verb")
ATOMICITIES = range(3, 11)  # numbers of atoms in the official analysis
IMAGE_MAP = "image_paths.json"
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {number: str(digits) for digits, number in enumerate(_NUMBERS, start=1)}
_YES = ("Yes", "yes", " yes", " Yes")
_OTHER = "other"  # the official program's "digits" of any number not in `_NUMBERS`
_WHOLE_PROMPT = "whole prompt"
_OPPOSITES = {"to the left of": "to the right of", "in front of": "behind", "on top of": "under"}
_OPPOSITES |= {opposite: relation for relation, opposite in _OPPOSITES.items()}
_RELATION = re.compile(f" ({'|'.join(_OPPOSITES)}) ")


def accepted_spellings(question: str, answer: str) -> list[str]:
    """Returns the answers that the official program accepts, some twice. The key matters only for "How many"."""
    if not question.startswith("How many"):
        return list(_YES)
    digits = _DIGITS.get(answer, _OTHER)
    words = [answer, answer.capitalize()]
    return [*words, *(f" {word}" for word in words), digits, f" {digits}"]


def soft_score(reply: Mapping[str, Any], spellings: Sequence[str]) -> float:
    """Probability that the answer begins like one of the spellings: summed over first tokens, as officially."""
    return float(sum(reply["probabilities"].get(reply["tokens"][spelling][0], 0.0) for spelling in spellings))


def hard_score(reply: Mapping[str, Any], spellings: Sequence[str]) -> bool:
    """Whether the most likely token, in lower case, is one of the spellings; false for a tie."""
    most = max(reply["probabilities"].values())
    best = [token for token, chance in reply["probabilities"].items() if chance == most]
    return all(token.lower() in spellings for token in best)


def fixed_score(reply: Mapping[str, Any], spellings: Sequence[str]) -> float:
    """
    Probability of the spellings that are a single token, so that answers with only the same beginning do not count.
    """
    cut = [reply["tokens"][spelling] for spelling in spellings if spelling.strip() != _OTHER]
    whole = {tokens[0] for tokens in cut if len(tokens) == 1}
    return float(sum(reply["probabilities"].get(token, 0.0) for token in whole))


def vqascore_text(prompt: str) -> str:
    """
    Returns the question about a whole prompt. It is formatted twice, as in the official program, which changes prompts
    with braces.

    Raises:
        [`OfficialError`]: If it cannot be formatted.
    """
    try:
        return f'Does this image show "{prompt}"? Answer the question with Yes or No.'.format(prompt)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise OfficialError(f"The official program stops at the braces in {prompt!r}: {error!r}.") from None


def opposite_question(question: str) -> str | None:
    """Returns the question with the opposite relation, to be answered no; `None` if the relation has no opposite."""
    found = _RELATION.search(question)
    return None if found is None else question.replace(found[1], _OPPOSITES[found[1]], 1)


class GenEval2(Benchmark):
    """
    Soft-TIFA asks about every atom and reads the probability of the first token of the answer; the geometric mean makes one prompt of
    its atoms. Generators are trained on this benchmark now.
    """

    name = "geneval2"
    title = "GenEval 2"
    source = f"https://github.com/facebookresearch/GenEval2/tree/{COMMIT}"
    license = "CC BY-NC 4.0"
    paper = "https://huggingface.co/papers/2512.16853"
    files = (
        DataFile(
            "geneval2_data.jsonl",
            f"https://raw.githubusercontent.com/facebookresearch/GenEval2/{COMMIT}/geneval2_data.jsonl",
            "09233adbc9f877fba205f1a20efa4a8640e7e62a91dfd55893562bed8a928e43",
        ),
    )
    num_images = 1
    judges = frozenset({"vision"})

    def load(self, folder: Path) -> list[Item]:
        path = folder / self.files[0].name
        return [
            _read_row(row, f"{number:04d}", f"{path}, row {number + 1}")
            for number, row in enumerate(read_json_lines(path))
        ]

    def image_path(self, item: Item, number: int) -> str:
        return f"{item.id}.png" if number == 0 else f"{item.id}_{number}.png"

    def assign(self, items: Sequence[Item], files: Sequence[str], protocol: Protocol) -> dict[ImageKey, str]:
        paths = {
            (item.id, number): self.image_path(item, number) for item, number in images_of(items, self.num_images)
        }
        found = match_files(paths, files)
        if protocol == "fixed":
            return found
        # the official map from prompts to images has one image for equal prompts
        of_prompt = {item.prompt: found[item.id, 0] for item in items if (item.id, 0) in found}
        return {(item.id, 0): of_prompt[item.prompt] for item in items if item.prompt in of_prompt}

    def finish(self, folder: Path, items: Sequence[Item]) -> None:
        """Writes the map from prompts to images that the official program takes."""
        found = match_files(
            {(item.id, 0): self.image_path(item, 0) for item in items}, [path.name for path in folder.iterdir()]
        )
        paths = {item.prompt: str((folder / found[item.id, 0]).resolve()) for item in items if (item.id, 0) in found}
        write_atomically(folder / IMAGE_MAP, json.dumps(paths, indent=1, ensure_ascii=False) + "\n")

    def questions(self, item: Item, protocol: Protocol) -> list[Question]:
        asked = []
        for i, (question, answer) in enumerate(item.data["vqa_list"]):
            asked.append(_question(f"atom {i}", _in_one_word(question), accepted_spellings(question, answer)))
            opposite = opposite_question(question)
            if protocol == "fixed" and item.data["skills"][i] == "position" and opposite is not None:
                asked.append(_question(f"atom {i}, opposite", _in_one_word(opposite), _YES))
        if protocol == "official":
            with suppress(OfficialError):  # then the table has no VQAScore
                asked.append(_question(_WHOLE_PROMPT, vqascore_text(item.prompt), _YES))
        return asked

    def official(self, items: Sequence[Item], evidence: Evidence) -> dict[str, float | None]:
        if self.num_images > 1:
            raise OfficialError("The official program takes one image for each prompt.")
        atoms = [_official_atoms(item, evidence) for item in items]
        soft = [[soft_score(reply, spellings) for reply, spellings in row] for row in atoms]
        hard = [[hard_score(reply, spellings) for reply, spellings in row] for row in atoms]
        whole = _vqascores(items, evidence)
        numbers = {
            "soft_tifa_am": np.mean([np.mean(scores) for scores in soft]),
            "soft_tifa_gm": np.mean([_geometric_mean(scores) for scores in soft]),
            "tifa": np.mean([np.mean(scores) for scores in hard]),
            "vqascore": None if whole is None else np.mean(whole),
            **_skill_table(items, soft),
            **_atomicity_table(items, soft),
        }
        return {name: None if number is None else 100 * float(number) for name, number in numbers.items()}

    def fixed(self, items: Sequence[Item], evidence: Evidence) -> list[Metric]:
        images = images_of(items, self.num_images)
        scores = [_fixed_atoms(item, number, evidence) for item, number in images]
        ids = [item.id for item, _ in images]
        means = np.array([_geometric_mean(atoms) for atoms in scores])
        metrics = [
            Metric("soft_tifa_gm", means, ids, is_headline=True),
            Metric("soft_tifa_am", np.array([np.mean(atoms) for atoms in scores]), ids),
        ]
        atoms = [
            (skill, score, item.id)
            for (item, _), row in zip(images, scores, strict=True)
            for skill, score in zip(item.data["skills"], row, strict=True)
        ]
        for skill in SKILLS:
            if chosen := [(score, id) for name, score, id in atoms if name == skill]:
                metrics.append(_metric(skill, chosen, is_headline=skill == "position"))
        metrics += _opposed_metrics(images, evidence)
        for atomicity in sorted({item.data["atom_count"] for item in items}):
            rows = [i for i, (item, _) in enumerate(images) if item.data["atom_count"] == atomicity]
            metrics.append(Metric(f"{atomicity} atoms", means[rows], [ids[i] for i in rows]))
        return metrics


def _question(key: str, text: str, spellings: Sequence[str]) -> Question:
    return Question(
        key=key,
        kind="probabilities",
        text=text,
        options={"spellings": list(dict.fromkeys(spellings))},
        is_usable=lambda reply: _is_usable(reply, spellings),
    )


def _in_one_word(question: str) -> str:
    return f"{question} Answer in one word."


def _is_usable(reply: Any, spellings: Sequence[str]) -> bool:
    return (
        isinstance(reply, Mapping)
        and bool(reply.get("probabilities"))
        and all(reply.get("tokens", {}).get(spelling) for spelling in spellings)
    )


def _official_reply(item: Item, evidence: Evidence, key: str, spellings: Sequence[str]) -> Mapping[str, Any]:
    if (item.id, 0) not in evidence.images:
        raise OfficialError(f"The official program stops without an image for the prompt {item.prompt!r}.")
    reply = evidence.reply(item, 0, key)
    if not _is_usable(reply, spellings):
        raise OfficialError(f"The official program stops without an answer to {key!r} of item {item.id}.")
    return reply


def _official_atoms(item: Item, evidence: Evidence) -> list[tuple[Mapping[str, Any], list[str]]]:
    """Returns the reply and the accepted spellings of each atom."""
    spellings = [accepted_spellings(question, answer) for question, answer in item.data["vqa_list"]]
    return [(_official_reply(item, evidence, f"atom {i}", accepted), accepted) for i, accepted in enumerate(spellings)]


def _vqascores(items: Sequence[Item], evidence: Evidence) -> list[float] | None:
    """Returns the scores of the whole prompts, or `None` if a prompt stops the official program."""
    try:
        for item in items:
            vqascore_text(item.prompt)
    except OfficialError:
        return None
    return [soft_score(_official_reply(item, evidence, _WHOLE_PROMPT, _YES), _YES) for item in items]


def _skill_table(items: Sequence[Item], scores: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """Returns the mean over the atoms of each skill; all are `None` if a skill has no atoms."""
    by_skill: dict[str, list[float]] = {skill: [] for skill in SKILLS}
    for item, row in zip(items, scores, strict=True):
        for skill, score in zip(item.data["skills"], row, strict=True):
            by_skill[skill].append(score)
    is_defined = all(by_skill.values())
    return {skill: float(np.mean(found)) if is_defined else None for skill, found in by_skill.items()}


def _atomicity_table(items: Sequence[Item], scores: Sequence[Sequence[float]]) -> dict[str, float | None]:
    """Returns the means of prompts by number of atoms; all `None` unless these are exactly `ATOMICITIES`."""
    by_number: dict[int, list[float]] = {number: [] for number in ATOMICITIES}
    for item, row in zip(items, scores, strict=True):
        by_number.setdefault(item.data["atom_count"], []).append(_geometric_mean(row))
    is_defined = all(by_number.values()) and len(by_number) == len(ATOMICITIES)
    return {f"{number} atoms": float(np.mean(by_number[number])) if is_defined else None for number in ATOMICITIES}


def _fixed_atoms(item: Item, number: int, evidence: Evidence) -> list[float]:
    """Returns the score of each atom; 0 without a usable reply."""
    scores = []
    for i, (question, answer) in enumerate(item.data["vqa_list"]):
        spellings = accepted_spellings(question, answer)
        reply = evidence.reply(item, number, f"atom {i}")
        scores.append(fixed_score(reply, spellings) if _is_usable(reply, spellings) else 0.0)
    return scores


def _opposed_metrics(images: Sequence[tuple[Item, int]], evidence: Evidence) -> list[Metric]:
    """
    Makes metrics of the score of each relation minus the probability of a yes to its opposite: 0 for a judge that
    always says yes, 1 for one that is always right.
    """
    differences: dict[str, list[tuple[float, str]]] = {}
    for item, number in images:
        for i, (question, _) in enumerate(item.data["vqa_list"]):
            found = _RELATION.search(question)
            if item.data["skills"][i] != "position" or found is None:
                continue
            replies = [evidence.reply(item, number, key) for key in (f"atom {i}", f"atom {i}, opposite")]
            is_complete = all(_is_usable(reply, _YES) for reply in replies)
            right, opposite = (fixed_score(reply, _YES) for reply in replies) if is_complete else (0.0, 0.0)
            kind = " and ".join(sorted((found[1], _OPPOSITES[found[1]])))
            for name in ("position", kind):
                differences.setdefault(name, []).append((right - opposite, item.id))
    return [
        _metric(f"{name}, less the opposite", found, is_headline=name == "position")
        for name, found in differences.items()
    ]


def _metric(name: str, found: Sequence[tuple[float, str]], *, is_headline: bool = False) -> Metric:
    return Metric(name, np.array([score for score, _ in found]), [id for _, id in found], is_headline=is_headline)


def _geometric_mean(scores: Sequence[float]) -> float:
    with np.errstate(divide="ignore"):
        return float(np.exp(np.log(np.asarray(scores, float)).mean()))


def _read_row(row: Mapping[str, Any], id: str, place: str) -> Item:
    """Reads and checks a row of the file; `place` identifies it in errors."""
    prompt, count, atoms, skills = (row.get(key) for key in ("prompt", "atom_count", "vqa_list", "skills"))
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{place}: 'prompt' is {prompt!r}, not a text.")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{place}: 'atom_count' is {count!r}, not a number of atoms.")
    if not isinstance(atoms, list) or not atoms:
        raise ValueError(f"{place}: 'vqa_list' must be a list of questions and answers.")
    for atom in atoms:
        if not isinstance(atom, list) or len(atom) != 2 or not all(isinstance(text, str) and text for text in atom):
            raise ValueError(f"{place}: {atom!r} in 'vqa_list' is not a question and its answer.")
        if not atom[0].startswith("How many") and atom[1] != "Yes":
            raise ValueError(f"{place}: the answer to {atom[0]!r} is {atom[1]!r}. Only 'Yes' can be scored.")
    if not isinstance(skills, list) or len(skills) != len(atoms):
        raise ValueError(f"{place}: 'skills' must name the skill of each of the {len(atoms)} questions.")
    for skill in skills:
        if skill not in SKILLS:
            raise ValueError(f"{place}: the skill {skill!r} is none of {', '.join(SKILLS)}.")
    return Item(id, prompt, dict(row), is_spatial="position" in skills)
