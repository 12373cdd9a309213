"""Judges relations in an image with a local vision-language model."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image

from .pictures import load_picture
from .questions import JudgedRelation, RelationAnswer, relation_question
from .vision import LocalVision


_INSTRUCTION = "Left and right are the viewer's, as in the picture. Answer with one word, Yes or No."
_SPELLINGS = ("{}", " {}")


class LocalJudge:
    """
    Asks a vision-language model about each relation, and compares how likely its answer begins with Yes and with No. A
    [`~judges.questions.RelationJudge`].

    The model sees the image, then the question and "Left and right are the viewer's, as in the picture. Answer with one word,
    Yes or No." The chance of "Yes" is taken among the two words alone, each also in small letters and after a space.

    Args:
        name (`str`):
            The model, see [`~judges.vision.LocalVision`], as are `device`, `dtype` and `max_side`.
        margin (`float`, *optional*, defaults to `0.1`):
            A chance of "Yes" between `0.5 - margin` and `0.5 + margin` is `"cannot_tell"`.

    Raises:
        `ValueError`: If a number is out of its range, or as [`~judges.vision.LocalVision`].
    """

    def __init__(
        self, name: str, *, device: Any = None, dtype: Any = "auto", margin: float = 0.1, max_side: int = 1024
    ):
        if not 0 <= margin < 0.5:
            raise ValueError(f"`margin` must be in [0, 0.5), got {margin}.")
        self.margin = margin
        self._vision = LocalVision(name, device=device, dtype=dtype, max_side=max_side)
        self.model = self._vision.name
        self._words = {word: self._tokens_of(word) for word in ("Yes", "No")}

    def ask(self, image: Any, relations: Sequence[Mapping[str, Any]]) -> list[JudgedRelation]:
        """
        See [`~judges.questions.RelationJudge`]; `raw` is the chance of "Yes".

        Raises:
            `ValueError`: If the image cannot be read or a relation is unknown.
        """
        picture = load_picture(image, self._vision.max_side)
        return [self._judge(picture, relation_question(relation)) for relation in relations]

    def _judge(self, picture: Image.Image, question: str) -> JudgedRelation:
        _, logits = self._vision.first_logits(picture, f"{question} {_INSTRUCTION}")
        yes, no = (logits[self._words[word]].logsumexp(0) for word in ("Yes", "No"))
        chance = torch.sigmoid(yes - no).item()
        answer: RelationAnswer = "cannot_tell"  # also if the chance is NaN
        if abs(chance - 0.5) > self.margin:
            answer = "yes" if chance > 0.5 else "no"
        return JudgedRelation(answer, f"P(Yes) = {chance:.4f}", self.model)

    def _tokens_of(self, word: str) -> list[int]:
        """
        Returns the ids of the tokens that are the whole word, with or without a leading space, capitalized or not.
        """
        spellings = [form.format(text) for form in _SPELLINGS for text in (word, word.lower())]
        ids = [self._vision.tokenize(spelling) for spelling in spellings]
        tokens = {tokens[0] for tokens in ids if len(tokens) == 1}
        if not tokens:
            raise ValueError(f"{self.model} cannot judge: {word!r} is not a token of its tokenizer.")
        return sorted(tokens)
