"""Limits the memory that requests hold, and the time that a body may take to arrive."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import Request

from .limits import Limits


BODY_TIMEOUT = 10.0  # seconds for the body of a request ...
MIN_BODY_RATE = 64 * 2**10  # ... plus one second for every this many bytes received


class Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, **headers: str):
        super().__init__(message)
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}


class Hold:
    """Memory that one request occupies."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.start = asyncio.get_running_loop().time()
        self.timeout: asyncio.Timeout | None = None  # set while the body arrives
        self.is_evicted = False

    def rate(self, now: float) -> float:
        """Bytes per second of a body so far, biased in favor of one that has just begun."""
        return (self.num_bytes + 2**18) / (now - self.start + 0.1)


class Intake:
    """Reads the bodies of requests and counts what all of them hold. Everything here runs in the event loop."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.num_bytes = 0
        self._arriving: set[Hold] = set()

    @contextmanager
    def hold(self) -> Iterator[Hold]:
        """Counts what is added to the hold until the end of the `with` block."""
        hold = Hold()
        try:
            yield hold
        finally:
            self._release(hold)

    def add(self, hold: Hold, num_bytes: int) -> None:
        """
        Counts more bytes. If they do not fit, the bodies that arrive most slowly are given up first. Refuses with 503 if there is no
        room, with 413 if there never will be.
        """
        if hold.num_bytes + num_bytes > self.limits.max_held_bytes:
            raise Refusal(413, "Together, the images have too many pixels: send fewer at a time.")
        now = asyncio.get_running_loop().time()
        while self.num_bytes + num_bytes > self.limits.max_held_bytes:
            slowest = min(self._arriving, key=lambda other: other.rate(now), default=hold)
            if slowest is hold:
                raise _no_room()
            slowest.is_evicted = True
            assert slowest.timeout is not None
            if not slowest.timeout.expired():  # a moment ago, and its request does not know yet
                slowest.timeout.reschedule(now)
            self._arriving.remove(slowest)
            self._release(slowest)
        hold.num_bytes += num_bytes
        self.num_bytes += num_bytes

    async def read_body(self, request: Request, hold: Hold) -> bytearray:
        """
        Reads a body, which must arrive within `BODY_TIMEOUT` and at `MIN_BODY_RATE`.

        Raises:
            [`Refusal`]: With 408 if it does not, 413 if it is too large, 503 if there is no room for it.
            `ClientDisconnect`: If the client hangs up.
        """
        too_large = Refusal(
            413, f"The request is larger than {self.limits.max_bytes} bytes. Send fewer images at a time."
        )
        length = request.headers.get("Content-Length", "0")
        if length.isdigit() and int(length) > self.limits.max_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout_at(hold.start + BODY_TIMEOUT) as hold.timeout:
                self._arriving.add(hold)
                async for chunk in request.stream():
                    if hold.is_evicted:
                        raise _no_room()
                    if len(body) + len(chunk) > self.limits.max_bytes:
                        raise too_large
                    self.add(hold, len(chunk))
                    body += chunk
                    hold.timeout.reschedule(hold.start + BODY_TIMEOUT + len(body) / MIN_BODY_RATE)
        except TimeoutError:
            if hold.is_evicted:
                raise _no_room() from None
            raise Refusal(408, f"Only {len(body)} bytes of the request arrived in time.", Connection="close") from None
        finally:
            self._arriving.discard(hold)
        return body

    def _release(self, hold: Hold) -> None:
        self.num_bytes -= hold.num_bytes
        hold.num_bytes = 0


def _no_room() -> Refusal:
    return Refusal(
        503, "The server holds as many images as it can: try again later.", Retry_After="1", Connection="close"
    )
