"""Turns (prompt, image) rows into the tensors a [`GaussianRewardModel`] reads.

One chat template defines the whole input: it holds the instruction, the place of the image, the place of
the prompt and, at the very end, the reward token at which the head reads the score. The prompt itself never passes
through the template: it is tokenized separately, as plain text, so that it cannot produce a control token.
"""

import json
from functools import partial
from pathlib import Path

import jinja2
import torch
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ..hub.errors import explain_errors
from ..hub.references import Reference, find_reference
from ..hub.safety import check_repository
from ..preferences.images import load_image
from ..preferences.prompts import clean_prompt


REWARD_TOKEN = "<reward>"
IMAGE_TOKEN = "<|image_pad|>"

DEFAULT_INSTRUCTION = (
    "Rate how faithfully the image follows the spatial layout given in the caption. Two questions count: is every "
    "object the caption names in the image, and does each one stand where the caption puts it, relative to the other "
    "objects and to the frame? Left, right, in front and behind are meant as the viewer sees them. Ignore beauty, "
    "style, realism and everything the caption does not mention."
)

# Where the prompt goes when the template is rendered; a private-use character that no template contains.
_PROMPT_SLOT = "\ue000"

_CHAT_TEMPLATE = """\
{%- set instruction = INSTRUCTION -%}
{%- if instruction -%}
{{- "<|im_start|>system\\n" + instruction + "<|im_end|>\\n" -}}
{%- endif -%}
{%- for message in messages -%}
{{- "<|im_start|>" + message["role"] + "\\n" -}}
{%- for part in message["content"] -%}
{%- if part["type"] == "image" -%}
{{- "<|vision_start|>IMAGE_TOKEN<|vision_end|>" -}}
{%- else -%}
{{- part["text"] -}}
{%- endif -%}
{%- endfor -%}
{{- "<|im_end|>\\n" -}}
{%- endfor -%}
{{- "<|im_start|>assistant\\nREWARD_TOKEN" -}}
"""


def build_chat_template(instruction: str) -> str:
    """
    Writes the Jinja chat template of the reward model: the instruction, unless it is empty, as the system turn, the image and
    the prompt as the user turn, and the reward token as all the assistant says.
    """
    # A JSON string that keeps its non-ASCII characters is also a Jinja string literal.
    literal = json.dumps(instruction, ensure_ascii=False)
    template = _CHAT_TEMPLATE.replace("IMAGE_TOKEN", IMAGE_TOKEN).replace("REWARD_TOKEN", REWARD_TOKEN)
    return template.replace("INSTRUCTION", literal)


