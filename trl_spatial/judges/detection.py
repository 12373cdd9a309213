"""Models of transformers for GenEval's rules: object detectors and color classifiers."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import (
    MODEL_FOR_OBJECT_DETECTION_MAPPING,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
)

from ..endpoints.local_chat import load_model
from ..hub.errors import explain_errors
from .geneval import COLORS, THRESHOLD, Detection, geneval_name


# GenEval's templates; the logits of a color are averaged over them
COLOR_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


class TransformersDetector:
    """
    An object detector of transformers: RT-DETR, DETR, Conditional and Deformable DETR, YOLOS, ...

    Weights are read from safetensors only, and no code of a repository is run. A repository that holds pickles beside its
    safetensors, as many older ones do, is refused; download it without those and name the folder. Images of one size go
    through the model together: padding, which YOLOS takes for a part of the picture, would make a box depend on the other
    images.

    Args:
        name (`str`):
            The model: a folder, `ORG/NAME` or `ORG/NAME@REVISION` on the Hub, or `hub/NAME`.
        threshold (`float`, *optional*, defaults to `0.3`):
            Score from which detections are returned.
        device (`str` or `torch.device`, *optional*), dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Where it runs, by default on the accelerator if there is one, and the type of its weights.
        batch_size (`int`, *optional*, defaults to `16`):
            How many images go through it at once.
        counting_threshold (`float`, *optional*):
            Score above which a detection counts in prompts about numbers. If `None`, `threshold`: scores of these models
            rarely reach GenEval's 0.9.

    Attributes:
        labels (`list[str]`):
            Its classes, in GenEval's names where they differ.

    Raises:
        `ValueError`: If there is no such model, it is not an object detector, weights are missing, or the repository
            holds pickles or code.
        `OSError`: If the folder holds no model in safetensors.
    """

    takes_classes = False

    def __init__(
        self,
        name: str,
        threshold: float = THRESHOLD,
        *,
        device: Any = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 16,
        counting_threshold: float | None = None,
    ):
        self.name = name
        self.threshold = threshold
        self.counting_threshold = threshold if counting_threshold is None else counting_threshold
        self.batch_size = batch_size
        self.model, self.processor = load_with_processor(
            name,
            AutoModelForObjectDetection,
            AutoImageProcessor,
            MODEL_FOR_OBJECT_DETECTION_MAPPING,
            what="an object detector, such as RT-DETR, DETR or YOLOS",
            dtype=dtype,
            device=device,
        )
        self._names = class_names(self.model.config)
        self.labels = sorted(set(self._names.values()))

    def __call__(
        self, images: Sequence[Image.Image], classes: Sequence[Sequence[str]] | None = None
    ) -> list[list[Detection]]:
        """
        Detects the objects with a score above `threshold` in each RGB image, of any size; boxes are in pixels of that
        image. `classes` are ignored: it looks for all classes that it knows.
        """
        return in_batches(images, self.batch_size, self._detect)

    @torch.no_grad()
    def _detect(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        """Detects objects in a batch of images of equal size."""
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        outputs = self.model(**inputs)
        sizes = [(image.height, image.width) for image in images]
        results = self.processor.post_process_object_detection(outputs, threshold=self.threshold, target_sizes=sizes)
        return [self._as_detections(result) for result in results]

    def _as_detections(self, result: dict[str, torch.Tensor]) -> list[Detection]:
        rows = zip(result["labels"].tolist(), result["scores"].tolist(), result["boxes"].tolist(), strict=True)
        return [
            Detection(self._names[label], score, (box[0], box[1], box[2], box[3]))
            for label, score, box in rows
            if label in self._names
        ]


class ZeroShotColors:
    """
    Names the color of an object by zero-shot image classification, as GenEval does with CLIP ViT-L/14, in GenEval's
    words. Unlike there, the crop includes its background, because boxes have no mask to cut it out.

    The model is CLIP or SigLIP; its name, device and weights, and the errors, are as for [`TransformersDetector`].
    """

    def __init__(self, name: str, *, device: Any = None):
        self.model, self.processor = load_with_processor(
            name,
            AutoModelForZeroShotImageClassification,
            AutoProcessor,
            MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING,
            what="a model of zero-shot image classification, such as CLIP",
            dtype=torch.float32,
            device=device,
        )
        config = self.model.config
        self._padding: dict[str, Any] = {"padding": True}
        if config.model_type.startswith("siglip"):  # trained with texts padded to this length
            length = config.text_config.max_position_embeddings
            self._padding = {"padding": "max_length", "max_length": length, "truncation": True}

    @torch.no_grad()
    def __call__(self, crop: Image.Image, class_name: str) -> str:
        """Returns the color, one of `COLORS`, of the object that fills a crop."""
        texts = [template.format(color=color, name=class_name) for color in COLORS for template in COLOR_TEMPLATES]
        inputs = self.processor(text=texts, images=[crop], return_tensors="pt", **self._padding).to(self.model.device)
        logits = self.model(**inputs).logits_per_image  # (1, num_colors * num_templates)
        return COLORS[int(logits.view(len(COLORS), len(COLOR_TEMPLATES)).mean(dim=1).argmax())]


def in_batches(
    images: Sequence[Image.Image],
    batch_size: int,
    detect: Callable[[Sequence[Image.Image]], list[list[Detection]]],
) -> list[list[Detection]]:
    """Detects objects in images of any size with a function for images of one size, of which it is given `batch_size` at most."""
    by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, image in enumerate(images):
        by_size[image.size].append(index)
    found: list[list[Detection]] = [[] for _ in images]
    for indices in by_size.values():
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            for index, detections in zip(batch, detect([images[i] for i in batch]), strict=True):
                found[index] = detections
    return found


def class_names(config: Any) -> dict[int, str]:
    """Returns number → name of a model's classes, in GenEval's words where they differ."""
    # checkpoints name the gaps in COCO's numbering N/A
    return {int(index): geneval_name(label) for index, label in config.id2label.items() if label != "N/A"}


def load_with_processor(
    name: str, model_class: Any, processor_class: Any, mapping: Any, *, what: str, dtype: torch.dtype, device: Any
) -> Any:
    """Loads a model in evaluation mode, as [`~endpoints.local_chat.load_model`] does, and its processor."""
    reference, _, model = load_model(name, model_class, mapping, what=what, device=device, dtype=dtype)
    with explain_errors(f"Loading the processor of {reference}"):
        processor = processor_class.from_pretrained(
            reference.name, revision=reference.revision, trust_remote_code=False
        )
    return model, processor
