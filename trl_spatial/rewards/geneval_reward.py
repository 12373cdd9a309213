"""GenEval's rules as a reward, with any detector: the baseline with which the paper compares a learned reward."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from PIL import Image

from ..judges.checked_detector import CheckedDetector, Detector
from ..judges.geneval import (
    COUNTING_THRESHOLD,
    THRESHOLD,
    Detection,
    GenEvalResult,
    Specification,
    geneval_name,
    judge,
    read_specification,
)
from ..judges.pictures import crop_object
from ..preferences.images import load_image


# (crop of an object, its class) → its color
ColorClassifier = Callable[[Image.Image, str], str]


class GenEvalReward:
    """
    Rewards an image by GenEval's rules for the objects, numbers, colors and positions that its prompt asks for.

    The benchmark uses a Mask2Former and shows its color classifier an object without its background; this reward takes the
    boxes of any detector. GenEval's thresholds, 0.3 and 0.9 for numbers, were chosen for that Mask2Former: two other
    detectors found 1 and 0 of 15 scenes right at 0.9, and 15 and 12 at 0.3. Compare numbers of one detector only.

    Args:
        detector (`Callable`):
            Takes a list of RGB images, returns a list of [`Detection`] for each, with scores down to `threshold` or below.
            [`~judges.detection.TransformersDetector`] is one; the example adapts another. It may have the attributes
            `labels`, the names of its classes, and `counting_threshold`; with a true `takes_classes` it also gets the classes to
            look for in each image. It is tested and watched, as one that finds nothing looks like bad images, see
            [`~judges.checked_detector.CheckedDetector`].
        color_classifier (`Callable`, *optional*):
            Takes the crop of an object and its class, returns its color, one of `geneval.COLORS`; such as
            [`~judges.detection.ZeroShotColors`]. Needed for prompts with colors only.
        kind (`str`, *optional*, defaults to `"partial"`):
            `"partial"` is the share of the requirements that are met, see [`~judges.geneval.judge`]; `"strict"` the
            benchmark's verdict, 1.0 or 0.0.
        threshold (`float`, *optional*, defaults to `0.3`):
            Score above which a detection counts.
        counting_threshold (`float`, *optional*):
            The same for prompts tagged `counting`. If `None`, the detector's own `counting_threshold` if it has one;
            otherwise `threshold` for `"partial"`, and GenEval's `geneval.COUNTING_THRESHOLD` of 0.9 for `"strict"`.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of images passed to the detector at a time.
        self_test_image, self_test_label, silence_limit:
            As `image`, `label` and `silence_limit` of [`~judges.checked_detector.CheckedDetector`].

    Raises:
        `SilentDetectorError`: If the detector does not find the object of the self-test.
        `ValueError`: If an argument is not as described, or the detector does not know `self_test_label`.

    Example:

    ```python
    >>> reward = GenEvalReward(TransformersDetector("PekingU/rtdetr_v2_r50vd"))
    >>> reward(["a photo of a dog"], [image], include=[[{"class": "dog", "count": 1}]])
    [1.0]
    ```

    Any other detector, here one of torchvision, in a file `my_detector.py`; `--rewards geneval:my_detector:Detector`:

    ```python
    import torch
    from torchvision.models import detection
    from torchvision.transforms.functional import to_tensor

    from trl_spatial.rewards import Detection


    class Detector:
        counting_threshold = 0.5

        def __init__(self):
            weights = detection.FasterRCNN_ResNet50_FPN_V2_Weights.DEFAULT
            self.model = detection.fasterrcnn_resnet50_fpn_v2(weights=weights).eval()
            self.labels = weights.meta["categories"]

        @torch.no_grad()
        def __call__(self, images):
            return [self.read(result) for result in self.model([to_tensor(image) for image in images])]

        def read(self, result):
            rows = zip(result["labels"], result["scores"], result["boxes"].tolist())
            return [Detection(self.labels[label], float(score), tuple(box)) for label, score, box in rows]
    ```
    """

    def __init__(
        self,
        detector: Detector,
        color_classifier: ColorClassifier | None = None,
        kind: Literal["partial", "strict"] = "partial",
        *,
        threshold: float = THRESHOLD,
        counting_threshold: float | None = None,
        batch_size: int = 16,
        self_test_image: Any = None,
        self_test_label: str | None = None,
        silence_limit: int = 64,
    ):
        if kind not in ("partial", "strict"):
            raise ValueError(f"`kind` is {kind!r}. It is 'partial' or 'strict'.")
        for name, value in (("batch_size", batch_size), ("silence_limit", silence_limit)):
            if value < 1:
                raise ValueError(f"`{name}` is {value}. It should be at least 1.")
        if counting_threshold is None:
            official = COUNTING_THRESHOLD if kind == "strict" else threshold
            counting_threshold = float(getattr(detector, "counting_threshold", official))
        self.__name__ = "geneval" if kind == "partial" else "geneval_strict"  # the name in the trainers' logs
        self.color_classifier = color_classifier
        self.kind = kind
        self.threshold = threshold
        self.counting_threshold = counting_threshold
        self.batch_size = batch_size
        self.detector = CheckedDetector(
            detector,
            threshold=threshold,
            counting_threshold=counting_threshold,
            image=self_test_image,
            label=self_test_label,
            silence_limit=silence_limit,
        )

    def __call__(
        self,
        prompts: list[str],
        images: list[Any],
        include: list[Any] | None = None,
        exclude: list[Any] | None = None,
        tag: list[str | None] | None = None,
        metadata: list[str | Mapping[str, Any] | None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """
        Rewards images; the trainer calls this. Other columns of the dataset are ignored.

        Args:
            prompts (`list[str]`), images (`list`):
                One prompt per image, and the images, in any form that [`~preferences.images.load_image`] takes.
            include, exclude (`list[list[dict]]`, *optional*), tag (`list[str]`, *optional*):
                Columns of the dataset, as in GenEval's `evaluation_metadata.jsonl`: what each image should show, what
                it should not, and the task.
            metadata (`list[str]`, *optional*):
                Instead of these three: a column with whole rows of that file, as JSON. Ignored if `include` or
                `exclude` is given.

        Returns:
            `list[float | None]`: One reward per image; `None` where there is no specification.

        Raises:
            `ValueError`: If there is a specification that cannot be read, or that asks for a class that the detector does
                not know, or for colors without a classifier; the message gives its prompt.
            `SilentDetectorError`: If the detector has not found anything in its first `silence_limit` images.
        """
        if include is exclude is metadata is None:
            warnings.warn(
                "GenEvalReward gives none of these images a reward: the dataset has neither a column `include` nor "
                "`exclude` nor `metadata`, as GenEval's evaluation_metadata.jsonl."
            )
        results = self.judge(prompts, images, include=include, exclude=exclude, tag=tag, metadata=metadata)
        return [None if result is None else float(getattr(result, self.kind)) for result in results]

    def judge(self, prompts: list[str], images: list[Any], **columns: list[Any] | None) -> list[GenEvalResult | None]:
        """The verdicts behind the rewards, with their reasons; arguments as for a call."""
        specifications = [
            self._read_row(prompt, {name: values[index] for name, values in columns.items() if values is not None})
            for index, prompt in enumerate(prompts)
        ]
        asked = [(index, row) for index, row in enumerate(specifications) if row is not None]
        results: list[GenEvalResult | None] = [None] * len(images)
        for start in range(0, len(asked), self.batch_size):
            chunk = asked[start : start + self.batch_size]
            pictures = [_load(prompts[index], images[index]) for index, _ in chunk]
            detections = self.detector(pictures, [specification.class_names for _, specification in chunk])
            for (index, specification), picture, found in zip(chunk, pictures, detections, strict=True):
                results[index] = judge(
                    specification,
                    found,
                    None if self.color_classifier is None else partial(self._find_color, picture),
                    threshold=self.threshold,
                    counting_threshold=self.counting_threshold,
                )
        return results

    def _read_row(self, prompt: str, row: dict[str, Any]) -> Specification | None:
        source = row if row.get("include") or row.get("exclude") else row.get("metadata")
        if not source:
            return None
        try:
            specification = read_specification(source)
            for name in specification.class_names:
                self.detector.check_class(name)
            if specification.needs_colors and self.color_classifier is None:
                raise ValueError(
                    "Its objects have colors, which cannot be seen from boxes. Give `color_classifier`, on the command line "
                    "geneval:DETECTOR,CLASSIFIER with a model of zero-shot image classification; or leave out such prompts."
                )
        except ValueError as error:
            raise ValueError(f"The prompt {prompt!r} cannot be judged. {error}") from error
        return specification

    def _find_color(self, image: Image.Image, detection: Detection) -> str:
        assert self.color_classifier is not None
        return self.color_classifier(crop_object(image, detection), geneval_name(detection.label))


def _load(prompt: str, image: Any) -> Image.Image:
    try:
        return load_image(image)
    except ValueError as error:
        raise ValueError(f"The image of the prompt {prompt!r} {error}.") from error
