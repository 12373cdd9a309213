"""An object detector with a self-test: rewards from one that detects nothing look like those of bad images."""

import warnings
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from PIL import Image

from ..preferences.images import load_image
from .geneval import Detection, confident_objects, geneval_name


# images → objects in each; with the attribute `takes_classes`, if true, it also gets the classes to look for in each
Detector = Callable[..., Sequence[Sequence[Detection]]]

# A portrait of Rear Admiral Grace Hopper by the U.S. Navy, in the public domain (Wikimedia Commons, Grace_Hopper.jpg).
SELF_TEST_IMAGE = Path(__file__).with_name("self_test.jpg")
SELF_TEST_LABEL = "person"


class SilentDetectorError(RuntimeError):
    """A detector finds nothing where there is something; every reward would be close to 0."""


def check_detections(results: Any, num_images: int) -> list[Sequence[Detection]]:
    """Returns a detector's results; raises a `TypeError` unless there is a list of [`Detection`] for each image."""
    results = list(results)
    wrong = [found for detections in results for found in detections if not isinstance(found, Detection)]
    if wrong or len(results) != num_images:
        raise TypeError(
            "The detector must return a list of `trl_spatial.rewards.Detection` for each image; of "
            f"{num_images} images it returned {len(results)} lists" + (f", with {wrong[0]!r:.80}." if wrong else ".")
        )
    return results


class CheckedDetector:
    """
    A detector that is tested on a photograph at first, and monitored afterwards.

    It must find the photograph's object above `threshold`; otherwise, a `SilentDetectorError` is raised. Two copies of
    the photograph side by side show two of them: if fewer are found above `counting_threshold`, there is a warning,
    because prompts about numbers would then be judged as if the objects were missing. By default it is a photograph of
    a person that comes with the package, since detectors of photographs may not recognize a drawing. A detector of
    other pictures can provide its own, with a label, as the attribute `self_test`.

    If the detector has an attribute `labels`, the names of its classes, a class that it does not know is an error
    rather than an object that is never found. If it finds nothing in the first `silence_limit` images, it is
    considered broken.
    """

    def __init__(
        self,
        detector: Detector,
        *,
        threshold: float,
        counting_threshold: float,
        image: Any = None,
        label: str | None = None,
        silence_limit: int = 64,
    ):
        for name, value in (("threshold", threshold), ("counting_threshold", counting_threshold)):
            if not 0 <= value < 1:
                raise ValueError(f"`{name}` is {value}. Scores are from 0 to 1: choose one from 0 to below 1.")
        lowest = getattr(detector, "threshold", 0.0)
        if lowest > min(threshold, counting_threshold):
            raise ValueError(
                f"The detector returns nothing with a score below {lowest}, but `threshold` is {threshold} and "
                f"`counting_threshold` {counting_threshold}. Create it with a `threshold` that is as low."
            )
        self.detector = detector
        self.threshold = threshold
        self.counting_threshold = counting_threshold
        self.silence_limit = silence_limit
        self._num_silent: int | None = 0  # images without any object so far; `None` once an object was found
        labels = getattr(detector, "labels", None)
        self._labels = None if labels is None else {geneval_name(label) for label in labels}
        own_image, own_label = getattr(detector, "self_test", (SELF_TEST_IMAGE, SELF_TEST_LABEL))
        self._test(load_image(own_image if image is None else image), own_label if label is None else label)

    def __call__(self, images: list[Image.Image], classes: Sequence[Sequence[str]]) -> list[Sequence[Detection]]:
        """
        Detects the objects in each image; `classes` are what to look for in each, for a detector that takes classes.
        Raises a `SilentDetectorError` if nothing was found in the first `silence_limit` images, and a `TypeError` if
        the detector does not return a list of [`Detection`] for each image.
        """
        results = self._detect(images, classes)
        for found in results:
            self._watch(found)
        return results

    def check_class(self, name: str) -> None:
        """Raises a `ValueError` that suggests similar names if the detector does not know a class."""
        if self._labels is None or geneval_name(name) in self._labels:
            return
        near = ", ".join(get_close_matches(geneval_name(name), self._labels, n=5, cutoff=0.5))
        shown = f"names like it are {near}" if near else f"it knows {', '.join(sorted(self._labels)[:10])}, …"
        raise ValueError(f"The detector does not know the class {name!r} among its {len(self._labels)}: {shown}.")

    def _detect(self, images: list[Image.Image], classes: Sequence[Sequence[str]]) -> list[Sequence[Detection]]:
        takes_classes = getattr(self.detector, "takes_classes", False)
        found = self.detector(images, classes) if takes_classes else self.detector(images)
        return check_detections(found, len(images))

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

    def _test(self, picture: Image.Image, label: str) -> None:
        try:
            self.check_class(label)
        except ValueError as error:
            raise ValueError(
                f"The self-test shows the detector a {label}. {error} Pass `self_test_image` and `self_test_label`: a "
                "picture of something that it knows."
            ) from error
        name = geneval_name(label)
        (detections,) = self._detect([picture], [[label]])
        objects = confident_objects(detections, self.threshold)
        if name not in objects:
            best = max((found.score for found in detections if geneval_name(found.label) == name), default=None)
            raise SilentDetectorError(
                f"The detector does not find the {label} in the self-test's picture: it found "
                f"{', '.join(sorted(objects)) or 'nothing'} above a score of {self.threshold}"
                + ("" if best is None else f", and a {label} at {best:.3f}")
                + ". With it every reward would be wrong. Check its weights and its image processor; if it was made for "
                "other pictures, pass one of those as `self_test_image` and what it shows as `self_test_label`."
            )
        pair = Image.new("RGB", (2 * picture.width, picture.height))
        for left in (0, picture.width):
            pair.paste(picture, (left, 0))
        (detections,) = self._detect([pair], [[label]])
        scores = sorted((found.score for found in detections if geneval_name(found.label) == name), reverse=True)
        number = sum(score > self.counting_threshold for score in scores)
        if number < 2:
            warnings.warn(
                f"The detector does not count: of two {label}s side by side, it finds {number} above "
                f"`counting_threshold` {self.counting_threshold} (scores {', '.join(f'{s:.2f}' for s in scores[:4]) or 'none'}). "
                "Prompts about numbers will be judged as if objects were missing. Use a detector whose scores reach it, lower "
                "it if you do not need GenEval's own rules, or leave out such prompts."
            )
