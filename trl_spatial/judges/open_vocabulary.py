"""Detects objects of any class that can be named, with zero-shot detectors."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
    GroundingDinoConfig,
    MMGroundingDinoConfig,
    Owlv2Config,
    OwlViTConfig,
)

from .detection import load_with_processor
from .geneval import THRESHOLD, Detection


_GROUNDING_CONFIGS = (GroundingDinoConfig, MMGroundingDinoConfig)
OPEN_VOCABULARY_CONFIGS = (*_GROUNDING_CONFIGS, Owlv2Config, OwlViTConfig)
_OWL_TEMPLATE = "a photo of a {}"


class OpenVocabularyDetector:
    """
    Finds objects of the classes that it is asked for: Grounding DINO, MM Grounding DINO, OWL-ViT or OWLv2. A
    [`~judges.loading.ClassDetector`] that takes classes.

    Every box has one of the given classes. Grounding DINO reads them as one text; a box's score is that of its best
    token, and its class is the one whose tokens have the best mean, so that words shared by two classes do not decide.
    OWL reads "a photo of a" with each class separately. Images are processed one by one, so that no result depends on
    other images. Weights and errors are as for [`~judges.detection.TransformersDetector`].

    Args:
        name (`str`):
            The model: a folder, `ORG/NAME` or `ORG/NAME@REVISION` on the Hub, or `hub/NAME`.
        threshold (`float`, *optional*, defaults to `0.3`):
            Score above which objects are returned.
        device (`str` or `torch.device`, *optional*):
            Where it runs. If `None`, the accelerator if there is one.

    Raises:
        `ValueError`: If there is no such model, it is of another kind, weights are missing, or the repository holds pickles or
            code.
        `OSError`: If the folder holds no model in safetensors.
    """

    takes_classes = True

    def __init__(self, name: str, threshold: float = THRESHOLD, *, device: Any = None):
        self.name = name
        self.threshold = threshold
        self.model, self.processor = load_with_processor(
            name,
            AutoModelForZeroShotObjectDetection,
            AutoProcessor,
            OPEN_VOCABULARY_CONFIGS,
            what="an open-vocabulary detector, such as Grounding DINO or OWLv2",
            dtype=torch.float32,
            device=device,
        )
        self._find = self._ground if isinstance(self.model.config, _GROUNDING_CONFIGS) else self._match

    @torch.no_grad()
    def __call__(
        self, images: Sequence[Image.Image], classes: Sequence[Sequence[str]] | None = None
    ) -> list[list[Detection]]:
        """
        Detects objects of the given classes in each RGB image, of any size, most confident first.

        Raises:
            `ValueError`: If there is not a list of classes for each image, or they are more or longer than the model
                reads.
        """
        if classes is None or len(classes) != len(images):
            raise ValueError(
                f"{self.name} must be told what to look for: pass a list of `classes` for each of the {len(images)} images."
            )
        return [
            self._sorted(image, *self._find(image, list(dict.fromkeys(names)))) if names else []
            for image, names in zip(images, classes, strict=True)
        ]

    def _sorted(
        self, image: Image.Image, labels: list[str], scores: torch.Tensor, boxes: torch.Tensor
    ) -> list[Detection]:
        """
        Makes detections, most confident first, of the objects above the threshold, from scores `(num_queries,)` and
        boxes `(num_queries, 4)` in pixels.
        """
        limits = torch.tensor([image.width, image.height] * 2, device=boxes.device)
        rows = zip(labels, scores.tolist(), boxes.clamp(min=0).minimum(limits).tolist(), strict=True)
        found = [
            Detection(label, score, (box[0], box[1], box[2], box[3]))
            for label, score, box in rows
            if score > self.threshold
        ]
        return sorted(found, key=lambda detection: -detection.score)

    def _ground(self, image: Image.Image, names: list[str]) -> tuple[list[str], torch.Tensor, torch.Tensor]:
        """Runs Grounding DINO; returns the label, score and box of every query."""
        phrases = [" ".join(name.lower().replace(".", " ").split()) for name in names]  # a period ends a class
        inputs = self.processor(images=image, text=". ".join(phrases) + ".", return_tensors="pt")
        spans = self._spans(phrases, inputs["input_ids"][0].tolist())
        outputs = self.model(**inputs.to(self.model.device))
        chances = outputs.logits[0].sigmoid()  # (num_queries, max_text_len)
        means = torch.stack([chances[:, span].mean(1) for span in spans], dim=1)  # (num_queries, num_classes)
        scores = chances[:, [token for span in spans for token in span]].amax(1)
        x, y, width, height = outputs.pred_boxes[0].unbind(1)
        boxes = torch.stack([x - width / 2, y - height / 2, x + width / 2, y + height / 2], dim=1)
        size = torch.tensor([image.width, image.height] * 2, device=boxes.device)
        return [names[index] for index in means.argmax(1).tolist()], scores, boxes * size

    def _spans(self, phrases: list[str], read: list[int]) -> list[list[int]]:
        """Returns the positions of the tokens of each class in the text that Grounding DINO reads."""
        text, spans = ". ".join(phrases) + ".", []
        encoding = self.processor.tokenizer(text)
        limit = self.model.config.max_text_len
        if len(encoding["input_ids"]) > limit or encoding["input_ids"] != read:
            raise ValueError(
                f"{self.name} reads {limit} tokens at most, and {len(phrases)} classes, from {phrases[0]!r} to "
                f"{phrases[-1]!r}, are {len(encoding['input_ids'])}. Ask for fewer at once."
            )
        start = 0
        for phrase in phrases:
            tokens = {encoding.char_to_token(place) for place in range(start, start + len(phrase))} - {None}
            if not tokens:
                raise ValueError(f"{self.name} cannot look for the class {phrase!r}: it has no words.")
            spans.append(sorted(tokens))
            start += len(phrase) + len(". ")
        return spans

    def _match(self, image: Image.Image, names: list[str]) -> tuple[list[str], torch.Tensor, torch.Tensor]:
        """Runs OWL; returns the label, score and box of the queries above the threshold."""
        texts = [_OWL_TEMPLATE.format(name) for name in names]
        limit = self.model.config.text_config.max_position_embeddings
        for name, tokens in zip(names, self.processor.tokenizer(texts)["input_ids"], strict=True):
            if len(tokens) > limit:
                raise ValueError(f"{self.name} reads {limit} tokens at most, and the class {name!r} is {len(tokens)}.")
        inputs = self.processor(text=[texts], images=image, return_tensors="pt").to(self.model.device)
        (result,) = self.processor.post_process_grounded_object_detection(
            self.model(**inputs), threshold=self.threshold, target_sizes=[(image.height, image.width)]
        )
        return [names[index] for index in result["labels"].tolist()], result["scores"], result["boxes"]
