"""Yes/no questions about relations, for any judge of an image: a model on a server, a local model, or a person."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol


RelationAnswer = Literal["yes", "no", "cannot_tell"]
ANSWERS: tuple[RelationAnswer, ...] = ("yes", "no", "cannot_tell")

# What follows "is" in a statement about the first argument, worded like the rule of the relation.
_PREDICATES = {
    "left_of": "to the left of the {1}, as the viewer sees it",
    "right_of": "to the right of the {1}, as the viewer sees it",
    "above": "above the {1}",
    "below": "below the {1}",
    "on": "on the {1}, resting on it",
    "under": "directly under the {1}, with the {1} resting on it",
    "inside": "inside the {1}",
    "contains": "around the {1}, so that the {1} is inside it",
    "front_of": "in front of the {1}, nearer to the viewer",
    "behind": "behind the {1}, farther from the viewer",
    "near": "near the {1}",
    "next_to": "right next to the {1}",
    "far_from": "far away from the {1}",
    "between": "between the {1} and the {2}",
    "row_order": "in a row, in this order from left to right, as the viewer sees it",
}


@dataclass(frozen=True)
class JudgedRelation:
    """
    The answer of a judge about one relation in one image.

    Args:
        answer (`str`):
            `"yes"`, `"no"` or `"cannot_tell"`.
        raw (`str`):
            The judge's answer, word for word.
        served_model (`str`, *optional*):
            The model that answered; `None` if its server does not say.
    """

    answer: RelationAnswer
    raw: str
    served_model: str | None


class RelationJudge(Protocol):
    """Says which relations hold in an image."""

    def ask(self, image: Any, relations: Sequence[Mapping[str, Any]]) -> list[JudgedRelation]:
        """
        Asks about one image.

        Args:
            image (any image):
                In any form that [`~preferences.images.load_image`] takes.
            relations (`Sequence[Mapping[str, Any]]` of length `n`):
                Records of relations: `relation`, its name, and `arguments`, names of things; the last of `at` is the region.

        Returns:
            `list[JudgedRelation]` of length `n`: one per relation.
        """
        ...


def relation_statement(relation: Mapping[str, Any]) -> str:
    """
    States a relation in plain English, with directions as the viewer sees them.

    Args:
        relation (`Mapping[str, Any]`):
            A record: `relation`, its name, and `arguments`, names of things; the last of `at` is the region.

    Returns:
        `str`: Such as `"the mug is to the left of the plate, as the viewer sees it"`.

    Raises:
        `ValueError`: If the relation is unknown or has too few arguments.
    """
    subject, verb, predicate = _parts(relation)
    return f"{subject} {verb} {predicate}"


def relation_question(relation: Mapping[str, Any]) -> str:
    """
    Asks whether a relation holds.

    Args:
        relation (`Mapping[str, Any]`):
            A record, as for [`relation_statement`].

    Returns:
        `str`: Such as `"Is the mug to the left of the plate, as the viewer sees it?"`.
    """
    subject, verb, predicate = _parts(relation)
    return f"{verb.capitalize()} {subject} {predicate}?"


def negated_question(relation: Mapping[str, Any]) -> str:
    """
    The twin of [`relation_question`]: its answer is "no" if the other's is "yes". A judge that says "yes" to both has
    not looked at the image.
    """
    return f"Is it false that {relation_statement(relation)}?"


def _parts(relation: Mapping[str, Any]) -> tuple[str, str, str]:
    """Returns subject, verb and predicate of the statement of a relation."""
    name, arguments = relation["relation"], [str(argument) for argument in relation["arguments"]]
    try:
        if name == "at":
            thing, region = arguments
            return (
                f"the {thing}",
                "is",
                f"{'in' if 'corner' in region or region == 'center' else 'at'} the {region} of the picture",
            )
        predicate = _PREDICATES[name].format(*arguments)
    except (KeyError, IndexError, ValueError):
        raise ValueError(
            f"{name}({', '.join(arguments)}) is not a relation. Available: {', '.join([*_PREDICATES, 'at'])}, of two things or "
            "more, `at` of a thing and a region."
        ) from None
    if name == "row_order":
        things = [f"the {argument}" for argument in arguments]
        return f"{', '.join(things[:-1])} and {things[-1]}", "are", predicate
    return f"the {arguments[0]}", "is", predicate
