"""Vision-language models, local or on a server, that answer questions about images."""

import hashlib
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from ..endpoints import Answer, Endpoint
from ..endpoints.local_chat import load_model
from ..endpoints.threads import map_in_order
from ..hub.errors import explain_errors
from ..hub.functions import errors_of, is_function, load_function
from ..hub.references import Reference
from ..preferences.images import load_image
from .loading import ModelSettings
from .pictures import check_side, image_parts, load_picture


_MOST_TOKENS = 2048
_NUM_TOP_LOCAL, _NUM_TOP_ENDPOINT = 50, 20  # servers return at most 20

Item = TypeVar("Item")
Result = TypeVar("Result")


class VisionModel(Protocol):
    """
    Answers questions about images, each by itself.

    Attributes:
        name (`str`):
            Its name.
    """

    name: str

    def answer(
        self,
        image: Any,
        text: str,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        vote: int = 0,
    ) -> Answer:
        """
        Asks about an image. The model sees the image, then the text, and no other instruction.

        Args:
            image (any image):
                In any form that [`~preferences.images.load_image`] takes, or a list of them, which are shown in this order.
            text (`str`):
                The question.
            max_tokens (`int`, *optional*), temperature (`float`, *optional*):
                Sampling settings. If not set, the model's. A temperature of 0 takes the most likely token each time.
            vote (`int`, *optional*, defaults to `0`):
                Number of the answer, where the same is asked several times.

        Returns:
            [`~endpoints.Answer`]: The words, the model that answered, and the cost.

        Raises:
            `ValueError`: If the image cannot be read.
        """
        ...

    def probabilities(self, image: Any, text: str, spellings: Sequence[str]) -> Answer:
        """
        Asks how an answer begins.

        Args:
            image (any image), text (`str`):
                As for [`~VisionModel.answer`].
            spellings (`Sequence[str]`):
                Answers of interest, such as `["Yes", " Yes", "No"]`.

        Returns:
            [`~endpoints.Answer`]: Its `data` is `{"probabilities": {token: probability of being the first token of the
            answer}, "tokens": {spelling: [token, ...]}}`, tokens as they are written. Tokens that are written alike count
            together.

        Raises:
            `ValueError`: If the image cannot be read.
            [`~endpoints.ServerError`]: If a server gives no log-probabilities.
        """
        ...

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[tuple[int, Result | Exception]]:
        """Runs a function, which calls this model, for many items, as [`~endpoints.Endpoint.map`]."""
        ...


class EndpointVision:
    """
    A vision-language model behind a server. A [`VisionModel`].

    For [`~VisionModel.probabilities`] it only has the up to 20 most likely tokens that a server returns, and assumes
    that each spelling is a single token; a local model knows more.

    Args:
        endpoint ([`~endpoints.Endpoint`]):
            The model; it has to take images.
        max_side (`int`, *optional*, defaults to `1024`):
            The longer side of an image in pixels; larger ones are shrunk.
    """

    def __init__(self, endpoint: Endpoint, *, max_side: int = 1024):
        self.endpoint = endpoint
        self.max_side = check_side(max_side)
        self.name = endpoint.model
        self._last = threading.local()  # image of the last message: consecutive questions are often about the same one

    def answer(
        self,
        image: Any,
        text: str,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        vote: int = 0,
    ) -> Answer:
        """See [`~VisionModel.answer`]; also raises the errors of [`~endpoints.Endpoint.chat`]."""
        messages = [self._message(image, text)]
        return self.endpoint.chat(messages, max_tokens=max_tokens, temperature=temperature, vote=vote)

    def probabilities(self, image: Any, text: str, spellings: Sequence[str]) -> Answer:
        """See [`~VisionModel.probabilities`]; also raises the errors of [`~endpoints.Endpoint.chat`]."""
        answer = self.endpoint.chat(
            [self._message(image, text)], max_tokens=1, temperature=0.0, top_logprobs=_NUM_TOP_ENDPOINT
        )
        assert answer.top_logprobs  # otherwise `chat` has raised
        chances = {token: math.exp(logprob) for token, logprob in answer.top_logprobs[0].items()}
        return _with_data(answer, chances, {spelling: [spelling] for spelling in spellings})

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[tuple[int, Result | Exception]]:
        """See [`~VisionModel.map`]."""
        return self.endpoint.map(function, items)

    def _message(self, image: Any, text: str) -> dict[str, Any]:
        if getattr(self._last, "image", None) is not image:
            self._last.parts, self._last.image = image_parts(image, self.max_side), image
        return {"role": "user", "content": [*self._last.parts, {"type": "text", "text": text}]}


