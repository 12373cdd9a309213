"""The stages prompts and perturb: writing prompts, and changing some of their relations."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from .build_store import BuildStore, Quota
from .drafts import Draft, Dropped, graph_of, operation_record, relation_record
from .duplicates import DuplicateFinder
from .writers import Order, Writer, scene_weights


CHUNK = 32  # orders recorded at once
ATTEMPTS = 4
MIN_ACCEPTED = 0.2  # share of the orders; a lower one means that something is wrong


def write_prompts(store: BuildStore, writer: Writer, *, progress: bool = True) -> None:
    """
    Writes the prompts that are missing.

    Args:
        store ([`BuildStore`]):
            Where they are recorded.
        writer ([`~data.building.writers.Writer`]):
            Who writes them.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Raises:
        `ValueError`: If most of what the writer writes has to be dropped.
    """
    wanted = store.recipe.prompts.num_prompts
    finder, num_accepted = DuplicateFinder(), 0
    done: set[str] = set()
    for record in store.prompts:
        done.add(record["id"])
        if "dropped" not in record:
            finder.add(record)
            num_accepted += 1
    orders = (order for order in iterate_orders(store) if order.id not in done)
    num_records = len(done)
    with tqdm(total=wanted, initial=num_accepted, desc="Prompts", unit="prompt", disable=not progress) as bar:
        while num_accepted < wanted:
            if num_records >= 100 and num_accepted < MIN_ACCEPTED * num_records:
                raise ValueError(
                    f"Of {num_records} prompts {num_records - num_accepted} were dropped; `trl_spatial data status "
                    f"{store.folder}` says why. Change the writer, the scenes or the numbers of relations, in a new store."
                )
            chunk = list(itertools.islice(orders, min(CHUNK, wanted - num_accepted)))
            records = _write_chunk(store, writer, chunk, finder)
            store.prompts.append(records)
            num_records += len(records)
            num_new = sum("dropped" not in record for record in records)
            num_accepted += num_new
            bar.update(num_new)


def iterate_orders(store: BuildStore) -> Iterator[Order]:
    """Yields orders for prompts, without end, by the quotas of the recipe; the same every time."""
    recipe = store.recipe.prompts
    quotas = (
        Quota(weights, store.rng("quota", name))
        for name, weights in (
            ("scenes", scene_weights(recipe)),
            ("num_relations", recipe.num_relations),
            ("dimensions", recipe.dimensions),
            ("levels", recipe.levels),
        )
    )
    for number, values in enumerate(zip(*quotas, strict=False)):  # quotas are infinite
        id = f"{number:06d}"
        scene, num_relations, dimension, level = values
        yield Order(id, scene, num_relations, dimension, level, store.seed_of("wording", id))


def _write_chunk(
    store: BuildStore, writer: Writer, orders: Sequence[Order], finder: DuplicateFinder
) -> list[dict[str, Any]]:
    def write(order: Order, attempt: int) -> Draft | Dropped:
        return writer.write(order, store.seed_of("prompt", order.id, attempt))

    def record_of(draft: Draft, order: Order, attempt: int) -> dict[str, Any] | Dropped:
        relations = [relation_record(*pair) for pair in zip(draft.graph.relations, draft.spans, strict=True)]
        record = {
            "id": order.id, "scene": draft.scene, "entities": [str(entity) for entity in draft.graph.entities],
            "relations": relations, "prompt": draft.prompt, "dimension": order.dimension, "level": order.level,
            "writer": draft.writer, "attempt": attempt,
        }  # fmt: skip
        duplicate = finder.add(record)
        return record if duplicate is None else Dropped(duplicate, draft.prompt)

    return _attempt(writer, orders, write, record_of)


def perturb_prompts(store: BuildStore, writer: Writer, *, progress: bool = True) -> None:
    """
    Changes relations of the prompts that have no perturbation yet.

    Args:
        store ([`BuildStore`]):
            Where they are recorded.
        writer ([`~data.building.writers.Writer`]):
            Who rewrites the prompts.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.
    """
    prompts = store.accepted_prompts()
    done = {record["id"] for record in store.edits}
    orders = [
        Order(
            id, record["scene"], len(record["relations"]), record["dimension"], record["level"],
            wording=store.seed_of("wording", id),
        )
        for id, record in prompts.items()
        if id not in done
    ]  # fmt: skip

    def edit(order: Order, attempt: int) -> tuple[Draft, list] | Dropped:
        record = prompts[order.id]
        spans = [tuple(relation["span"]) for relation in record["relations"]]
        graph = graph_of(record["entities"], record["relations"])
        draft = Draft(record["scene"], graph, record["prompt"], spans, record["writer"])
        return writer.edit(draft, order, store.seed_of("edit", order.id, attempt))

    def record_of(edited: tuple[Draft, list], order: Order, attempt: int) -> dict[str, Any] | Dropped:
        draft, operations = edited
        if draft.prompt == prompts[order.id]["prompt"]:
            return Dropped("the text did not change", draft.prompt)
        return {
            "id": order.id, "prompt": draft.prompt,
            "relations": [relation_record(*pair) for pair in zip(draft.graph.relations, draft.spans, strict=True)],
            "operations": [operation_record(operation) for operation in operations], "level": len(operations),
            "writer": draft.writer, "attempt": attempt,
        }  # fmt: skip

    with tqdm(total=len(prompts), initial=len(done), desc="Perturbations", unit="prompt", disable=not progress) as bar:
        for start in range(0, len(orders), CHUNK):
            chunk = orders[start : start + CHUNK]
            store.edits.append(_attempt(writer, chunk, edit, record_of))
            bar.update(len(chunk))


def _attempt(
    writer: Writer,
    orders: Sequence[Order],
    ask: Callable[..., Any],
    record_of: Callable[[Any, Order, int], dict[str, Any] | Dropped],
) -> list[dict[str, Any]]:
    """
    Asks for each order, retries those that fail up to `ATTEMPTS` times in all, and returns one record per order,
    sorted by id; an order that never succeeds gets the record of its last drop.
    """
    records: dict[str, dict[str, Any]] = {}
    costs = dict.fromkeys((order.id for order in orders), 0.0)
    pending = list(orders)
    for attempt in range(ATTEMPTS):
        answers = dict(writer.map(partial(ask, attempt=attempt), pending))
        failed = []
        for number, order in enumerate(pending):
            answer = answers[number]
            if isinstance(answer, BaseException):
                raise answer
            costs[order.id] += answer.cost if isinstance(answer, Draft | Dropped) else answer[0].cost
            result = answer if isinstance(answer, Dropped) else record_of(answer, order, attempt)
            if isinstance(result, Dropped):
                records[order.id] = {"id": order.id, "dropped": result.reason, "raw": result.raw}
                failed.append(order)
            else:
                records[order.id] = result
        pending = failed
    return [record | {"cost": round(costs[id], 6)} for id, record in sorted(records.items())]
