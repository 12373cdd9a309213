"""The judges of a benchmark's images, by role."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..judges.geneval import THRESHOLD
from ..judges.loading import ClassDetector, ModelSettings, load_colors, load_depth, load_detector
from ..judges.self_test import check_depth, check_detector, check_vision
from ..judges.vision import VisionModel, load_vision
from .benchmarks.base import Benchmark


# role → task of its judge
ROLES = {
    "vision": "answers questions about an image",
    "detector": "finds objects",
    "second_detector": "finds objects, as a second opinion",
    "colors": "names the color of an object",
    "depth": "measures how close things are",
}


@dataclass(frozen=True)
class Judges:
    """
    The judges, by role; `None` for roles that a benchmark does not need.

    Args:
        vision ([`~judges.vision.VisionModel`], *optional*):
            Answers questions.
        detectors (`Mapping[str, ClassDetector]`):
            `"first"` and, where a benchmark has two, `"second"` → detector.
        colors (`Callable`, *optional*):
            Crop and class name → name of its color.
        depth (`Callable`, *optional*):
            Image → depth of each pixel, `(height, width)`, 0 to 255, near is large.
        names (`Mapping[str, str]`):
            Role → name, for the records.
    """

    vision: VisionModel | None
    detectors: Mapping[str, ClassDetector]
    colors: Callable[[Image.Image, str], str] | None
    depth: Callable[[Image.Image], np.ndarray] | None
    names: Mapping[str, str]


def check_roles(benchmark: Benchmark, names: Mapping[str, str]) -> None:
    """
    Checks that the named judges are those that a benchmark needs.

    Raises:
        `ValueError`: If one is missing or not needed.
    """
    for role in ROLES:
        if role in benchmark.judges and role not in names:
            raise ValueError(f"{benchmark.title} needs a judge that {ROLES[role]}: name one with --{role}.")
        if role in names and role not in benchmark.judges:
            asked = " and ".join(f"--{name}" for name in ROLES if name in benchmark.judges)
            raise ValueError(
                f"{benchmark.title} asks no judge that {ROLES[role]} (--{role} {names[role]}). It asks {asked}."
            )


def load_judges(
    names: Mapping[str, str],
    settings: ModelSettings,
    *,
    threshold: float = THRESHOLD,
    counting_threshold: float | None = None,
    tested_kinds: Collection[str] = ("text",),
) -> Judges:
    """
    Loads judges and shows each a picture whose content is known.

    Args:
        names (`Mapping[str, str]`):
            Role → judge: a model, as a folder, `ORG/NAME`, `ORG/NAME@REVISION` or `hub/NAME`; a function, `module:function`; the
            exact rules of the flat world, `flat`, of all roles but `vision`; for `vision` also a model behind a server,
            `http://HOST:PORT/v1#MODEL`.
        settings ([`~judges.loading.ModelSettings`]):
            Settings of the models.
        threshold (`float`, *optional*, defaults to `0.3`), counting_threshold (`float`, *optional*):
            Score above which boxes of detectors count, and the same in prompts about numbers, if that is different.
        tested_kinds (`Collection[str]`, *optional*, defaults to `("text",)`):
            How a vision-language model is tested, see [`~judges.self_test.check_vision`]. If empty, no judge is tested.

    Raises:
        `ValueError`: If a judge cannot be loaded.
        [`~judges.self_test.JudgeError`], [`~judges.checked_detector.SilentDetectorError`]: If a judge fails its test.
    """
    vision = None
    if "vision" in names:
        vision = load_vision(names["vision"], settings)
        if tested_kinds:
            check_vision(vision, kinds=tested_kinds)
    detectors = {}
    for role, place in (("detector", "first"), ("second_detector", "second")):
        if role in names:
            detectors[place] = load_detector(names[role], settings.device, threshold=threshold)
            if tested_kinds:
                check_detector(detectors[place], threshold=threshold, counting_threshold=counting_threshold)
    depth = load_depth(names["depth"], settings.device) if "depth" in names else None
    if depth is not None and tested_kinds:
        check_depth(depth, names["depth"])
    colors = load_colors(names["colors"], settings.device) if "colors" in names else None
    return Judges(vision, detectors, colors, depth, dict(names))