class LocalVision:
    """
    A vision-language model of transformers, such as Qwen2.5-VL. A [`VisionModel`]. It costs nothing, has no cache, and answers
    one question after another. Equal arguments give equal answers.

    Args:
        name (`str`):
            The model: a folder, `ORG/NAME` or `ORG/NAME@REVISION` on the Hub, or `hub/NAME`. Its weights are safetensors, its
            processor has a chat template.
        device (`str` or `torch.device`, *optional*):
            Where it runs. If `None`, the accelerator if there is one.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Type of the weights; `"auto"` is the one they are saved in.
        max_side (`int`, *optional*, defaults to `1024`):
            The longer side of an image in pixels; larger ones are shrunk.

    Raises:
        `ValueError`: If a number is out of its range, there is no such model, it takes no images, weights are missing, or the
            repository holds pickles or code.
    """

    def __init__(self, name: str, *, device: Any = None, dtype: Any = "auto", max_side: int = 1024):
        self.max_side = check_side(max_side)
        reference, config, self._model = load_model(
            name,
            AutoModelForImageTextToText,
            MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
            what="a vision-language model",
            device=device,
            dtype=dtype,
        )
        self.name = str(reference)
        self._processor = load_processor(reference, config)
        self._lock = threading.Lock()

    def answer(
        self,
        image: Any,
        text: str,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        vote: int = 0,
    ) -> Answer:
        """See [`~VisionModel.answer`]."""
        settings: dict[str, Any] = {"max_new_tokens": max_tokens or _MOST_TOKENS}
        if temperature is not None:
            settings |= {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        pictures = self._load(image)
        num_read, output = self._generate(pictures, text, _seed(pictures, text, vote), settings)
        tokens = output.sequences[0, num_read:]
        words = self._processor.tokenizer.decode(tokens, skip_special_tokens=True)
        return Answer(words, None, self.name, num_read, len(tokens), 0.0, is_cached=False)

    def probabilities(self, image: Any, text: str, spellings: Sequence[str]) -> Answer:
        """
        See [`~VisionModel.probabilities`]; covers the 50 most likely tokens and the first token of each spelling.
        """
        num_read, logits = self.first_logits(image, text)
        chances = logits.softmax(0)  # (vocab_size,)
        ids = {spelling: self.tokenize(spelling) for spelling in spellings}
        chosen = set(chances.topk(min(_NUM_TOP_LOCAL, len(chances))).indices.tolist())
        chosen |= {tokens[0] for tokens in ids.values() if tokens}
        written: dict[str, float] = defaultdict(float)
        for token in sorted(chosen, key=lambda token: -float(chances[token])):
            written[self._write(token)] += float(chances[token])
        best = self._write(int(chances.argmax()))
        answer = Answer(best, None, self.name, num_read, 1, 0.0, is_cached=False)
        return _with_data(answer, written, {name: [*map(self._write, tokens)] for name, tokens in ids.items()})

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[tuple[int, Result | Exception]]:
        """See [`~VisionModel.map`]; one item after another."""
        return map_in_order(function, items)

    def first_logits(self, image: Any, text: str) -> tuple[int, torch.Tensor]:
        """
        Returns the logits of the first token of the answer.

        Args:
            image (any image), text (`str`):
                As for [`~VisionModel.answer`].

        Returns:
            `tuple[int, torch.Tensor]`: Number of tokens read, and float32 logits of shape `(vocab_size,)`.
        """
        num_read, output = self._generate(
            self._load(image), text, 0, {"max_new_tokens": 1, "do_sample": False, "output_logits": True}
        )
        return num_read, output.logits[0][0].float()

    def tokenize(self, text: str) -> list[int]:
        """Returns the ids of the tokens of a text."""
        return self._processor.tokenizer.encode(text, add_special_tokens=False)

    def _load(self, image: Any) -> list[Image.Image]:
        images = image if isinstance(image, list) else [image]
        return [load_picture(each, self.max_side) for each in images]

    def _write(self, token: int) -> str:
        return self._processor.tokenizer.decode([token])

    @torch.no_grad()
    def _generate(
        self, pictures: Sequence[Image.Image], text: str, seed: int, settings: dict[str, Any]
    ) -> tuple[int, Any]:
        """Returns the number of input tokens, and the output of the model's `generate`."""
        # one question at a time: an answer must not depend on the others in a batch
        images = [{"type": "image", "image": picture} for picture in pictures]
        content = [*images, {"type": "text", "text": text}]
        inputs = self._processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self._model.device, dtype=self._model.dtype)
        devices = [self._model.device] if self._model.device.type == "cuda" else []
        with self._lock, torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            output = self._model.generate(**inputs, **settings, return_dict_in_generate=True)
        return inputs["input_ids"].shape[1], output


