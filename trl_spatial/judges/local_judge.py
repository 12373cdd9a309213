"""A vision-language model on this machine that says which relations hold in an image."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from ..endpoints.local_chat import load_model
from ..hub.errors import explain_errors
from ..hub.references import Reference
from .pictures import load_picture
from .questions import JudgedRelation, RelationAnswer, relation_question


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
            The model, such as Qwen2.5-VL: a folder, `ORG/NAME` or `ORG/NAME@REVISION` on the Hub, or `hub/NAME`. Its weights
            are safetensors, its processor has a chat template.
        device (`str` or `torch.device`, *optional*):
            Where it runs. If `None`, the accelerator if there is one.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Type of the weights; `"auto"` is the one they are saved in.
        margin (`float`, *optional*, defaults to `0.1`):
            A chance of "Yes" between `0.5 - margin` and `0.5 + margin` is `"cannot_tell"`.
        max_side (`int`, *optional*, defaults to `1024`):
            The longer side of an image in pixels; larger ones are shrunk.

    Raises:
        `ValueError`: If a number is out of its range, there is no such model, it takes no images, weights are missing, or the
            repository holds pickles or code.
    """

    def __init__(
        self, name: str, *, device: Any = None, dtype: Any = "auto", margin: float = 0.1, max_side: int = 1024
    ):
        if not 0 <= margin < 0.5:
            raise ValueError(f"`margin` must be in [0, 0.5), got {margin}.")
        if max_side < 1:
            raise ValueError(f"`max_side` must be at least 1, got {max_side}.")
        self.margin = margin
        self.max_side = max_side
        reference, config, self._model = load_model(
            name,
            AutoModelForImageTextToText,
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
            what="a vision-language model",
            device=device,
            dtype=dtype,
        )
        self.model = str(reference)
        self._processor = _load_processor(reference, config)
        self._words = {word: self._tokens_of(word) for word in ("Yes", "No")}

    def ask(self, image: Any, relations: Sequence[Mapping[str, Any]]) -> list[JudgedRelation]:
        """
        See [`~judges.questions.RelationJudge`]; `raw` is the chance of "Yes".

        Raises:
            `ValueError`: If the image cannot be read or a relation is unknown.
        """
        picture = load_picture(image, self.max_side)
        return [self._judge(picture, relation_question(relation)) for relation in relations]

    @torch.no_grad()
    def _judge(self, picture: Image.Image, question: str) -> JudgedRelation:
        # one question at a time: an answer must not depend on those beside it
        content = [{"type": "image", "image": picture}, {"type": "text", "text": f"{question} {_INSTRUCTION}"}]
        inputs = self._processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self._model.device, dtype=self._model.dtype)
        output = self._model.generate(
            **inputs, max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        logits = output.logits[0][0].float()  # (vocab_size,)
        yes, no = (logits[self._words[word]].logsumexp(0) for word in ("Yes", "No"))
        chance = torch.sigmoid(yes - no).item()
        answer: RelationAnswer = "cannot_tell"  # also where the model gives no number
        if abs(chance - 0.5) > self.margin:
            answer = "yes" if chance > 0.5 else "no"
        return JudgedRelation(answer, f"P(Yes) = {chance:.4f}", self.model)

    def _tokens_of(self, word: str) -> list[int]:
        """The tokens that are the word, in its spellings."""
        tokens = set()
        for spelling in (form.format(text) for form in _SPELLINGS for text in (word, word.lower())):
            ids = self._processor.tokenizer.encode(spelling, add_special_tokens=False)
            if len(ids) == 1:
                tokens.add(ids[0])
        if not tokens:
            raise ValueError(f"{self.model} cannot judge: {word!r} is no token of its tokenizer.")
        return sorted(tokens)


def _load_processor(reference: Reference, config: Any) -> Any:
    """The processor of a model, without its half for videos, which needs torchvision."""
    processor_class = PROCESSOR_MAPPING.get(type(config), AutoProcessor)
    if "video_processor" in getattr(processor_class, "get_attributes", list)():
        processor_class = type(
            processor_class.__name__,
            (processor_class,),
            {"get_attributes": classmethod(lambda cls: ["image_processor", "tokenizer"])},
        )
    with explain_errors(f"Loading the processor of {reference}"):
        processor = processor_class.from_pretrained(
            reference.name, revision=reference.revision, trust_remote_code=False
        )
    if processor.chat_template is None:
        raise ValueError(f"The processor of {reference} has no chat template. Take a model that is made to chat.")
    return processor
