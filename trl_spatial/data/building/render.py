"""The render stage: draws both images of every pair."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...generation.engines import draw_jobs, process_state
from ...generation.jobs import DrawnImage, ImageJob
from ...generation.painters import RENDERERS
from ...generation.settings import published_family
from .build_store import BuildStore, Quota


SIDES = ("original", "edited")
FLUSH = 16  # images recorded at once


@dataclass(frozen=True)
class Pair:
    """
    Two images to be drawn: of a prompt and of its perturbation.

    Args:
        id (`str`):
            Id of the prompt and number of the draw.
        prompt (`str`):
            Id of the prompt.
        generator (`int`):
            Number of the generator in the recipe, the same for both sides.
        prompts (`dict[str, str]`):
            Side → text.
        seeds (`dict[str, int]`):
            Side → seed.
    """

    id: str
    prompt: str
    generator: int
    prompts: dict[str, str]
    seeds: dict[str, int]


def iterate_pairs(store: BuildStore) -> Iterator[Pair]:
    """Yields the pairs to be drawn, in the order of their prompts, and assigns generators by their shares."""
    recipe = store.recipe.render
    shares = {number: generator.get("share", 1) for number, generator in enumerate(recipe.generators)}
    generators = iter(Quota(shares, store.rng("quota", "generators")))
    prompts = store.accepted_prompts()
    for id, edit in store.accepted_edits().items():
        if id not in prompts:
            continue  # the prompt's record was removed; `write_prompts` writes it again
        for draw in range(recipe.draws):
            pair = f"{id}-{draw}"
            seed = store.seed_of("image", pair) >> 32  # 31 bits, the most that servers accept
            other = seed if recipe.same_seed else store.seed_of("image", pair, "edited") >> 32
            yield Pair(
                pair,
                id,
                next(generators),
                dict(zip(SIDES, (prompts[id]["prompt"], edit["prompt"]), strict=True)),
                dict(zip(SIDES, (seed, other), strict=True)),
            )


def missing_jobs(store: BuildStore) -> dict[int, list[ImageJob]]:
    """Returns number of a generator → images it has yet to draw. Refused images are not requested again."""
    done = {
        record["id"]
        for record in store.images
        if record["image"] is None or store.image_path(record["image"]).is_file()  # redraw if the file is gone
    }
    jobs = defaultdict(list)
    for pair in iterate_pairs(store):
        for side in SIDES:
            if (id := f"{pair.id}-{side}") not in done:
                jobs[pair.generator].append(ImageJob(id, pair.prompts[side], pair.seeds[side]))
    return jobs


def render_images(
    store: BuildStore,
    *,
    engine: str = "local",
    num_workers: int | None = None,
    address: str | None = None,
    progress: bool = True,
) -> None:
    """
    Draws the images that are missing, one generator after another, so that each process loads one model at a time.

    Args:
        store ([`BuildStore`]):
            Where they are recorded.
        engine (`str`, *optional*, defaults to `"local"`), num_workers (`int`, *optional*), address (`str`, *optional*), progress:
            See [`~generation.engines.draw_jobs`].

    Raises:
        `ValueError`: If a generator cannot be loaded or fails.
        [`~endpoints.BudgetReached`]: If `render.max_cost` is spent.
    """
    spend = store.spend("render")
    missing = sorted(missing_jobs(store).items())
    if engine == "local":
        process_state().wait_for_everyone()  # no process may draw before all have listed the same jobs
    for number, jobs in missing:
        drawn: list[DrawnImage] = []
        num_drawn = 0
        images = draw_jobs(
            generator_of(store, number),
            jobs,
            engine=engine,
            num_workers=num_workers,
            address=address,
            spend=spend,
            progress=progress,
        )
        try:
            for image in images:
                drawn.append(image)
                num_drawn += 1
                spend.add(image.cost)
                if len(drawn) == FLUSH:
                    _record(store, number, jobs, drawn)
                    drawn = []
        finally:  # keep what was drawn before an error or an interruption
            _record(store, number, jobs, drawn)
        if num_drawn < len(jobs):
            spend.check()


def generator_of(store: BuildStore, number: int) -> dict[str, Any]:
    """A generator of the recipe, as [`~generation.painters.make_painter`] takes it."""
    spec = store.recipe.render.generators[number]
    return {key: value for key, value in spec.items() if key not in ("share", "license")}


def license_of(store: BuildStore, number: int) -> str | None:
    """Returns the license of a generator's images: the recipe's, or else the known one of the model, or `None`."""
    spec = store.recipe.render.generators[number]
    family = published_family(spec.get("name", ""))
    if "license" in spec or family is None:
        return spec.get("license", "no terms: drawn by trl_spatial" if spec.get("name") in RENDERERS else None)
    return f"{family.licence}: {family.output_terms}"


def _record(store: BuildStore, generator: int, jobs: list[ImageJob], drawn: list[DrawnImage]) -> None:
    seeds = {job.id: job.seed for job in jobs}
    records: list[dict[str, Any]] = []
    for image in drawn:
        pair, side = image.id.rsplit("-", 1)
        records.append(
            {
                "id": image.id,
                "pair": pair,
                "side": side,
                "generator": generator,
                "seed": seeds[image.id],
                "image": None if image.png is None else store.files.put(image.png, ".png"),
                "refusal": image.refusal,
                "recipe": image.recipe,
                "seconds": round(image.seconds, 3),
                "cost": round(image.cost, 6),
            }
        )
    store.images.append(records)
