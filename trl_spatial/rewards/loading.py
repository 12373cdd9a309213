"""Loads a reward function by the name that a command line or a YAML file gives."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from ..hub.functions import is_function, load_function
from ..hub.references import UnknownReferenceError, find_reference
from ..judges.loading import FLAT, load_colors, load_detector
from . import TOKEN_VARIABLE
from .geneval_reward import GenEvalReward
from .remote import RemoteReward
from .rules import SceneRules


_FORMS = (
    "a SpatialScore checkpoint (a folder, ORG/NAME or ORG/NAME@REVISION on the Hub, or hub/NAME for your own), "
    "`geneval:DETECTOR`, `rules`, `module:function`, or the address of a server, http://HOST:PORT"
)
_GENEVAL_KINDS: dict[str, Literal["partial", "strict"]] = {"geneval": "partial", "geneval-strict": "strict"}


def load_reward(
    name: str, *, device: Any = None, attn_implementation: str | None = None
) -> Callable[..., Sequence[float | None]]:
    """
    Loads a reward function by its name.

    Args:
        name (`str`):
            One of:

            - the checkpoint of a [`SpatialScore`]: a folder, `ORG/NAME` or `ORG/NAME@REVISION` on the Hub, or `hub/NAME`;
            - `http://HOST:PORT` or `https://...`: the server that `trl_spatial serve` started, whose token is
              `TRL_SPATIAL_SERVER_TOKEN` of the environment;
            - `rules`: [`SceneRules`], for prompts that describe scenes;
            - `geneval:DETECTOR`: [`GenEvalReward`] with a detector of transformers, named as a checkpoint is, any other as
              `module:function` or `module:Class`, or `flat`, for datasets with the columns of GenEval's
              `evaluation_metadata.jsonl`; `geneval:DETECTOR,CLASSIFIER` if there are colors in it, with a model of zero-shot
              image classification such as CLIP, a function, or `flat`; `geneval-strict:` instead of `geneval:` for the
              benchmark's verdict instead of shares. A module of your own cannot be called `geneval`;
            - `module:function`: a function `(prompts, images, **columns) -> list[float | None]` of a module that Python
              finds, the current folder included, or a class, whose object is created once, without arguments, and called.
        device (`str` or `torch.device`, *optional*):
            Where a [`SpatialScore`] or a detector runs. If `None`, the accelerator if there is one.
        attn_implementation (`str`, *optional*):
            Attention function of a [`SpatialScore`], as in its `from_pretrained`.

    Raises:
        `ValueError`: If the name has none of these forms, or does not exist.
        `ConnectionError`: If a server cannot be reached or does not know the token.
    """
    if name == "rules":
        return SceneRules()
    if re.match("https?://", name):
        return RemoteReward(name, os.environ.get(TOKEN_VARIABLE) or None)
    prefix, _, models = name.partition(":")
    if prefix in _GENEVAL_KINDS:
        return _load_geneval(name, models, _GENEVAL_KINDS[prefix], device)
    if is_function(name):
        return load_function(name, what="reward", hint=f"Name {_FORMS}.")
    try:
        find_reference(name, kind="model")
    except UnknownReferenceError as error:
        raise ValueError(f"There is no reward {name!r}. Name {_FORMS}.") from error
    # imported here because it takes seconds, and the other forms do not need it
    from ..gaussian_reward.scoring import SpatialScore

    return SpatialScore.from_pretrained(name, device=device, attn_implementation=attn_implementation)


def _load_geneval(name: str, models: str, kind: Literal["partial", "strict"], device: Any) -> GenEvalReward:
    # the name of a folder may contain a comma
    detector_name, comma, classifier_name = (models, "", "") if Path(models).exists() else models.partition(",")
    for model in (detector_name, classifier_name) if comma else (detector_name,):
        try:
            if model != FLAT and not is_function(model):
                find_reference(model, kind="model")
        except UnknownReferenceError as error:
            raise ValueError(
                f"There is no reward {name!r}: {model!r} is no model. Write geneval:DETECTOR or geneval:DETECTOR,CLASSIFIER, "
                "each a folder, ORG/NAME or ORG/NAME@REVISION on the Hub, hub/NAME for your own, module:function, or flat. If a "
                "module of yours is called geneval, rename it."
            ) from error

    def load_own(model: str) -> Any:
        return load_function(model, what="reward", hint=f"Name {_FORMS}.")

    detector: Any = load_own(detector_name) if is_function(detector_name) else load_detector(detector_name, device)
    if not comma:
        return GenEvalReward(detector, None, kind)
    colors = load_own(classifier_name) if is_function(classifier_name) else load_colors(classifier_name, device)
    return GenEvalReward(detector, colors, kind)
