"""Estimates the remaining work of an evaluation of images, and its cost."""

from collections.abc import Sequence
from typing import Any

from ..endpoints import Prices
from ..endpoints.spending import CHARACTERS_PER_TOKEN, TOKENS_PER_IMAGE
from ..generation.engines import estimate
from .benchmarks.base import Protocol, Question, images_of
from .image_run import ImageRun
from .judging import answered


_OUTPUT_TOKENS = 200  # assumed for a text answer of unlimited length


def estimate_run(run: ImageRun, protocols: Sequence[Protocol], prices: Prices | None = None) -> dict[str, Any]:
    """
    Estimates the remaining work, without loading or asking a model. Assumes that every image can be drawn, and that no
    question is asked again.

    Args:
        run ([`~evaluation.image_run.ImageRun`]):
            The run, prepared.
        protocols (`Sequence[str]`):
            `"official"`, `"fixed"` or both.
        prices (`Prices`, *optional*):
            Prices of the vision-language model.

    Returns:
        `dict`: `prompts`; `images`, how many are to be drawn, with `gpu_hours` (on H100s) and `cost` in US dollars, `None` where they are
        unknown; `questions`, role → number; `input_tokens` and `output_tokens` of those to the vision-language model, about, and
        their `judge_cost`.
    """
    done = answered(run.answers)
    numbers: dict[str, Any] = {"prompts": len(run.items), "images": 0, "gpu_hours": 0.0, "cost": 0.0}
    if run.plan.generator is not None:
        numbers |= estimate(run.plan.generator, len(run.missing_jobs()))
    questions = {role: 0 for role in run.plan.judges if role in ("vision", "detector", "second_detector")}
    tokens = {"input_tokens": 0, "output_tokens": 0}
    for item, number in images_of(run.items, run.benchmark.num_images):
        file = run.benchmark.image_path(item, number)
        asked = {q.key: q for protocol in protocols for q in run.benchmark.questions(item, protocol)}
        for question in asked.values():
            if (item.id, file, question.key) in done:
                continue
            questions[_role_of(question)] += question.num_replies
            if question.kind != "boxes":
                length = TOKENS_PER_IMAGE + len(question.text) // CHARACTERS_PER_TOKEN
                tokens["input_tokens"] += question.num_replies * length
                answer = 1 if question.kind == "probabilities" else question.options.get("max_tokens", _OUTPUT_TOKENS)
                tokens["output_tokens"] += question.num_replies * answer
    judge_cost = None if prices is None else prices.of_tokens(tokens["input_tokens"], tokens["output_tokens"])
    return {**numbers, "questions": questions, **tokens, "judge_cost": judge_cost}


def _role_of(question: Question) -> str:
    if question.kind != "boxes":
        return "vision"
    return "second_detector" if question.options.get("detector") == "second" else "detector"


def describe_estimate(numbers: dict[str, Any]) -> str:
    """The estimate as lines of text."""
    lines = [f"{numbers['prompts']:,} prompts", f"{numbers['images']:,} images to draw"]
    if numbers["images"]:
        hours, cost = numbers["gpu_hours"], numbers["cost"]
        lines[-1] += (
            ", GPU hours not known" if hours is None else f", about {hours:,.1f} GPU hours (H100)" if hours else ""
        )
        lines[-1] += ", price not known" if cost is None else f", {cost:,.2f} US dollars" if cost else ""
    for role, number in numbers["questions"].items():
        lines.append(f"{number:,} questions to --{role}")
        if role == "vision" and number:
            cost = numbers["judge_cost"]
            lines[-1] += f", about {numbers['input_tokens']:,} tokens in and {numbers['output_tokens']:,} out"
            lines[-1] += "" if cost is None else f", {cost:,.2f} US dollars"
    return "\n".join(lines)