class SpatialScoreProcessor(ProcessorMixin):
    """
    Processor of the reward model: an image processor and a tokenizer joined by a chat template that holds the
    instruction and the reward token. It has no video half, so it needs no torchvision.

    Args:
        image_processor ([`~transformers.Qwen2VLImageProcessorPil`]):
            The image processor of the Qwen-VL families, in its PIL form.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            A tokenizer with Qwen's vision tokens. [`REWARD_TOKEN`] is added to it if it is not there yet.
        chat_template (`str`, *optional*):
            A Jinja template with exactly one image token and one reward token. If `None`, it is written by
            [`build_chat_template`] with [`DEFAULT_INSTRUCTION`].
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]}, replace_extra_special_tokens=False)
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.reward_token_id = tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        self._encoded_template: tuple[str, tuple[list[int], list[int], list[int]]] | None = None
        if chat_template is None:
            chat_template = build_chat_template(DEFAULT_INSTRUCTION)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, revision=None, **kwargs):
        """Loads the processor from a folder or a Hub repository: see [`load_processor`]."""
        return load_processor(pretrained_model_name_or_path, revision=revision)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "mm_token_type_ids", "pixel_values", "image_grid_thw", "image_index"]

    def __call__(
        self,
        prompts: list[str],
        images: list[Image.Image],
        *,
        max_length: int | None = None,
        padding_side: str | None = None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """
        Encodes a batch of (prompt, image) rows.

        Args:
            prompts (`list[str]`):
                One caption per row. Leading and trailing whitespace is ignored. Added tokens of the tokenizer in it, such as
                `<tool_call>` or the reward token, are read as plain text.
            images (`list`):
                One image per row, in any form [`load_image`] takes. Rows that are given the same object share its patches.
            max_length (`int`, *optional*):
                Maximum number of tokens in a row, including image tokens.
            padding_side (`str`, *optional*):
                `"left"` or `"right"`. If `None`, the tokenizer's.
            return_tensors (`str`, *optional*, defaults to `"pt"`):
                Type of the returned arrays.

        Returns:
            [`~transformers.BatchFeature`] with

            - `input_ids`, `attention_mask`, `mm_token_type_ids` of shape `(batch_size, sequence_length)`; the last is 1
              at image tokens and 0 elsewhere;
            - `pixel_values` of shape `(total_patches, patch_dim)`: the patches of all images, never to be indexed by row;
            - `image_grid_thw` of shape `(num_images, 3)`: frames, rows and columns of patches;
            - `image_index` of shape `(batch_size,)`: the number of each row's image.

        Raises:
            `ValueError`: If the numbers of prompts and images differ, [`~preferences.prompts.clean_prompt`] refuses a
            prompt, an image cannot be read, or a row is longer than `max_length`. The message names the row.
        """
        image_features = self._encode_images(images)
        merge_length = self.image_processor.merge_size**2
        sizes = image_features["image_grid_thw"].prod(-1) // merge_length
        num_image_tokens = sizes[image_features["image_index"]].tolist()
        input_ids = self._encode_prompts(prompts, num_image_tokens)
        for row, ids in enumerate(input_ids):
            if max_length is not None and len(ids) > max_length:
                raise ValueError(
                    f"Row {row} has {len(ids)} tokens, {num_image_tokens[row]} of them of its image, but `max_length` is "
                    f"{max_length}. Raise `max_length`, lower `max_pixels`, or shorten the prompt."
                )
        batch = self.tokenizer.pad({"input_ids": input_ids}, padding_side=padding_side, return_tensors="pt")
        data = {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "mm_token_type_ids": (batch["input_ids"] == self.image_token_id).long(),
            **image_features,
        }
        return BatchFeature(data, tensor_type=return_tensors)

    def num_tokens(self, prompts: list[str], image_sizes: list[tuple[int, int]]) -> list[int]:
        """
        Counts the tokens of rows without decoding an image.

        Args:
            prompts (`list[str]`):
                One caption per row.
            image_sizes (`list[tuple[int, int]]`):
                Width and height of each row's image, in pixels.

        Returns:
            `list[int]`: The lengths that the rows have when encoded, which `max_length` limits.
        """
        num_image_tokens = [self._num_image_tokens(*size) for size in image_sizes]
        return [len(ids) for ids in self._encode_prompts(prompts, num_image_tokens)]

    def max_num_tokens(self, prompt: str, image_size: tuple[int, int]) -> int:
        """
        Bounds [`~SpatialScoreProcessor.num_tokens`] of a row from above, without tokenizing it: no token of Qwen's tokenizers is
        shorter than a byte, and their normalization makes no text more than three times as long.
        """
        template = sum(map(len, self._encode_template()))
        return template + self._num_image_tokens(*image_size) + 3 * len(prompt.encode())

    def _num_image_tokens(self, width: int, height: int) -> int:
        return self.image_processor.get_number_of_image_patches(height, width) // self.image_processor.merge_size**2

    def _encode_images(self, images: list) -> dict[str, torch.Tensor]:
        images = list(images)  # kept alive: a dataset column makes a new object at every access
        decoded: dict[int, Image.Image] = {}
        for row, image in enumerate(images):
            try:
                decoded[id(image)] = decoded.get(id(image)) or load_image(image)
            except ValueError as error:
                raise ValueError(f"The image of row {row} {error}.") from error
        number = {identity: number for number, identity in enumerate(decoded)}
        features = self.image_processor(list(decoded.values()), return_tensors="pt")
        return {**features, "image_index": torch.tensor([number[id(image)] for image in images])}

    def _encode_prompts(self, prompts: list[str], num_image_tokens: list[int]) -> list[list[int]]:
        if len(prompts) != len(num_image_tokens):
            raise ValueError(f"Got {len(prompts)} prompts and {len(num_image_tokens)} images; one image per prompt.")
        cleaned = []
        for row, prompt in enumerate(prompts):
            try:
                cleaned.append(clean_prompt(prompt))
            except ValueError as error:
                raise ValueError(f"The prompt of row {row} {error}.") from error
        before_image, after_image, suffix = self._encode_template()
        different = list(dict.fromkeys(cleaned))  # both rows of a pair have the same prompt
        encodings = self._plain_tokenizer().encode_batch(different, add_special_tokens=False)
        ids_of = {prompt: encoding.ids for prompt, encoding in zip(different, encodings, strict=True)}
        return [
            before_image + [self.image_token_id] * num_tokens + after_image + ids_of[prompt] + suffix
            for prompt, num_tokens in zip(cleaned, num_image_tokens, strict=True)
        ]

    def _plain_tokenizer(self) -> Tokenizer:
        """The tokenizer without its added tokens: `split_special_tokens` would still find those that are not special."""
        backend = self.tokenizer.backend_tokenizer
        plain = Tokenizer(backend.model)  # shares the vocabulary: this takes a microsecond
        plain.normalizer, plain.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
        return plain

    def _encode_template(self) -> tuple[list[int], list[int], list[int]]:
        """Token ids before the image, between image and prompt, and from the prompt to the reward token."""
        if self._encoded_template is not None and self._encoded_template[0] == self.chat_template:
            return self._encoded_template[1]
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _PROMPT_SLOT}]}]
        try:
            text = self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template, tokenize=False)
        except jinja2.TemplateError as error:
            raise ValueError(f"The chat template is damaged: {error}. Write it with `build_chat_template`.") from error
        if text.count(_PROMPT_SLOT) != 1 or text.count(IMAGE_TOKEN) != 1 or text.count(REWARD_TOKEN) != 1:
            raise ValueError(
                f"The chat template must write the prompt, {IMAGE_TOKEN} and {REWARD_TOKEN} once each; it gives {text!r}. "
                "Write it with `build_chat_template`."
            )
        before_prompt, suffix = text.split(_PROMPT_SLOT)
        before_image, after_image = before_prompt.split(IMAGE_TOKEN)
        encode = partial(self.tokenizer.encode, add_special_tokens=False)
        parts = encode(before_image), encode(after_image), encode(suffix)
        self._encoded_template = self.chat_template, parts
        return parts


def load_processor(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    instruction: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> SpatialScoreProcessor:
    """
    Loads the processor of a backbone, or of a reward model saved earlier.

    Args:
        name_or_path (`str` or `Path`):
            A local folder, or `org/name` or `hub/NAME` on the Hub: an image-text model of a Qwen-VL family, or a checkpoint
            of a reward model.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub.
        instruction (`str`, *optional*):
            What to judge. If `None`, a reward model keeps its own and a backbone gets [`DEFAULT_INSTRUCTION`].
        min_pixels (`int`, *optional*):
            Smaller images are enlarged to this many pixels. If `None`, the saved value.
        max_pixels (`int`, *optional*):
            Larger images are shrunk to this many pixels. If `None`, the saved value.

    Returns:
        [`SpatialScoreProcessor`]: The processor, with the reward token in its tokenizer.

    Raises:
        `ValueError`: If the model is not of a Qwen-VL family, the limits of the image size contradict each other, or the
        chat template or the tokenizer of a reward model is damaged.
        [`~hub.safety.UnsafeRepositoryError`]: If the folder or repository holds pickles or code.
    """
    reference = find_reference(name_or_path, kind="model", revision=revision)
    check_repository(reference, kind="model")
    source = {
        "pretrained_model_name_or_path": reference.name,
        "revision": reference.revision,
        "trust_remote_code": False,
    }
    try:
        with explain_errors(f"Loading the tokenizer of {reference}"):
            tokenizer = AutoTokenizer.from_pretrained(**source)
    except (OSError, ValueError):
        raise
    except Exception as error:  # tokenizers raises bare exceptions for a damaged tokenizer.json
        raise ValueError(f"The tokenizer of {reference} cannot be loaded: {error}") from error
    _check_family(reference, tokenizer)
    # PIL's backend everywhere: torchvision resizes a little differently, and a score must not depend on what is installed.
    image_processor = Qwen2VLImageProcessorPil.from_pretrained(**source)
    size = {
        "shortest_edge": image_processor.size["shortest_edge"] if min_pixels is None else min_pixels,
        "longest_edge": image_processor.size["longest_edge"] if max_pixels is None else max_pixels,
    }
    if not 0 < size["shortest_edge"] <= size["longest_edge"]:
        raise ValueError(
            f"Image sizes must satisfy 0 < min_pixels <= max_pixels, got min_pixels={size['shortest_edge']}, "
            f"max_pixels={size['longest_edge']}."
        )
    image_processor.size = size
    chat_template = build_chat_template(DEFAULT_INSTRUCTION if instruction is None else instruction)
    if instruction is None and REWARD_TOKEN in tokenizer.get_vocab():  # a reward model, which has its own
        chat_template = tokenizer.chat_template or ""
    processor = SpatialScoreProcessor(image_processor, tokenizer, chat_template=chat_template)
    try:
        processor.num_tokens(["a"], [(28, 28)])
    except ValueError as error:
        raise ValueError(f"chat_template.jinja of {reference}: {error}") from error
    return processor


def _check_family(reference: Reference, tokenizer: PreTrainedTokenizerBase) -> None:
    image_settings, _ = Qwen2VLImageProcessorPil.get_image_processor_dict(reference.name, revision=reference.revision)
    image_processor = image_settings.get("image_processor_type", "unknown")
    needed = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", IMAGE_TOKEN]
    missing = [token for token in needed if token not in tokenizer.get_vocab()]
    if missing or not image_processor.startswith("Qwen2VLImageProcessor"):
        raise ValueError(
            f"{reference} is not of a Qwen-VL family: its image processor is {image_processor} and its tokenizer lacks "
            f'{", ".join(missing) or "nothing"}. Use a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model, or see "Add a backbone" '
            "in CONTRIBUTING.md."
        )
