"""Reports what a program is waiting for, so that it does not seem to hang."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


logger = logging.getLogger(__name__)

FIRST_NOTICE = 5.0  # seconds; the next ones come after twice as long each


class WaitNotices:
    """
    Warns when something that is waited for, such as a server's answer, has not come for some seconds, and again each time the
    wait has doubled. Concurrent requests share their notices, and every answer resets the time.

    Args:
        awaited (`str`):
            What is waited for; of a server, its name and address.
        limit (`str`):
            A sentence on how long the wait can last, and which options set that.
    """

    def __init__(self, awaited: str, limit: str):
        self._awaited, self._limit = awaited, limit
        self._lock = threading.Lock()
        self._num_open = 0  # requests
        self._heard, self._due = 0.0, FIRST_NOTICE
        self._is_watched = False

    @contextmanager
    def request(self) -> Iterator[None]:
        """Context of one request."""
        with self._lock:
            self._num_open += 1
            if self._num_open == 1:
                self._hear()
            if not self._is_watched:
                self._watch(self._due)
        try:
            yield
        finally:
            with self._lock:
                self._num_open -= 1
                self._hear()

    def _hear(self) -> None:
        self._heard, self._due = time.monotonic(), FIRST_NOTICE

    # Requests are many and short: starting a thread for each would cost too much.
    def _watch(self, seconds: float) -> None:
        self._is_watched = True
        timer = threading.Timer(seconds, self._look)
        timer.daemon = True
        timer.start()

    def _look(self) -> None:
        with self._lock:
            self._is_watched = self._num_open > 0
            if not self._is_watched:
                return
            waited = time.monotonic() - self._heard
            is_due = waited >= self._due
            while self._due <= waited:
                self._due *= 2
            self._watch(self._due - waited)
        if is_due:
            logger.warning(f"Waiting for {self._awaited}, for {waited:.0f} s so far. {self._limit}")
