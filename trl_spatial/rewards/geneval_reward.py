"""GenEval's rules as a reward, over any detector: what the paper compares a learned reward with."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ..judges.geneval import (
    COUNTING_THRESHOLD,
    THRESHOLD,
    Detection,
    GenEvalResult,
    Specification,
    confident_objects,
    geneval_name,
    judge,
    read_specification,
)
from ..preferences.images import load_image


# images → what is in each
Detector = Callable[[list[Image.Image]], Sequence[Sequence[Detection]]]
# the crop of an object, its class → its color
ColorClassifier = Callable[[Image.Image, str], str]

# A portrait of Rear Admiral Grace Hopper by the U.S. Navy, in the public domain (Wikimedia Commons, Grace_Hopper.jpg).
SELF_TEST_IMAGE = Path(__file__).with_name("self_test.jpg")
SELF_TEST_LABEL = "person"


class SilentDetectorError(RuntimeError):
    """A detector finds nothing where there is something: every reward would be next to 0."""


class GenEvalReward:
    """
    Rewards an image by GenEval's rules for the objects, numbers, colors and positions that its prompt asks for.

    It differs from the benchmark in what sees: the benchmark takes a Mask2Former, and shows its color classifier an object
    without its background; this takes the boxes of any detector. Its thresholds were chosen for that Mask2Former. Compare
    numbers of one detector only.

    A detector that finds nothing looks like bad images. So it is shown a photograph when the reward is created, and
    watched: if it has never found anything in its first `silence_limit` images, training stops.

    Args:
        detector (`Callable`):
            Takes a list of images, returns a list of [`Detection`] for each, with scores down to `threshold` or below. If
            it has an attribute `labels`, the names of its classes, a class that it does not know is an error rather than
            an object that is never found. [`~judges.detection.TransformersDetector`] is one.
        color_classifier (`Callable`, *optional*):
            Takes the crop of an object and its class, returns its color, one of `geneval.COLORS`; such as
            [`~judges.detection.ZeroShotColors`]. Needed for prompts with colors only.
        kind (`str`, *optional*, defaults to `"partial"`):
            `"partial"` is the share of what is asked for that is there, see [`~judges.geneval.judge`]; `"strict"` the
            benchmark's verdict, 1.0 or 0.0.
        threshold (`float`, *optional*, defaults to `0.3`):
            Score above which a detection counts.
        counting_threshold (`float`, *optional*, defaults to `0.9`):
            The same for prompts tagged `counting`.
        batch_size (`int`, *optional*, defaults to `16`):
            How many images the detector gets at once.
        self_test_image (`PIL.Image.Image` or `str` or `Path`, *optional*):
            Picture in which the detector must find something when the reward is created. By default a photograph of a
            person that comes with the package: detectors of photographs may well not know a drawing.
        self_test_label (`str`, *optional*, defaults to `"person"`):
            What it must find there.
        silence_limit (`int`, *optional*, defaults to `64`):
            Number of images in the first of which a detector must have found anything.

    Raises:
        `SilentDetectorError`: If the detector does not find the object of the self-test.
        `ValueError`: If an argument is not as described, or the detector does not know `self_test_label`.

    Example:

    ```python
    >>> reward = GenEvalReward(TransformersDetector("PekingU/rtdetr_v2_r50vd"))
    >>> reward(["a photo of a dog"], [image], include=[[{"class": "dog", "count": 1}]])
    [1.0]
    ```
    """

    def __init__(
        self,
        detector: Detector,
        color_classifier: ColorClassifier | None = None,
        kind: Literal["partial", "strict"] = "partial",
        *,
        threshold: float = THRESHOLD,
        counting_threshold: float = COUNTING_THRESHOLD,
        batch_size: int = 16,
        self_test_image: Image.Image | str | Path | None = None,
        self_test_label: str = SELF_TEST_LABEL,
        silence_limit: int = 64,
    ):
        if kind not in ("partial", "strict"):
            raise ValueError(f"`kind` is {kind!r}. It is 'partial' or 'strict'.")
        for name, value in (("batch_size", batch_size), ("silence_limit", silence_limit)):
            if value < 1:
                raise ValueError(f"`{name}` is {value}. It should be at least 1.")
        lowest = getattr(detector, "threshold", 0.0)
        if lowest > min(threshold, counting_threshold):
            raise ValueError(
                f"The detector returns nothing with a score below {lowest}, but `threshold` is {threshold} and "
                f"`counting_threshold` {counting_threshold}. Create it with a `threshold` that is as low."
            )
        self.__name__ = "geneval" if kind == "partial" else "geneval_strict"  # under which trainers log it
        self.detector = detector
        self.color_classifier = color_classifier
        self.kind = kind
        self.threshold = threshold
        self.counting_threshold = counting_threshold
        self.batch_size = batch_size
        self.silence_limit = silence_limit
        self._num_silent: int | None = 0  # images without any object so far; `None` once there was one
        labels = getattr(detector, "labels", None)
        self._labels = None if labels is None else {geneval_name(label) for label in labels}
        self._test_detector(self_test_image, self_test_label)

    def __call__(
        self,
        prompts: list[str],
        images: list[Image.Image],
        include: list[Any] | None = None,
        exclude: list[Any] | None = None,
        tag: list[str | None] | None = None,
        metadata: list[str | Mapping[str, Any] | None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """
        The reward function that the trainer calls. Other columns of the dataset are ignored.

        Args:
            prompts (`list[str]`):
                One prompt per image.
            images (`list[Image.Image]`):
                The images.
            include (`list[list[dict]]`, *optional*):
                Column of the dataset, as of GenEval's `evaluation_metadata.jsonl`: what each image should show.
            exclude (`list[list[dict]]`, *optional*):
                Column: what it should not.
            tag (`list[str]`, *optional*):
                Column: the task.
            metadata (`list[str]`, *optional*):
                In place of these three: a column of whole rows of that file, as JSON. Not read where there is `include`
                or `exclude`.

        Returns:
            `list[float]`: One reward per image; `None`, no opinion, where there is no specification.

        Raises:
            `ValueError`: If there is a specification that cannot be read, or that asks for a class that the detector does
                not know, or for colors without a classifier; the message gives its prompt.
            `SilentDetectorError`: If the detector has not found anything in its first `silence_limit` images.
        """
        if include is exclude is metadata is None:
            warnings.warn(
                "GenEvalReward has no opinion on any of these images: the dataset has neither a column `include` nor "
                "`exclude` nor `metadata`, as GenEval's evaluation_metadata.jsonl."
            )
        results = self.judge(prompts, images, include=include, exclude=exclude, tag=tag, metadata=metadata)
        return [None if result is None else float(getattr(result, self.kind)) for result in results]

    def judge(
        self, prompts: list[str], images: list[Image.Image], **columns: list[Any] | None
    ) -> list[GenEvalResult | None]:
        """The verdicts behind the rewards, with their reasons; arguments as for a call."""
        specifications = [
            self._read_row(prompt, {name: values[index] for name, values in columns.items() if values is not None})
            for index, prompt in enumerate(prompts)
        ]
        asked = [index for index, specification in enumerate(specifications) if specification is not None]
        results: list[GenEvalResult | None] = [None] * len(images)
        for start in range(0, len(asked), self.batch_size):
            chunk = asked[start : start + self.batch_size]
            pictures = [load_image(images[index]) for index in chunk]
            for index, picture, found in zip(chunk, pictures, self.detector(pictures), strict=True):
                self._watch(found)
                results[index] = self._judge_image(picture, specifications[index], found)
        return results

    def _read_row(self, prompt: str, row: dict[str, Any]) -> Specification | None:
        source = row if row.get("include") or row.get("exclude") else row.get("metadata")
        if not source:
            return None
        try:
            specification = read_specification(source)
            self._check(specification)
        except ValueError as error:
            raise ValueError(f"The prompt {prompt!r} cannot be judged. {error}") from error
        return specification

    def _check(self, specification: Specification) -> None:
        for name in specification.class_names:
            self._check_class(name)
        if specification.needs_colors and self.color_classifier is None:
            raise ValueError(
                "Its objects have colors, which boxes do not tell. Give `color_classifier`, on the command line "
                "geneval:DETECTOR,CLASSIFIER with a model of zero-shot image classification; or leave out such prompts."
            )

    def _check_class(self, name: str) -> None:
        if self._labels is None or geneval_name(name) in self._labels:
            return
        near = get_close_matches(geneval_name(name), self._labels, n=5, cutoff=0.5)
        shown = (
            f"names like it are {', '.join(near)}" if near else f"it knows {', '.join(sorted(self._labels)[:10])}, …"
        )
        raise ValueError(f"The detector does not know the class {name!r} among its {len(self._labels)}: {shown}.")

    def _judge_image(
        self, image: Image.Image, specification: Specification | None, detections: Sequence[Detection]
    ) -> GenEvalResult | None:
        if specification is None:
            return None
        return judge(
            specification,
            detections,
            None if self.color_classifier is None else lambda found: self._find_color(image, found),
            threshold=self.threshold,
            counting_threshold=self.counting_threshold,
        )

    def _find_color(self, image: Image.Image, detection: Detection) -> str:
        assert self.color_classifier is not None
        left, top, right, bottom = detection.box
        # at least the pixel that the box begins in, and nothing outside the image
        left, top = min(max(int(left), 0), image.width - 1), min(max(int(top), 0), image.height - 1)
        right, bottom = min(max(round(right), left + 1), image.width), min(max(round(bottom), top + 1), image.height)
        return self.color_classifier(image.crop((left, top, right, bottom)), geneval_name(detection.label))

    def _watch(self, detections: Sequence[Detection]) -> None:
        if self._num_silent is None:
            return
        if any(detection.score > self.threshold for detection in detections):
            self._num_silent = None
            return
        self._num_silent += 1
        if self._num_silent >= self.silence_limit:
            raise SilentDetectorError(
                f"The detector found nothing in {self._num_silent} images, not one object with a score above "
                f"{self.threshold}. Look at the images: if there are objects, lower `threshold` or take another "
                "detector; if there are none, start from a model that draws some, or raise `silence_limit`."
            )

    def _test_detector(self, image: Image.Image | str | Path | None, label: str) -> None:
        try:
            self._check_class(label)
        except ValueError as error:
            raise ValueError(
                f"The self-test shows the detector a {label}. {error} Pass `self_test_image` and `self_test_label`: a "
                "picture of something that it knows."
            ) from error
        (detections,) = self.detector([load_image(SELF_TEST_IMAGE if image is None else image)])
        objects = confident_objects(detections, self.threshold)
        if geneval_name(label) in objects:
            return
        best = max(
            (found.score for found in detections if geneval_name(found.label) == geneval_name(label)), default=None
        )
        raise SilentDetectorError(
            f"The detector does not find the {label} in the self-test's picture: it found "
            f"{', '.join(sorted(objects)) or 'nothing'} above a score of {self.threshold}"
            + ("" if best is None else f", and a {label} at {best:.3f}")
            + ". With it every reward would be wrong. Check its weights and its image processor; if it was made for other "
            "pictures, pass one of those as `self_test_image` and what it shows as `self_test_label`."
        )
