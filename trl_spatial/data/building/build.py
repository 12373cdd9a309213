"""Runs the stages of a build."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...endpoints import Endpoint, Spend
from ...endpoints.local_chat import LocalChat
from ...scenes.tabletop import MAX_RELATIONS, SCENES
from .build_store import BuildStore
from .decisions import decide_pairs
from .export import export_dataset
from .filter import filter_pairs
from .language import LanguageWriter
from .prompts import perturb_prompts, write_prompts
from .recipe import endpoint_settings
from .render import render_images
from .stats import write_stats
from .writers import GrammarWriter, ModelWriter, Writer


# The stages that `build` runs, in order. Human review, between filter and export, is `trl_spatial data review`.
STAGES = ("prompts", "perturb", "render", "filter", "export", "stats")


def make_writer(store: BuildStore) -> Writer:
    """Makes the writer that the recipe names."""
    recipe = store.recipe.prompts
    if recipe.writer == {"name": GrammarWriter.name}:
        if unknown := sorted(set(recipe.scenes) - set(SCENES)):
            raise ValueError(
                f"prompts.scenes names {unknown}. The grammar has {', '.join(SCENES)}; other scenes need a model."
            )
        if max(recipe.num_relations) > MAX_RELATIONS:
            raise ValueError(
                f"prompts.num_relations goes up to {max(recipe.num_relations)}. The grammar writes at most {MAX_RELATIONS}."
            )
        return GrammarWriter()
    spend = store.spend("prompts")
    writer = _load_model("writer", recipe.writer, store, spend)
    reader = None if recipe.reader is None else _load_model("reader", recipe.reader, store, spend)
    return ModelWriter(LanguageWriter(writer, reader=reader), writer)


def _load_model(role: str, spec: Mapping[str, Any], store: BuildStore, spend: Spend) -> Endpoint | LocalChat:
    if "local" in spec:
        return LocalChat(spec["local"], **{key: value for key, value in spec.items() if key != "local"})
    if "model" in spec:
        return Endpoint(**endpoint_settings(spec), cache=store.cache, spend=spend)
    raise ValueError(
        f"prompts.{role} is {dict(spec)}. Give a `model` behind a server, a `local` one, or `name: {GrammarWriter.name}`."
    )


def run_stage(
    store: BuildStore,
    stage: str,
    *,
    output: Path,
    engine: str = "local",
    num_workers: int | None = None,
    address: str | None = None,
) -> str | None:
    """
    Runs a stage of a build. What was done before is not done again.

    Args:
        store ([`BuildStore`]):
            The dataset that is being built; it is open.
        stage (`str`):
            One of `STAGES`.
        output (`Path`):
            Folder of the exported dataset.
        engine (`str`, *optional*, defaults to `"local"`), num_workers (`int`, *optional*), address (`str`, *optional*):
            See [`~generation.engines.draw_jobs`].

    Returns:
        `str`, *optional*: what was written where, if it is for users.
    """
    if stage == "prompts":
        write_prompts(store, make_writer(store))
    elif stage == "perturb":
        perturb_prompts(store, make_writer(store))
    elif stage == "render":
        render_images(store, engine=engine, num_workers=num_workers, address=address)
    elif stage == "filter":
        filter_pairs(store)
    elif stage == "export":
        return describe_export(store, output, export_dataset(store, output))
    elif stage == "stats":
        return f"Saved to {write_stats(store)}"
    return None


def describe_export(store: BuildStore, output: Path, rows: Mapping[str, int]) -> str:
    """Describes what was exported, and how many pairs are still undecided."""
    num_waiting = sum(decision.outcome == "waiting" for decision in decide_pairs(store).values())
    waiting = f"; {num_waiting:,} pairs are waiting for judges or reviewers" if num_waiting else ""
    return f"Saved to {output}: {', '.join(f'{number:,} rows in {split}' for split, number in rows.items())}{waiting}"
