"""What the tests of the benchmarks of yes/no questions share."""

from collections.abc import Callable, Sequence
from typing import Any

from trl_spatial.evaluation.benchmarks.base import Benchmark, Evidence, Item, Protocol, Question


def answer_all(
    benchmark: Benchmark, items: Sequence[Item], protocol: Protocol, answer: Callable[[Question], Any]
) -> Evidence:
    """Evidence of a whole pass: every image is there, and every question is answered by a function."""
    files = {item.id: [benchmark.image_path(item, number) for number in range(benchmark.num_images)] for item in items}
    images = {(id, number): file for id, paths in files.items() for number, file in enumerate(paths)}
    replies = {
        (item.id, number, question.key): [answer(question)]
        for item in items
        for number in range(benchmark.num_images)
        for question in benchmark.questions(item, protocol)
    }
    return Evidence(images, replies)
