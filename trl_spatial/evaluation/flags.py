"""Warnings about numbers of a run that mean less than they seem to."""

from ..hub.cards import Card
from .image_run import ImageRun


def find_flags(run: ImageRun, first: ImageRun | None = None) -> list[str]:
    """
    Returns warnings about numbers of a run that mean less than they seem to.

    Args:
        run ([`~evaluation.image_run.ImageRun`]):
            The run.
        first ([`~evaluation.image_run.ImageRun`], *optional*):
            The run that it is compared with.

    Returns:
        `list[str]`: Sentences; empty if there are no warnings.
    """
    flags = []
    plan, title = run.plan, run.benchmark.title
    if run.benchmark.name in plan.trained_on:
        flags.append(f"The generator was trained on {title}.")
    rewards = training_rewards(run)
    if rewards and run.benchmark.name.startswith("geneval") and any(name.startswith("geneval") for name in rewards):
        flags.append(f"The generator was trained with {title}'s own rules as the reward.")
    for role, judge in plan.judges.items():
        if any(judge == name or judge.rpartition("/")[2] == name for name in rewards):
            flags.append(
                f"The judge {judge} ({role}) was a reward in training: the gain may only reflect what this judge prefers."
            )
    if first is not None and dict(first.plan.judges) != dict(plan.judges):
        flags.append("Different judges from the first run: differences may come from them.")
    if first is not None and (first.plan.seed, first.plan.num_images) != (plan.seed, plan.num_images):
        flags.append("Different seeds or numbers of images from the first run.")
    return flags


def training_rewards(run: ImageRun) -> list[str]:
    """Names of the rewards that the generator's LoRA was trained with, as its card says; none if it has no card."""
    folder = (run.plan.generator or {}).get("lora")
    card = None if folder is None else Card.load(folder)
    settings = {} if card is None else card.values.get("settings", {})
    return [name.rpartition(" (")[0] for name in settings.get("rewards", "").split(", ") if name]


def generator_label(run: ImageRun) -> str:
    """Returns the name of the generator in reports."""
    spec = run.plan.generator
    if spec is None:
        return f"images of {run.image_folder.name}"
    name = str(spec.get("name") or spec.get("model"))
    return f"{name} + {spec['lora']}" if "lora" in spec else name
