"""Scorers that compare CLIP's embeddings of an image and its prompt."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForZeroShotImageClassification, AutoTokenizer, CLIPConfig

from ...endpoints.local_chat import load_model
from ...hub.errors import explain_errors
from ...hub.references import Reference, find_reference
from .base import PairScorer, Score, in_batches


_BATCH_SIZE = 16


class CLIPScorer(PairScorer):
    """
    Cosine of CLIP's embeddings of image and prompt, which each scorer turns into a score in its `finish`.

    Prompts are truncated to CLIP's 77 tokens.

    Args:
        reference (`str`):
            A CLIP model of transformers with safetensors.
        device (`str` or `torch.device`, *optional*):
            Where it runs. If `None`, the accelerator if there is one.

    Raises:
        `ValueError`: If there is no such model, it is not a CLIP, weights are missing, or the repository holds pickles
            or code.
    """

    # source of tokenizer and image processor, if the model's own folder has none
    processor: ClassVar[str | None] = None

    def __init__(self, reference: str, *, device: Any = None):
        place, _, self.model = load_model(
            reference,
            AutoModelForZeroShotImageClassification,
            (CLIPConfig,),
            what="a CLIP model",
            device=device,
            dtype=torch.float32,
        )
        if self.processor is not None and not (Path(place.name) / "preprocessor_config.json").is_file():
            place = find_reference(self.processor, kind="model")
        self.tokenizer, self.image_processor = self._load_processors(place)
        self.num_tokens = self.model.config.text_config.max_position_embeddings

    def _load_processors(self, place: Reference) -> tuple[Any, Any]:
        with explain_errors(f"Loading the tokenizer and the image processor of {place}"):
            where = {"revision": place.revision, "trust_remote_code": False}
            return AutoTokenizer.from_pretrained(place.name, **where), AutoImageProcessor.from_pretrained(
                place.name, **where
            )

    def score(self, prompts: Sequence[str], images: Sequence[Image.Image]) -> list[Score]:
        """See [`PairScorer`]."""
        scores: list[Score] = []
        for texts, pictures in in_batches(prompts, images, _BATCH_SIZE):
            scores += [Score(value) for value in self.finish(self._cosines(texts, pictures)).tolist()]
        return scores

    def finish(self, cosines: torch.Tensor) -> torch.Tensor:
        """Turns cosines of shape `(batch_size,)` into scores."""
        raise NotImplementedError

    def prepare_images(self, images: list[Image.Image]) -> torch.Tensor:
        """Pixels of images as the model takes them, `(batch_size, 3, height, width)`."""
        return self.image_processor(images=images, return_tensors="pt")["pixel_values"]

    @torch.inference_mode()
    def _cosines(self, prompts: list[str], images: list[Image.Image]) -> torch.Tensor:
        tokens = self.tokenizer(
            prompts, padding=True, truncation=True, max_length=self.num_tokens, return_tensors="pt"
        ).to(self.model.device)
        pixels = self.prepare_images(images).to(self.model.device)
        texts = self.model.get_text_features(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).pooler_output
        pictures = self.model.get_image_features(pixel_values=pixels).pooler_output
        return torch.cosine_similarity(texts, pictures)  # (batch_size,)


class CLIPScore(CLIPScorer):
    """
    CLIPScore, `2.5 · max(cosine, 0)` ([papers/2104.08718](https://huggingface.co/papers/2104.08718)), of the unchanged
    prompt: the paper puts "A photo depicts" before it. See [`CLIPScorer`] for the arguments.
    """

    name = "clipscore"
    trained_on = "images from the web and their captions, as the model's card says; no preferences"

    def finish(self, cosines: torch.Tensor) -> torch.Tensor:
        """See [`CLIPScorer`]."""
        return 2.5 * cosines.clamp(min=0)


class PickScore(CLIPScorer):
    """
    PickScore, the cosine times CLIP's learned scale ([papers/2305.01569](https://huggingface.co/papers/2305.01569)). See
    [`CLIPScorer`] for the arguments; a folder without a processor is used with that of the published model.
    """

    name = "pickscore"
    trained_on = "Pick-a-Pic: choices of users between two images; it is also a common reward of image models"
    default = "yuvalkirstain/PickScore_v1"
    processor = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def finish(self, cosines: torch.Tensor) -> torch.Tensor:
        """See [`CLIPScorer`]."""
        return self.model.logit_scale.detach().exp() * cosines
