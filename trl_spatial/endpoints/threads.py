"""Running a function for many items on threads, so that the work can be stopped without losing what is done."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

from .answers import BudgetReached, ServerError, Stopped


Item = TypeVar("Item")
Result = TypeVar("Result")


def map_on_threads(
    function: Callable[[Item], Result], items: Iterable[Item], num_threads: int, stopping: threading.Event
) -> Iterator[tuple[int, Result | Exception]]:
    """
    See [`~endpoints.Endpoint.map`].

    Args:
        function (`Callable`):
            Called with an item. It may raise [`~endpoints.answers.Stopped`] once `stopping` is set.
        items (`Iterable`):
            The items.
        num_threads (`int`):
            Number of threads.
        stopping (`threading.Event`):
            Set while the work is being stopped.
    """
    pool = ThreadPoolExecutor(num_threads)
    running: dict[Future, int] = {}
    numbered = enumerate(items)
    end: BaseException | None = None
    is_abandoned = False

    def stop() -> None:
        stopping.set()
        for future in running:
            future.cancel()

    try:
        while True:
            try:
                if end is None:
                    # as many again wait, so that no thread is idle while the caller is busy
                    for index, item in islice(numbered, 2 * num_threads - len(running)):
                        running[pool.submit(function, item)] = index
                if not running:
                    break
                done, _ = wait(running, return_when=FIRST_COMPLETED)
            except KeyboardInterrupt as error:
                if end is not None:
                    is_abandoned = True
                    raise
                end = error
                stop()
                continue
            for future in done:
                index = running.pop(future)
                failure = None if future.cancelled() else future.exception()
                if future.cancelled() or isinstance(failure, Stopped):
                    continue
                if _ends_all(failure):
                    if end is None:
                        end = failure
                        stop()
                    continue
                yield index, failure if isinstance(failure, Exception) else future.result()
        if end is not None:
            raise end
    finally:
        stop()
        pool.shutdown(wait=not is_abandoned)
        if not is_abandoned:
            stopping.clear()


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[int, Result | Exception]]:
    """As [`map_on_threads`], one item after another on the caller's thread."""
    for index, item in enumerate(items):
        try:
            result: Result | Exception = function(item)
        except Exception as error:
            result = error
        yield index, result


def _ends_all(failure: BaseException | None) -> bool:
    return isinstance(failure, BudgetReached) or (isinstance(failure, ServerError) and failure.is_final)
