"""Loads detectors, depth estimators and color classifiers by the names that a command line gives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..endpoints import Prices, Spend
from ..hub.errors import explain_errors
from ..hub.functions import errors_of, is_function, load_function
from ..hub.references import UnknownReferenceError, find_reference
from .checked_detector import check_detections
from .geneval import THRESHOLD, Detection


FLAT = "flat"
_FORMS = (
    "flat, for pictures of the flat world; a model: a folder, ORG/NAME or ORG/NAME@REVISION on the Hub, or hub/NAME; or a "
    "function of yours, module:function"
)


@dataclass(frozen=True)
class ModelSettings:
    """
    Settings for running a model that is named on the command line.

    Args:
        device (`str` or `torch.device`, *optional*):
            Where a model on this machine runs. If not set, the accelerator if there is one.
        spend ([`~endpoints.Spend`], *optional*), prices ([`~endpoints.Prices`], *optional*), cache (`Path`, *optional*):
            Limit, prices and cache of a model behind a server.
    """

    device: Any = None
    spend: Spend | None = None
    prices: Prices | None = None
    cache: Path | None = None


class ClassDetector(Protocol):
    """
    Finds objects in images.

    Attributes:
        name (`str`):
            Its name.
        takes_classes (`bool`):
            Whether it looks for the classes that it is given, and needs them. Else it finds those that it was trained on.
    """

    name: str
    takes_classes: bool

    def __call__(self, images: Sequence[Image.Image], classes: Sequence[Sequence[str]] | None = None) -> Any:
        """
        Detects objects.

        Args:
            images (`Sequence[PIL.Image.Image]` of length `n`):
                RGB images of any size.
            classes (`Sequence[Sequence[str]]` of length `n`, *optional*):
                What to look for in each image.

        Returns:
            `list[list[Detection]]` of length `n`: The objects in each image. If the detector takes classes, each label
                is one of them, spelled as given.
        """
        ...


class FunctionDetector:
    """
    A function of the user as a [`ClassDetector`].

    Args:
        name (`str`):
            Its name.
        function (`Callable`):
            Takes a list of images, and returns a list of [`~judges.geneval.Detection`] for each. If it has a true attribute
            `takes_classes`, it is given the list of classes of each image, too.
    """

    def __init__(self, name: str, function: Callable[..., Any]):
        self.name = name
        self.takes_classes = bool(getattr(function, "takes_classes", False))
        self.labels = getattr(function, "labels", None)
        self._function = errors_of(f"The detector {name} raised this error.")(function)

    def __call__(
        self, images: Sequence[Image.Image], classes: Sequence[Sequence[str]] | None = None
    ) -> list[list[Detection]]:
        """See [`ClassDetector`]; raises a `TypeError` if the function returns something else."""
        found = self._function(list(images), classes) if self.takes_classes else self._function(list(images))
        return [list(detections) for detections in check_detections(found, len(images))]


def load_detector(spec: str, device: Any = None, *, threshold: float = THRESHOLD) -> ClassDetector:
    """
    Loads a detector by its name.

    Args:
        spec (`str`):
            `flat`: [`~judges.flat.FlatDetector`]; a model of transformers, of which the configuration says what it is:
            [`~judges.detection.TransformersDetector`] (DETR, RT-DETR, YOLOS, ...), [`~judges.instances.SegmentationDetector`]
            (Mask2Former, MaskFormer) or [`~judges.open_vocabulary.OpenVocabularyDetector`] (Grounding DINO, OWL-ViT, OWLv2);
            or `module:function`, see [`FunctionDetector`].
        device (`str` or `torch.device`, *optional*):
            Where a model runs. If `None`, the accelerator if there is one.
        threshold (`float`, *optional*, defaults to `0.3`):
            Score above which a model's detections are returned.

    Raises:
        `ValueError`: If there is no such detector, it is a model of another kind, or it cannot be loaded safely.
    """
    if spec == FLAT:
        from .flat import FlatDetector

        return FlatDetector()
    if is_function(spec):
        return FunctionDetector(spec, load_function(spec, what="detector", hint=f"Name {_FORMS}."))
    config = _load_config(spec, "detector")
    # imported here because it takes seconds, and the other forms do not need it
    from .detection import TransformersDetector
    from .instances import SEGMENTATION_CONFIGS, SegmentationDetector
    from .open_vocabulary import OPEN_VOCABULARY_CONFIGS, OpenVocabularyDetector

    if isinstance(config, SEGMENTATION_CONFIGS):
        return SegmentationDetector(spec, threshold, device=device)
    if isinstance(config, OPEN_VOCABULARY_CONFIGS):
        return OpenVocabularyDetector(spec, threshold, device=device)
    return TransformersDetector(spec, threshold, device=device)


def load_depth(spec: str, device: Any = None) -> Callable[[Image.Image], np.ndarray]:
    """
    Loads an estimator of depth by its name.

    Args:
        spec (`str`):
            `flat`: [`~judges.flat.FlatDepth`]; a model of transformers: [`~judges.depth.DepthEstimator`]; or
            `module:function`, a function that takes an RGB image and returns an array `(height, width)`, 0 to 255, near is
            large.
        device (`str` or `torch.device`, *optional*):
            Where a model runs. If `None`, the accelerator if there is one.

    Raises:
        `ValueError`: If there is no such estimator, or it cannot be loaded safely.
    """
    if spec == FLAT:
        from .flat import FlatDepth

        return FlatDepth()
    if is_function(spec):
        function = load_function(spec, what="depth estimator", hint=f"Name {_FORMS}.")
        return errors_of(f"The depth estimator {spec} raised this error.")(function)
    _check_reference(spec, "depth estimator")
    from .depth import DepthEstimator

    return DepthEstimator(spec, device=device)


def load_colors(spec: str, device: Any = None) -> Callable[[Image.Image, str], str]:
    """
    Loads a color classifier by its name.

    Args:
        spec (`str`):
            `flat`: [`~judges.flat.FlatColors`]; CLIP or SigLIP of transformers: [`~judges.detection.ZeroShotColors`]; or
            `module:function`, a function `(crop, class name) -> color`.
        device (`str` or `torch.device`, *optional*):
            Where a model runs. If `None`, the accelerator if there is one.

    Raises:
        `ValueError`: If there is no such model, or it cannot be loaded safely.
    """
    if spec == FLAT:
        from .flat import FlatColors

        return FlatColors()
    if is_function(spec):
        function = load_function(spec, what="color classifier", hint=f"Name {_FORMS}.")
        return errors_of(f"The color classifier {spec} raised this error.")(function)
    _check_reference(spec, "color classifier")
    from .detection import ZeroShotColors

    return ZeroShotColors(spec, device=device)


def _check_reference(spec: str, what: str) -> Any:
    try:
        return find_reference(spec, kind="model")
    except UnknownReferenceError as error:
        raise ValueError(f"There is no {what} {spec!r}. Name {_FORMS}.") from error


def _load_config(spec: str, what: str) -> Any:
    """Loads the configuration of a model; its class identifies the kind of model."""
    reference = _check_reference(spec, what)
    from transformers import AutoConfig

    with explain_errors(f"Loading {reference}"):
        return AutoConfig.from_pretrained(reference.name, revision=reference.revision, trust_remote_code=False)
