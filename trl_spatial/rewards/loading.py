"""A reward function by its name, as a command line or a YAML file gives it."""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from ..hub.references import UnknownReferenceError, find_reference
from .geneval_reward import GenEvalReward
from .remote import TOKEN_VARIABLE, RemoteReward
from .rules import SceneRules


_FORMS = (
    "a SpatialScore checkpoint (a folder, ORG/NAME or ORG/NAME@REVISION on the Hub, or hub/NAME for your own), "
    "`geneval:DETECTOR`, `rules`, `module:function`, or the address of a server, http://HOST:PORT"
)
_FUNCTION = re.compile(r"[^\W\d][\w.]*:[^\W\d]\w*")
_GENEVAL_KINDS: dict[str, Literal["partial", "strict"]] = {"geneval": "partial", "geneval-strict": "strict"}


def load_reward(name: str, *, device: Any = None) -> Callable[..., Sequence[float | None]]:
    """
    Loads a reward function by its name.

    Args:
        name (`str`):
            One of:

            - the checkpoint of a [`SpatialScore`]: a folder, `ORG/NAME` or `ORG/NAME@REVISION` on the Hub, or `hub/NAME`;
            - `http://HOST:PORT` or `https://...`: the server that `trl_spatial serve` started, whose token is
              `TRL_SPATIAL_SERVER_TOKEN` of the environment;
            - `rules`: [`SceneRules`], for prompts that describe scenes;
            - `geneval:DETECTOR`: [`GenEvalReward`] with a detector of transformers, named as a checkpoint is, or any other as
              `module:function` or `module:Class`, for datasets with the columns of GenEval's `evaluation_metadata.jsonl`;
              `geneval:DETECTOR,CLASSIFIER` if there are colors in it, with a model of zero-shot image classification such
              as CLIP or a function; `geneval-strict:` in place of `geneval:` for the benchmark's verdict in place of shares.
              A module of your own cannot be called `geneval`;
            - `module:function`: a function `(prompts, images, **columns) -> list[float | None]` of a module that Python
              finds, the current folder included, or a class, whose object is created once, without arguments, and called.
        device (`str` or `torch.device`, *optional*):
            Where a [`SpatialScore`] or a detector runs. If `None`, the accelerator if there is one.

    Raises:
        `ValueError`: If the name has none of these forms, or what it names is not there.
        `ConnectionError`: If a server cannot be reached or does not know the token.
    """
    if name == "rules":
        return SceneRules()
    if re.match("https?://", name):
        return RemoteReward(name, os.environ.get(TOKEN_VARIABLE) or None)
    prefix, _, models = name.partition(":")
    if prefix in _GENEVAL_KINDS:
        return _load_geneval(name, models, _GENEVAL_KINDS[prefix], device)
    if _FUNCTION.fullmatch(name):
        return _import_function(*name.split(":"))
    try:
        find_reference(name, kind="model")
    except UnknownReferenceError as error:
        raise ValueError(f"There is no reward {name!r}. Name {_FORMS}.") from error
    # transformers takes seconds to import: not for the other forms
    from ..gaussian_reward.scoring import SpatialScore

    return SpatialScore.from_pretrained(name, device=device)


def _load_geneval(name: str, models: str, kind: Literal["partial", "strict"], device: Any) -> GenEvalReward:
    # a folder whose name has a comma is that folder
    detector_name, comma, classifier_name = (models, "", "") if Path(models).exists() else models.partition(",")
    for model in (detector_name, classifier_name) if comma else (detector_name,):
        try:
            if not _FUNCTION.fullmatch(model):
                find_reference(model, kind="model")
        except UnknownReferenceError as error:
            raise ValueError(
                f"There is no reward {name!r}: {model!r} is no model. Write geneval:DETECTOR or geneval:DETECTOR,CLASSIFIER, "
                "each a folder, ORG/NAME or ORG/NAME@REVISION on the Hub, hub/NAME for your own, or module:function. If a "
                "module of yours is called geneval, rename it."
            ) from error

    def load(model: str, class_name: str) -> Any:
        if _FUNCTION.fullmatch(model):
            return _import_function(*model.split(":"))
        from ..judges import detection  # transformers takes seconds to import

        return getattr(detection, class_name)(model, device=device)

    colors = load(classifier_name, "ZeroShotColors") if comma else None
    return GenEvalReward(load(detector_name, "TransformersDetector"), colors, kind)


def _import_function(module_name: str, name: str) -> Callable[..., Any]:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):  # the module is there, and needs another one
            raise
        raise ValueError(
            f"The reward {module_name}:{name} cannot be imported: there is no module {error.name!r} in {os.getcwd()} or "
            f"among the installed packages. Name {_FORMS}."
        ) from error
    function: Any = getattr(module, name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"The reward {module_name}:{name} is not a function: the functions of {module_name} are "
            f"{', '.join(functions) or 'none'}."
        )
    if inspect.isclass(function):
        function = function()
    return function
