"""HPSv3: Qwen2-VL with a head for the mean and standard deviation of a preference, and its published weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import init_empty_weights
from PIL import Image
from torch import nn
from transformers import AutoConfig, Qwen2VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from ...hub.errors import explain_errors
from ...hub.references import Reference, find_reference
from ...hub.safety import check_repository
from ...judges.vision import load_processor
from .base import PairScorer, Score, in_batches
from .weights import fill, find_file, pick_device, read_weights


# The exact text that the model was trained on, including trailing spaces, from the package hpsv3 1.0.0 (MIT). A
# different text would be a different scorer.
_INSTRUCTION = (Path(__file__).parent / "hpsv3_instruction.txt").read_text(encoding="utf-8")
_REWARD_TOKEN = "<|Reward|>"
_START_NAMES = {"visual.": "backbone.visual.", "model.": "backbone.language_model.", "rm_head.": "head."}
_NUM_PIXELS = 256 * 28 * 28
_BATCH_SIZE = 4


def make_head(hidden_size: int) -> nn.Sequential:
    """Makes the head: from the state at the reward token to the mean and the logarithm of the standard deviation."""
    return nn.Sequential(
        nn.Linear(hidden_size, 1024), nn.ReLU(), nn.Identity(), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


class HPSv3Model(nn.Module):
    """
    The network. The positions of image tokens continue those of the words on one axis, as in training; Qwen2-VL itself
    has three axes.

    Args:
        config ([`~transformers.Qwen2VLConfig`]):
            Sizes of the backbone.
    """

    precise = ("head",)  # parts kept in float32

    def __init__(self, config: Qwen2VLConfig):
        super().__init__()
        self.backbone = Qwen2VLModel(config)
        self.head = make_head(config.get_text_config().hidden_size)
        self.image_token_id = config.image_token_id

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, places: torch.Tensor, **pixels: Any
    ) -> torch.Tensor:
        """
        Returns the mean and the logarithm of the standard deviation, `(batch_size, 2)`, in float32.

        Args:
            input_ids (`torch.Tensor` of shape `(batch_size, num_tokens)`), attention_mask (of the same shape):
                Tokens, padded on the right.
            places (`torch.Tensor` of shape `(batch_size,)`):
                Position of the reward token.
            pixels (`pixel_values`, `image_grid_thw`):
                Patches of all images, and their grid sizes.
        """
        embedded = self.backbone.get_input_embeddings()(input_ids)
        features = self.backbone.get_image_features(**pixels).pooler_output
        image_tokens = (input_ids == self.image_token_id)[..., None].expand_as(embedded)
        embedded = embedded.masked_scatter(image_tokens, torch.cat(tuple(features)).to(embedded))
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand(3, *input_ids.shape)
        hidden = self.backbone.language_model(
            inputs_embeds=embedded, attention_mask=attention_mask, position_ids=positions, use_cache=False
        ).last_hidden_state
        rows = torch.arange(len(places), device=places.device)
        return self.head(hidden[rows, places].float())


class HPSv3(PairScorer):
    """
    HPSv3 ([papers/2508.03789](https://huggingface.co/papers/2508.03789)): mean and standard deviation of the
    preference.

    Weights keep the type in which they were saved; the published ones are of a Qwen2-VL-7B.

    Args:
        reference (`str`):
            A folder or a repository on the Hub with `HPSv3.safetensors`. Configuration, tokenizer and image processor are those
            of Qwen2-VL-7B unless they are beside it.
        device (`str` or `torch.device`, *optional*):
            Where it runs. If `None`, the accelerator if there is one.

    Raises:
        `ValueError`: If there is no such model, or weights are missing or unknown.
    """

    name = "hpsv3"
    trained_on = (
        "HPDv3: choices between images of many generators and photographs; it is also a common reward of image models"
    )
    default: ClassVar[str | None] = "MizzenAI/HPSv3"
    backbone: ClassVar[str] = "Qwen/Qwen2-VL-7B-Instruct"
    file: ClassVar[str] = "HPSv3.safetensors"
    config_class: ClassVar[type] = Qwen2VLConfig
    network: ClassVar[type] = HPSv3Model
    start_names: ClassVar[Mapping[str, str]] = _START_NAMES
    inputs: ClassVar[Sequence[str]] = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")

    def __init__(self, reference: str, *, device: Any = None):
        place = find_reference(reference, kind="model")
        check_repository(place, kind="model")
        beside = place.is_local and (Path(place.name) / "config.json").is_file()
        base = place if beside else find_reference(self.backbone, kind="model")
        self.processor, config = self._load_parts(base)
        weights = rename_weights(read_weights(find_file(place, self.file)), self.start_names)
        # the published weights have a row for each token of the tokenizer, without padding rows
        config.get_text_config().vocab_size = len(self.processor.tokenizer)
        with init_empty_weights(include_buffers=False):
            model = self.network(config)
        fill(model, weights, place)
        for name in model.precise:
            getattr(model, name).float()
        self.device = pick_device(device)
        self.model = model.eval().to(self.device)

    def _load_parts(self, place: Reference) -> tuple[Any, Any]:
        """Loads the processor, with the reward token added, and the configuration."""
        check_repository(place, kind="model")
        with explain_errors(f"Loading {place}"):
            config = AutoConfig.from_pretrained(place.name, revision=place.revision, trust_remote_code=False)
            if not isinstance(config, self.config_class):
                raise ValueError(f"{place} is a {config.model_type} model, not a {self.backbone.partition('/')[2]}.")
        processor = load_processor(place, config)
        processor.tokenizer.padding_side = "right"
        processor.tokenizer.add_special_tokens(
            {"additional_special_tokens": [_REWARD_TOKEN]}, replace_extra_special_tokens=False
        )
        return processor, config

    @torch.inference_mode()
    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[Score]:
        """See [`PairScorer`]."""
        scores: list[Score] = []
        reward_token = self.processor.tokenizer.convert_tokens_to_ids(_REWARD_TOKEN)
        for texts, pictures in in_batches(prompts, images, _BATCH_SIZE):
            inputs = self._prepare(texts, pictures)
            found = inputs["input_ids"] == reward_token
            # the last one, because a prompt may also contain the token
            places = found.shape[1] - 1 - found.flip(1).int().argmax(1)
            inputs = {name: tensor.to(self.device) for name, tensor in inputs.items()}
            values = self.model(places=places.to(self.device), **inputs)
            scores += [
                Score(mean, std) for mean, std in zip(values[:, 0].tolist(), values[:, 1].exp().tolist(), strict=True)
            ]
        return scores

    def _prepare(self, prompts: list[str], images: list[Image.Image]) -> dict[str, torch.Tensor]:
        texts = []
        for prompt in prompts:
            words = {"type": "text", "text": _INSTRUCTION.replace("{text_prompt}", prompt)}
            messages = [{"role": "user", "content": [{"type": "image"}, words]}]
            texts.append(self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        inputs = self.processor(
            text=texts, images=[_resize(image) for image in images], padding=True, return_tensors="pt"
        )
        return {name: inputs[name] for name in self.inputs}


def _resize(image: Image.Image) -> Image.Image:
    """Resizes an image to about 448² pixels, with sides that are multiples of 28 and about the same proportions."""
    height, width = smart_resize(image.height, image.width, min_pixels=_NUM_PIXELS, max_pixels=_NUM_PIXELS)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def rename_weights(state_dict: Mapping[str, torch.Tensor], start_names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """
    Renames published weights by the prefixes of their names. The language modeling head is left out, because it is not
    used.

    Raises:
        `ValueError`: If a name is unknown.
    """
    converted = {}
    for name, weight in state_dict.items():
        if name == "lm_head.weight":
            continue
        start = next((start for start in start_names if name.startswith(start)), None)
        if start is None:
            raise ValueError(f"{name} is no weight of such a model.")
        converted[start_names[start] + name.removeprefix(start)] = weight
    return converted
