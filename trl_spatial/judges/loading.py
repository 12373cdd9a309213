"""Judges of boxes, depth and colors by their names, as a command line gives them."""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..hub.errors import explain_errors
from ..hub.references import UnknownReferenceError, find_reference
from .checked_detector import check_detections
from .geneval import THRESHOLD, Detection


FLAT = "flat"
FUNCTION = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")
_FORMS = (
    "flat, for pictures of the flat world; a model: a folder, ORG/NAME or ORG/NAME@REVISION on the Hub, or hub/NAME; or a "
    "function of yours, module:function"
)


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
        Looks for objects.

        Args:
            images (`Sequence[PIL.Image.Image]` of length `n`):
                RGB images of any size.
            classes (`Sequence[Sequence[str]]` of length `n`, *optional*):
                What to look for in each image.

        Returns:
            `list[list[Detection]]` of length `n`: What is in each image. Where classes are taken, the label is one of them,
            as it was given.
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
        self._function = function

    def __call__(
        self, images: Sequence[Image.Image], classes: Sequence[Sequence[str]] | None = None
    ) -> list[list[Detection]]:
        """See [`ClassDetector`]; a `TypeError` if the function returns something else."""
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
    if FUNCTION.fullmatch(spec):
        return FunctionDetector(spec, import_function(spec, what="detector", forms=_FORMS))
    config = _load_config(spec, "detector")
    # transformers takes seconds to import: not for the other forms
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
    if FUNCTION.fullmatch(spec):
        return import_function(spec, what="estimator of depth", forms=_FORMS)
    _check_reference(spec, "estimator of depth")
    from .depth import DepthEstimator

    return DepthEstimator(spec, device=device)


def load_colors(spec: str, device: Any = None) -> Callable[[Image.Image, str], str]:
    """
    Loads who names the colors of objects.

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
    if FUNCTION.fullmatch(spec):
        return import_function(spec, what="namer of colors", forms=_FORMS)
    _check_reference(spec, "namer of colors")
    from .detection import ZeroShotColors

    return ZeroShotColors(spec, device=device)


def import_function(spec: str, *, what: str, forms: str) -> Callable[..., Any]:
    """
    Imports a function of the user.

    Args:
        spec (`str`):
            `module:function` of a module that Python finds, the current folder included; or `module:Class`, whose object is
            created once, without arguments.
        what (`str`), forms (`str`):
            What it is, and how such a thing can be named, for errors.

    Raises:
        `ValueError`: If there is no such module or function.
    """
    module_name, name = spec.split(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):  # the module is there, and needs another one
            raise
        raise ValueError(
            f"The {what} {spec} cannot be imported: there is no module {error.name!r} in {os.getcwd()} or among the installed "
            f"packages. Name {forms}."
        ) from error
    function: Any = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"The {what} {spec} is not a function: the functions of {module_name} are {', '.join(functions) or 'none'}."
        )
    if inspect.isclass(function):
        function = function()
    return function


def _check_reference(spec: str, what: str) -> Any:
    try:
        return find_reference(spec, kind="model")
    except UnknownReferenceError as error:
        raise ValueError(f"There is no {what} {spec!r}. Name {_FORMS}.") from error


def _load_config(spec: str, what: str) -> Any:
    """The configuration of a model, whose class says what the model is."""
    reference = _check_reference(spec, what)
    from transformers import AutoConfig

    with explain_errors(f"Loading {reference}"):
        return AutoConfig.from_pretrained(reference.name, revision=reference.revision, trust_remote_code=False)
