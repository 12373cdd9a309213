"""Decides each pair from the verdicts of judges and reviewers, and selects what reviewers still have to see."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..review import ReviewItem, VoteLog, decide, describe_summary, summarize_votes
from .build_store import BuildStore
from .filter import DrawnPair, drawn_pairs
from .render import SIDES


@dataclass(frozen=True)
class Decision:
    """
    The decision on a pair.

    Args:
        outcome (`str`):
            `"accepted"`, `"dropped"`, or `"waiting"` for judges or reviewers.
        reason (`str`):
            Why, in a few words.
        by (`str`):
            `"judges"`, `"people"` or nobody: who decided last.
    """

    outcome: str
    reason: str
    by: str


def decide_pairs(store: BuildStore) -> dict[str, Decision]:
    """
    Decides each pair whose images were drawn or refused. A pair is accepted if both of its directions are: each image
    is then once the right one, for its own prompt, and once the wrong one.

    Args:
        store ([`BuildStore`]):
            The dataset that is being built.

    Returns:
        `dict[str, Decision]`: id of a pair → decision, in the order of the prompts.
    """
    verdicts = {record["id"]: record for record in store.verdicts}
    votes = _votes_by_item(store)
    needed = store.recipe.review.votes_per_item
    decisions = {}
    for id, pair in drawn_pairs(store).items():
        if isinstance(pair, str):
            decisions[id] = Decision("dropped", f"refused: {pair}", "nobody")
        elif id not in verdicts:
            decisions[id] = Decision("waiting", "for judges", "nobody")
        elif "dropped" in verdicts[id]:
            decisions[id] = Decision("dropped", verdicts[id]["dropped"], "judges")
        else:
            decisions[id] = _decide(verdicts[id], votes, needed)
    return decisions


def _decide(verdict: dict[str, Any], votes: dict[str, list[dict[str, Any]]], needed: int) -> Decision:
    found, by = [], "judges"
    directions = verdict["directions"]
    for side in SIDES:
        # votes on items with a known answer measure the reviewer, not the pair
        is_asked = directions[side] == "disputed" or verdict["is_sampled"]
        voted = decide(votes.get(f"{verdict['id']}:{side}", []), needed) if is_asked else None
        if voted is not None:  # reviewers overrule judges
            by = "people"
            found.append("pass" if voted == side else f"reviewers {'' if voted == 'disagree' else 'say '}{voted}")
        else:
            found.append(directions[side])
    if any(verdict not in ("pass", "disputed") for verdict in found):
        failed = next(verdict for verdict in found if verdict not in ("pass", "disputed"))
        return Decision("dropped", "a relation is not visible" if failed == "fail" else failed, by)
    if "disputed" in found:
        return Decision("waiting", "for reviewers", "nobody")
    return Decision("accepted", "", by)


def _votes_by_item(store: BuildStore) -> dict[str, list[dict[str, Any]]]:
    votes: dict[str, list[dict[str, Any]]] = {}
    if store.votes_file.is_file():
        for (item, _), vote in VoteLog(store.votes_file).current().items():
            votes.setdefault(item, []).append(vote)
    return votes


def review_items(store: BuildStore) -> list[ReviewItem]:
    """
    Selects what reviewers have to see: the directions that judges dispute, a random share of the others, and, to check
    the reviewers, items with a known answer.

    Returns:
        `list[ReviewItem]`: ids are those of pairs, with the side whose prompt is judged after a colon.
    """
    pairs, asked, known = drawn_pairs(store), [], []
    for record in store.verdicts:
        pair = pairs.get(record["id"], "its prompt is missing")
        if isinstance(pair, str) or "dropped" in record:
            continue
        is_open = "fail" not in record["directions"].values()
        for side in SIDES:
            if (record["directions"][side] == "disputed" and is_open) or record["is_sampled"]:
                asked.append(_review_item(store, pair, side))
            elif record["directions"] == dict.fromkeys(SIDES, "pass"):
                known.append((pair, side))
    share = store.recipe.review.gold_share
    num_gold = min(len(known), round(len(asked) * share / (1 - share)))
    known.sort(key=lambda item: store.seed_of("gold", item[0].id, item[1]))
    return asked + [_review_item(store, *item, is_gold=True) for item in known[:num_gold]]


def _review_item(store: BuildStore, pair: DrawnPair, side: str, *, is_gold: bool = False) -> ReviewItem:
    prompt = pair.text(side)
    spans = [tuple(relation["span"]) for relation in pair.relations(side)]
    return ReviewItem(
        id=f"{pair.id}:{side}",
        prompt=prompt,
        spans=spans,
        relations=[prompt[start:end] for start, end in spans],
        images={name: store.image_path(pair.images[name]["image"]) for name in SIDES},
        gold=side if is_gold else None,
    )


def count_votes(store: BuildStore) -> dict[str, int]:
    """Returns name of a reviewer → number of current votes."""
    return dict(Counter(reviewer for _, reviewer in VoteLog(store.votes_file).current()))


def describe_votes(store: BuildStore) -> str:
    """Describes the number and agreement of the votes in a sentence; empty if there are none."""
    votes = list(VoteLog(store.votes_file).current().values())
    return describe_summary(summarize_votes(votes, review_items(store))) if votes else ""