class FunctionVision:
    """
    A function of the user's that answers questions. A [`VisionModel`], without cache and cost.

    Args:
        name (`str`):
            `module:function`, of a module that Python finds, the current folder included. It is called with an image in RGB and
            the question, and returns words, or, if it is asked how an answer begins, a mapping token → probability.

    Raises:
        `ValueError`: If there is no such function.
    """

    def __init__(self, name: str):
        self.name = name
        self._function = errors_of(f"The judge {name} raised this error.")(load_function(name, what="judge"))

    def answer(
        self,
        image: Any,
        text: str,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        vote: int = 0,
    ) -> Answer:
        """See [`~VisionModel.answer`]; the settings of the sampling are not passed on."""
        words = self._function(load_image(image), text)
        if not isinstance(words, str):
            raise ValueError(f"{self.name} returned {words!r:.80}, which is not text.")
        return Answer(words, None, self.name, 0, 0, 0.0, is_cached=False)

    def probabilities(self, image: Any, text: str, spellings: Sequence[str]) -> Answer:
        """See [`~VisionModel.probabilities`]."""
        chances = self._function(load_image(image), text)
        if not isinstance(chances, dict):
            raise ValueError(f"{self.name} returned {chances!r:.80}, not a mapping of tokens to their probabilities.")
        answer = Answer("", None, self.name, 0, 0, 0.0, is_cached=False)
        return _with_data(answer, chances, {spelling: [spelling] for spelling in spellings})

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[tuple[int, Result | Exception]]:
        """See [`~VisionModel.map`]; one item after another."""
        return map_in_order(function, items)


def load_vision(spec: str, settings: ModelSettings) -> VisionModel:
    """
    Loads a vision-language model by its name on the command line.

    Args:
        spec (`str`):
            A model behind a server, `http://HOST:PORT/v1#MODEL`; a function, `module:function`, see [`FunctionVision`]; or a model
            of transformers, see [`LocalVision`].
        settings ([`~judges.loading.ModelSettings`]):
            How it is run.

    Raises:
        `ValueError`: If there is no such model or function, or the address names no model.
    """
    if spec.startswith(("http://", "https://")):
        address, _, model = spec.partition("#")
        if not model:
            raise ValueError(f"{spec} names a server, but no model. Write {spec.rstrip('#')}#MODEL.")
        endpoint = Endpoint(
            model, base_url=address, cache=settings.cache, prices=settings.prices, spend=settings.spend
        )
        return EndpointVision(endpoint)
    if is_function(spec):
        return FunctionVision(spec)
    return LocalVision(spec, device=settings.device)


def _with_data(answer: Answer, probabilities: dict[str, float], tokens: dict[str, list[str]]) -> Answer:
    return replace(answer, data={"probabilities": dict(probabilities), "tokens": tokens})


def _seed(pictures: Sequence[Image.Image], text: str, vote: int) -> int:
    """
    Derives a seed from the question: with one seed for all, answers to different questions would not be independent.
    """
    sizes = " ".join(str(picture.size) for picture in pictures)
    pixels = b"".join(picture.tobytes() for picture in pictures)
    return int.from_bytes(hashlib.sha256(f"{vote} {sizes} {text}".encode() + pixels).digest()[:7], "big")


def load_processor(reference: Reference, config: Any) -> Any:
    """
    Loads the processor of a model, without its part for videos, which needs torchvision.

    Raises:
        `ValueError`: If it cannot be loaded, or has no chat template.
    """
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
        raise ValueError(f"The processor of {reference} has no chat template. Use a chat model.")
    return processor
