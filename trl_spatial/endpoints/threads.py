"""Runs a function for many items on threads, such that stopping loses no finished result."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

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
        items (`Iterable`), num_threads (`int`):
            The items, and the number of threads.
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
        with _Interrupts() as interrupts:
            while True:
                try:
                    if end is None:
                        # queue twice as many items as threads, so that no thread is idle while the caller is busy
                        for index, item in islice(numbered, 2 * num_threads - len(running)):
                            running[pool.submit(function, item)] = index
                    with interrupts.let_through():
                        done, _ = wait(running, return_when=FIRST_COMPLETED)
                    if not running:
                        break
                except KeyboardInterrupt as error:
                    if end is not None:
                        is_abandoned = True
                        raise
                    end = error
                    stop()
                    continue
                for future in done:
                    index, failure = running.pop(future), _failure_of(future)
                    if _ends_all(failure):
                        if end is None:
                            end = failure
                            stop()
                    elif not isinstance(failure, Stopped):
                        yield index, failure if isinstance(failure, Exception) else future.result()
        if end is not None:
            raise end
    finally:
        if running:  # the caller wants no more
            stop()
        pool.shutdown(wait=not is_abandoned)
        if (running or end is not None) and not is_abandoned:
            stopping.clear()


def _failure_of(future: Future) -> BaseException | None:
    return Stopped("It was not begun.") if future.cancelled() else future.exception()


class _Interrupts:
    """
    Context that holds back Ctrl-C until the next [`~_Interrupts.let_through`], so that a result that the caller is storing is not
    lost. A second Ctrl-C is raised at once. Does nothing outside of the main thread, or where SIGINT has another handler.
    """

    def __init__(self) -> None:
        self._is_held = False
        self._raises = False

    def __enter__(self) -> "_Interrupts":
        is_main = threading.current_thread() is threading.main_thread()
        self._is_installed = is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._is_installed:
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self._raises = True
        if self._is_installed and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)

    @contextmanager
    def let_through(self) -> Iterator[None]:
        """Context in which Ctrl-C is raised; one that was held back is raised first."""
        self._raises = True
        try:
            if self._is_held:
                self._is_held = False
                raise KeyboardInterrupt
            yield
        finally:
            self._raises = False

    def _handle(self, number: int, frame: Any) -> None:
        if self._raises or self._is_held:
            raise KeyboardInterrupt
        self._is_held = True


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[tuple[int, Result | Exception]]:
    """Like [`map_on_threads`], but one item after another on the caller's thread."""
    for index, item in enumerate(items):
        try:
            result: Result | Exception = function(item)
        except Exception as error:
            result = error
        yield index, result


def _ends_all(failure: BaseException | None) -> bool:
    return isinstance(failure, BudgetReached) or (isinstance(failure, ServerError) and failure.is_final)
