"""Detects objects and their masks with models of instance segmentation, as GenEval does."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForUniversalSegmentation,
    Mask2FormerConfig,
    MaskFormerConfig,
)

from .detection import class_names, in_batches, load_with_processor
from .geneval import THRESHOLD, Detection


# Other models need a task input (OneFormer) or pad the image (EoMT).
SEGMENTATION_CONFIGS = (Mask2FormerConfig, MaskFormerConfig)


class SegmentationDetector:
    """
    Finds objects with a model of instance segmentation, as GenEval does with Mask2Former on COCO. A
    [`~judges.loading.ClassDetector`] of fixed classes.

    Of all pairs of a query and a class, as many as there are queries are taken, the most likely first. The score is the
    chance of the class times the mean chance of the mask's pixels; the box is the smallest around the mask, which is cut at the
    size of the image. Weights and errors are as for [`~judges.detection.TransformersDetector`].

    Args:
        name (`str`):
            The model, Mask2Former or MaskFormer: a folder, `ORG/NAME` or `ORG/NAME@REVISION` on the Hub, or `hub/NAME`.
        threshold (`float`, *optional*, defaults to `0.3`):
            Score above which objects are returned.
        device (`str` or `torch.device`, *optional*):
            Where it runs. If `None`, the accelerator if there is one.
        batch_size (`int`, *optional*, defaults to `8`):
            How many images of one size go through it at once.

    Attributes:
        labels (`list[str]`):
            Its classes, in GenEval's names where they differ.

    Raises:
        `ValueError`: If there is no such model, it is of another kind, weights are missing, or the repository holds pickles or
            code.
        `OSError`: If the folder holds no model in safetensors.
    """

    takes_classes = False

    def __init__(self, name: str, threshold: float = THRESHOLD, *, device: Any = None, batch_size: int = 8):
        self.name = name
        self.threshold = threshold
        self.batch_size = batch_size
        self.model, self.processor = load_with_processor(
            name,
            AutoModelForUniversalSegmentation,
            AutoImageProcessor,
            SEGMENTATION_CONFIGS,
            what="an instance segmentation model, such as Mask2Former or MaskFormer",
            dtype=torch.float32,
            device=device,
        )
        self._names = class_names(self.model.config)
        self.labels = sorted(set(self._names.values()))

    def __call__(
        self, images: Sequence[Image.Image], classes: Sequence[Sequence[str]] | None = None
    ) -> list[list[Detection]]:
        """Detects the objects and their masks in each RGB image, of any size. `classes` are ignored."""
        return in_batches(images, self.batch_size, self._detect)

    @torch.no_grad()
    def _detect(self, images: Sequence[Image.Image]) -> list[list[Detection]]:
        """Detects objects in a batch of images of equal size, which need no padding."""
        inputs = self.processor(images=list(images), return_tensors="pt").to(self.model.device)
        outputs = self.model(**inputs)
        pairs = zip(images, outputs.class_queries_logits, outputs.masks_queries_logits, strict=True)
        return [self._as_detections(image, *logits) for image, *logits in pairs]

    def _as_detections(
        self, image: Image.Image, class_logits: torch.Tensor, mask_logits: torch.Tensor
    ) -> list[Detection]:
        """
        Makes detections, most confident first, from the logits of one image: classes `(num_queries, num_classes + 1)`,
        the last of them "no object", and masks `(num_queries, rows, columns)`.
        """
        chances = class_logits.softmax(-1)[:, :-1]
        num_queries, num_classes = chances.shape
        best = chances.flatten().topk(num_queries)
        found = []
        for chance, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            query, label = divmod(place, num_classes)
            if chance <= self.threshold or label not in self._names:  # the mask's factor can only lower the score
                continue
            logits = torch.nn.functional.interpolate(
                mask_logits[None, None, query], (image.height, image.width), mode="bilinear", align_corners=False
            )[0, 0]
            mask = logits > 0  # (height, width)
            if not mask.any():
                continue
            score = chance * float(logits.sigmoid()[mask].mean())
            if score > self.threshold:
                rows, columns = (mask.any(dim).nonzero().flatten().tolist() for dim in (1, 0))
                box = (float(columns[0]), float(rows[0]), columns[-1] + 1.0, rows[-1] + 1.0)
                found.append(Detection(self._names[label], score, box, mask.cpu().numpy()))
        return sorted(found, key=lambda detection: -detection.score)
