"""Combines the images of several requests into batches for one model."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from ..gaussian_reward.scoring import ahead


Scores = Sequence[tuple[float, float]]
Row = tuple[str, Any, "Future[tuple[float, float]]"]  # prompt, image, and mean and standard deviation of the score


class QueueFullError(RuntimeError):
    """There is no room for more images now."""


@dataclass
class Counts:
    """
    What a [`Batcher`] has done since it was made: `images` with a score, `failures`, scored `batches`, and the
    `seconds` that they took.
    """

    images: int = 0
    failures: int = 0
    batches: int = 0
    seconds: float = 0.0

    @property
    def seconds_per_image(self) -> float | None:
        """Mean time of an image, or `None` before the first one."""
        num_images = self.images + self.failures
        return self.seconds / num_images if num_images else None


class Batcher:
    """
    A queue of images and one thread that scores them, so that a model that is not thread-safe serves many requests. The thread
    takes what is waiting, at most `max_batch_size` images, and never waits for more: a single request is answered at once, and
    those that arrive meanwhile share the next batch. If that is full while the one before is being scored, it is prepared meanwhile.

    `prepare` takes prompts and images and returns what `score` takes, which returns mean and standard deviation of each. Both are
    called for one batch at a time. At most `max_queue` images wait.
    """

    def __init__(
        self,
        prepare: Callable[[list[str], list[Any]], Any],
        score: Callable[[Any], Scores],
        *,
        max_batch_size: int = 16,
        max_queue: int = 256,
    ):
        for name, value in (("max_batch_size", max_batch_size), ("max_queue", max_queue)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        self._prepare, self._score = prepare, score
        self.max_batch_size = max_batch_size
        self.max_queue = max_queue
        self.counts = Counts()
        self._waiting: deque[Row] = deque()
        self._num_batches = 0  # batches being prepared or scored
        self._ahead: list[Row] = []  # rows of batches that were taken from the queue and are not being scored yet
        self._changed = threading.Condition()
        self.is_closed = False  # whether it accepts no more images
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Number of images that wait."""
        return len(self._waiting) + sum(not row[2].cancelled() for row in self._ahead)

    def submit(self, prompts: list[str], images: list[Any]) -> list[Future[tuple[float, float]]]:
        """
        Adds images to the queue, all of them or none. Each future gives mean and standard deviation, or the error that scoring the
        image raised.

        Raises:
            [`QueueFullError`]: If they do not fit.
            `RuntimeError`: If the batcher is closed.
        """
        futures: list[Future[tuple[float, float]]] = [Future() for _ in prompts]
        with self._changed:
            if self.is_closed:
                raise RuntimeError("The batcher is closed.")
            if self.num_waiting + len(prompts) > self.max_queue:
                raise QueueFullError(f"{self.num_waiting} images are waiting, of at most {self.max_queue}.")
            self._waiting.extend(zip(prompts, images, futures, strict=True))
            self._changed.notify()
        return futures

    def cancel(self, futures: Iterable[Future[tuple[float, float]]]) -> None:
        """Removes images that are no longer wanted from the queue. A batch that is being scored is not stopped."""
        with self._changed:
            for future in futures:
                future.cancel()
            self._waiting = deque(row for row in self._waiting if not row[2].cancelled())

    def close(self, timeout: float | None = None) -> None:
        """Takes no more images, and returns when those that wait are scored, or after `timeout` seconds."""
        with self._changed:
            self.is_closed = True
            self._changed.notify()
        self._thread.join(timeout)

    def _work(self) -> None:
        for rows, prepared in ahead(self._batches()):
            with self._changed:
                del self._ahead[: len(rows)]
            wanted = [row for row in rows if row[2].set_running_or_notify_cancel()]
            if wanted:
                self._score_rows(wanted, prepared if len(wanted) == len(rows) else self._try_to_prepare(wanted))
            with self._changed:
                self._num_batches -= 1
                self._changed.notify()

    def _batches(self) -> Iterator[tuple[list[Row], Any]]:
        """Yields batches of waiting rows, each with the prepared batch or the error that preparing it raised."""
        while True:
            with self._changed:
                self._changed.wait_for(self._is_time)
                if not self._waiting:
                    return
                rows = [self._waiting.popleft() for _ in range(min(self.max_batch_size, len(self._waiting)))]
                self._num_batches += 1
                self._ahead += rows
            yield rows, self._try_to_prepare(rows)

    def _is_time(self) -> bool:
        """
        Whether to take a batch: a full one at any time; a partial one, or none at all on closing, only when idle.
        """
        is_idle = self._num_batches == 0
        return len(self._waiting) >= self.max_batch_size or (is_idle and (bool(self._waiting) or self.is_closed))

    def _try_to_prepare(self, rows: list[Row]) -> Any:
        try:
            return self._prepare([row[0] for row in rows], [row[1] for row in rows])
        except Exception as error:
            return error

    def _score_rows(self, rows: list[Row], prepared: Any) -> None:
        start = time.perf_counter()
        try:
            if isinstance(prepared, Exception):
                raise prepared
            scores = self._score(prepared)
        except Exception as error:
            self._count(start)
            if len(rows) == 1:
                self.counts.failures += 1
                rows[0][2].set_exception(error)
                return
            # score each row alone, so that one bad image does not cost the others their scores
            for row in rows:
                self._score_rows([row], self._try_to_prepare([row]))
            return
        self._count(start)
        self.counts.images += len(rows)
        for (_, _, future), score in zip(rows, scores, strict=True):
            future.set_result(score)

    def _count(self, start: float) -> None:
        self.counts.batches += 1
        self.counts.seconds += time.perf_counter() - start
