"""Scorers of images for prompts, published ones and our own; each is a file and an entry in `SCORERS`."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...judges.loading import ModelSettings
from .base import Comparison, PairScorer, PairwiseScorer, Score


if TYPE_CHECKING:
    from ...endpoints import Prices, Spend

__all__ = ["SCORERS", "Comparison", "PairScorer", "PairwiseScorer", "Score", "find_scorer", "make_scorer"]

# name on the command line → MODULE:CLASS
SCORERS = {
    "clipscore": "clip:CLIPScore",
    "geneval": "rules:GenEvalRule",
    "hpsv2": "hpsv2:HPSv2",
    "hpsv3": "hpsv3:HPSv3",
    "hpsv3++": "hpsv3_plus:HPSv3Plus",
    "image-reward": "image_reward:ImageReward",
    "judge-pairwise": "vision_judges:PairwiseJudge",
    "judge-pointwise": "vision_judges:PointwiseJudge",
    "pickscore": "clip:PickScore",
    "pixels": "rules:Pixels",
    "rules": "rules:Rules",
    "spatialscore": "spatialscore:SpatialScorer",
    "unified-reward": "unified_reward:UnifiedReward",
    "unified-reward-pointwise": "unified_reward:UnifiedRewardPointwise",
    "vqascore": "vqascore:VQAScore",
}


def make_scorer(
    spec: str,
    device: Any = None,
    spend: "Spend | None" = None,
    cache: Path | None = None,
    prices: "Prices | None" = None,
) -> PairScorer:
    """
    Makes a scorer by its name on the command line.

    Args:
        spec (`str`):
            See [`find_scorer`].
        device (`str` or `torch.device`, *optional*):
            Where a model on this machine runs. If `None`, the accelerator if there is one.
        spend (`Spend`, *optional*), cache (`Path`, *optional*), prices (`Prices`, *optional*):
            Limit, cache and prices of a model behind a server.

    Raises:
        `ValueError`: If there is no such scorer, or its model cannot be loaded.
    """
    scorer, reference = find_scorer(spec)
    return scorer.make(reference, ModelSettings(device, spend, prices, cache))


def find_scorer(spec: str) -> tuple[type[PairScorer], str]:
    """
    Finds the scorer that a name on the command line stands for, without loading a model.

    Args:
        spec (`str`):
            `NAME` or `NAME:REFERENCE` with one of `SCORERS`. The reference is a model: a folder, `ORG/NAME` or
            `ORG/NAME@REVISION` on the Hub, or `hub/NAME`; for `vqascore`, `unified-reward` and the judges also a model behind
            an OpenAI-compatible server, `http://HOST:PORT/v1#MODEL`. `rules` and `pixels` take none. Or `module:function`, a
            function `(prompts, images) -> list[float | None]` of a module that Python finds.

    Returns:
        `tuple`: The class, and the reference that its `make` takes.

    Raises:
        `ValueError`: If there is no such scorer.
    """
    name, colon, reference = spec.partition(":")
    if name not in SCORERS:
        if colon and name and reference.isidentifier():
            return _load("function:FunctionScorer"), spec
        raise ValueError(
            f"There is no scorer {spec!r}. Available: {', '.join(SCORERS)}, with a model after a colon, such as "
            "pickscore:FOLDER; or name a function, module:function."
        )
    scorer = _load(SCORERS[name])
    if scorer.default == "" and reference:
        raise ValueError(f"The scorer {name} takes no model, got {reference!r}. Write {name} alone.")
    if not reference and scorer.default is None:
        raise ValueError(f"The scorer {name} needs a model. {scorer.hint}.")
    return scorer, reference or scorer.default or ""


def _load(path: str) -> type[PairScorer]:
    module, _, class_name = path.partition(":")
    return getattr(import_module(f".{module}", __name__), class_name)
