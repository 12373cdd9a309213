"""Judges relations in an image with a vision-language model on a server."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..endpoints import BadAnswer, Endpoint
from .pictures import check_side, user_message
from .questions import ANSWERS, JudgedRelation, relation_question


_INSTRUCTION = (
    "Look at the picture and answer each question about it. Left and right are the viewer's, as in the picture; in front "
    "means nearer to the viewer. Answer `yes` if what is asked is clearly so, `no` if it is not so or if one of the things is "
    "not in the picture, and `cannot_tell` if the picture does not show it clearly enough. Give one answer per question, in "
    "the order of the questions."
)
_SCHEMA = {
    "title": "answers",
    "type": "object",
    "properties": {"answers": {"type": "array", "items": {"type": "string", "enum": list(ANSWERS)}}},
    "required": ["answers"],
    "additionalProperties": False,
}


class EndpointJudge:
    """
    Asks a model behind a server about all relations of an image in one call. A [`~judges.questions.RelationJudge`].

    Args:
        endpoint ([`~endpoints.Endpoint`]):
            The model; it has to take images.
        max_side (`int`, *optional*, defaults to `1024`):
            The longer side of an image in pixels; larger ones are shrunk.
    """

    def __init__(self, endpoint: Endpoint, *, max_side: int = 1024):
        self.endpoint = endpoint
        self.max_side = check_side(max_side)

    def ask(self, image: Any, relations: Sequence[Mapping[str, Any]]) -> list[JudgedRelation]:
        """
        See [`~judges.questions.RelationJudge`]. Where the model gives no answer, or fewer than there are questions, the
        missing ones are `"cannot_tell"`; with more than there are questions, all are.

        Raises:
            `ValueError`: If the image cannot be read or a relation is unknown.
            [`~endpoints.ServerError`], [`~endpoints.BudgetReached`]: As [`~endpoints.Endpoint.chat`].
        """
        if not relations:
            return []
        questions = "\n".join(f"{i}. {relation_question(relation)}" for i, relation in enumerate(relations, start=1))
        messages = [
            {"role": "system", "content": _INSTRUCTION},
            user_message(image, questions, self.max_side),
        ]
        try:
            answer = self.endpoint.chat(messages, schema=_SCHEMA)
        except BadAnswer as error:
            return [JudgedRelation("cannot_tell", error.raw, error.served_model)] * len(relations)
        given = answer.data["answers"]
        if len(given) > len(relations):  # no way to match them to the relations
            given = []
        given = given + ["cannot_tell"] * (len(relations) - len(given))
        return [JudgedRelation(said, answer.text, answer.served_model) for said in given]
