"""A local language model with the interface of a server's."""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..hub.errors import explain_errors
from ..hub.references import Reference, find_reference
from ..hub.safety import check_repository
from .answers import Answer
from .structured import add_text, ask_for_json, check_keywords, describe_schema
from .threads import map_in_order


_MOST_TOKENS = 2048


class LocalChat:
    """
    A language model of transformers with the `chat` and the `map` of an [`~endpoints.Endpoint`]. It costs nothing, has no
    cache, and answers one question after another.

    Args:
        name (`str`):
            The model: a folder, `ORG/NAME` or `ORG/NAME@REVISION` on the Hub, or `hub/NAME`. Its tokenizer has a chat
            template, its weights are safetensors.
        device (`str` or `torch.device`, *optional*):
            Where it runs. If `None`, the accelerator if there is one.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Type of the weights; `"auto"` is the one they are saved in.

    Raises:
        `ValueError`: If there is no such model, it does not write text, weights are missing, or the repository holds pickles
            or code.
    """

    def __init__(self, name: str, *, device: Any = None, dtype: Any = "auto"):
        reference, _, self._model = load_model(
            name,
            AutoModelForCausalLM,
            MODEL_FOR_CAUSAL_LM_MAPPING,
            what="a language model",
            device=device,
            dtype=dtype,
        )
        self.model = str(reference)
        with explain_errors(f"Loading the tokenizer of {reference}"):
            self._tokenizer = AutoTokenizer.from_pretrained(
                reference.name, revision=reference.revision, trust_remote_code=False
            )
        if self._tokenizer.chat_template is None:
            raise ValueError(f"The tokenizer of {reference} has no chat template. Use a chat model.")
        self._lock = threading.Lock()

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        schema: Mapping[str, Any] | None = None,
        seed: int | None = None,
        temperature: float | None = None,
        max_tokens: int | None = None,
        vote: int = 0,
    ) -> Answer:
        """
        See [`~endpoints.Endpoint.chat`]. Equal arguments give equal answers.

        Raises:
            `ValueError`: If a message holds an image.
            [`~endpoints.BadAnswer`]: If the model does not answer as the schema asks.
        """
        settings: dict[str, Any] = {"max_new_tokens": max_tokens or _MOST_TOKENS}
        if temperature is not None:
            settings |= {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        number = 1000 * (seed or 0) + vote
        if schema is None:
            return self._ask(messages, number, settings)
        check_keywords(schema)
        text = describe_schema(schema)
        return ask_for_json(lambda shown: self._ask(add_text(shown, text), number, settings), messages, schema)

    def map(self, function: Any, items: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """As [`~endpoints.Endpoint.map`], one item after another."""
        return map_in_order(function, items)

    @torch.no_grad()
    def _ask(self, messages: Sequence[Mapping[str, Any]], seed: int, settings: Mapping[str, Any]) -> Answer:
        chat = [{"role": message["role"], "content": _text(message["content"])} for message in messages]
        inputs = self._tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(self._model.device)
        num_read = inputs["input_ids"].shape[1]
        devices = [self._model.device] if self._model.device.type == "cuda" else []
        with self._lock, torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            tokens = self._model.generate(**inputs, **settings)[0, num_read:]
        text = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return Answer(text, None, self.model, num_read, len(tokens), 0.0, is_cached=False)


def load_model(
    name: str, model_class: Any, mapping: Any, *, what: str, device: Any, dtype: Any
) -> tuple[Reference, Any, Any]:
    """
    Loads a model of transformers: no code from a repository, no pickles, no weights left random.

    Args:
        name (`str`):
            A folder, `ORG/NAME` or `ORG/NAME@REVISION` on the Hub, or `hub/NAME`.
        model_class (`type`):
            One of transformers' automatic classes.
        mapping (`Mapping`):
            The configurations that it takes.
        what (`str`):
            What such a model is, for the error.
        device (`str` or `torch.device`, *optional*):
            Where it runs. If `None`, the accelerator if there is one.
        dtype (`str` or `torch.dtype`):
            Type of the weights.

    Returns:
        `tuple`: [`~hub.references.Reference`], configuration, and the model in evaluation mode.

    Raises:
        `ValueError`: If there is no such model, it is of another kind, weights are missing, or the repository holds pickles
            or code.
    """
    reference = find_reference(name, kind="model")
    check_repository(reference, kind="model")
    where = {"revision": reference.revision, "trust_remote_code": False}
    with explain_errors(f"Loading {reference}"):
        config = AutoConfig.from_pretrained(reference.name, **where)
        if type(config) not in mapping:
            raise ValueError(
                f"{reference} is a {config.model_type} model, not {what}, or not one that transformers knows."
            )
        model, info = model_class.from_pretrained(
            reference.name, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **where
        )
    # missing buffers are fine: some are computed rather than saved
    missing = sorted(set(info["missing_keys"]) & {key for key, _ in model.named_parameters()})
    if missing:
        raise ValueError(
            f"{reference} lacks {len(missing)} weights ({', '.join(missing[:5])}), which would be random. It may be a "
            "backbone that has not been trained for this, or an incomplete model."
        )
    device = device or torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return reference, config, model.to(device).eval()


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if any(part["type"] != "text" for part in content):
        raise ValueError("A local language model reads text only; a message holds an image.")
    return "\n\n".join(part["text"] for part in content)
