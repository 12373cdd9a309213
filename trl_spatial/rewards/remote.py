"""A reward computed by a server, started with `trl_spatial serve`."""

import base64
import logging
import math
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3 import BaseHTTPResponse
from urllib3.util.retry import Retry

from ..preferences.images import load_image
from ..waiting import WaitNotices
from . import TOKEN_VARIABLE


logger = logging.getLogger(__name__)

_BUSY = (408, 429, 502, 503, 504)  # the first if this process was too busy to send a request in time
_LONGEST_WAIT = 60.0  # seconds, whatever the server asks for
_LARGEST_REQUEST = 32 * 2**20  # characters of base64, well below the 128 MiB that a server accepts


class RemoteReward:
    """
    Gets mean SpatialScores from a server: a reward function that needs no memory or time on this process's device.

    A failed request is retried, with growing pauses or after the time that the server asks for. If all attempts fail, the
    rewards of its images are `None`, never 0, and a warning says how many: training continues with the others. A server that
    does not answer is named in a warning after some seconds.

    Args:
        url (`str`):
            Address of the server, `http://HOST:PORT` or `https://...`. Over `http`, the token is sent unencrypted.
        token (`str`, *optional*):
            Token of the server.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds to wait for an answer.
        max_retries (`int`, *optional*, defaults to `5`):
            How often a request is retried if the connection breaks, no answer comes, or it is 408, 429, 502, 503 or 504.
        batch_size (`int`, *optional*, defaults to `8`):
            Images per request; fewer if they are large or the server takes fewer.
        num_connections (`int`, *optional*, defaults to `4`):
            Concurrent requests.

    Attributes:
        num_failed (`int`):
            Images that got no reward so far.

    Raises:
        `ValueError`: If the address is invalid, or a number is out of range.
        `ConnectionError`: If the server cannot be reached, is not `trl_spatial serve`, or does not accept the token.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        timeout: float = 120.0,
        max_retries: int = 5,
        batch_size: int = 8,
        num_connections: int = 4,
    ):
        for name, value, minimum in (
            ("max_retries", max_retries, 0), ("batch_size", batch_size, 1), ("num_connections", num_connections, 1),
        ):  # fmt: skip
            if value < minimum:
                raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")
        if not timeout > 0:
            raise ValueError(f"`timeout` must be positive, got {timeout}.")
        self.url = _check_url(url)
        self.timeout = timeout
        self._limit = (
            f"`RemoteReward` tries 1 + {max_retries} times (`max_retries`) for {timeout:g} s each (`timeout`)."
        )
        self._notices = WaitNotices(f"the reward server {self.url}", self._limit)
        self.batch_size = batch_size
        self.num_connections = num_connections
        self.num_failed = 0
        self.__name__ = "remote_score"  # the name in the trainers' logs
        self._session = requests.Session()

        # an auth function, because requests would replace a plain header with a password from ~/.netrc
        def authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
            if token is not None:
                request.headers["Authorization"] = f"Bearer {token}"
            return request

        self._session.auth = authorize
        retry = _Retry(
            total=max_retries,
            status_forcelist=_BUSY,
            allowed_methods=None,  # retry POST as well: scoring twice does no harm
            backoff_factor=0.5,
            raise_on_status=False,
        )
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=num_connections, max_retries=retry))
        self._check_server(token)

    def __call__(self, prompts: list[str], images: list[Any], **columns: Any) -> list[float | None]:
        """
        Rewards images with the mean of their scores, `None` where the server gave none; trainers call this. Raises a
        `ValueError` for an image that cannot be read, as a local scorer does.
        """
        with ThreadPoolExecutor(self.num_connections) as executor:
            starts = range(0, len(images), self.batch_size)
            answers = list(executor.map(partial(self._ask, prompts, images), starts))
        rewards = [reward for answer, _ in answers for reward in answer]
        num_failed = sum(reward is None for reward in rewards)
        if num_failed:
            self.num_failed += num_failed
            reason = next(reason for answer, reason in answers if None in answer)
            logger.warning(
                f"{self.url} gave no reward to {num_failed} of {len(images)} images ({self.num_failed} so far): {reason}"
            )
        return rewards

    def _ask(self, prompts: list[str], images: list[Any], start: int) -> tuple[list[float | None], str]:
        """
        Requests the rewards of the batch that begins at row `start`; returns them, and the reason if some are missing.
        """
        rows = slice(start, start + self.batch_size)
        encoded = []
        for row, image in enumerate(images[rows], start=start):
            file = BytesIO()
            try:
                # PNG keeps the pixels that a local scorer would see; better compression costs more time than it saves
                load_image(image).save(file, "PNG", compress_level=1)
            except ValueError as error:
                raise ValueError(f"images[{row}] {error}.") from error
            encoded.append(base64.b64encode(file.getvalue()).decode())
        return self._post(prompts[rows], encoded)

    def _post(self, prompts: list[str], images: list[str]) -> tuple[list[float | None], str]:
        if len(images) > 1 and sum(map(len, images)) > _LARGEST_REQUEST:
            half = len(images) // 2
            first, second = self._post(prompts[:half], images[:half]), self._post(prompts[half:], images[half:])
            return first[0] + second[0], first[1] if None in first[0] else second[1]
        failed: list[float | None] = [None] * len(images)
        body = {"prompts": prompts, "images": images}
        start = time.monotonic()
        try:
            with self._notices.request():
                response = self._session.post(
                    f"{self.url}/score", json=body, timeout=self.timeout, allow_redirects=False
                )
            if response.status_code != 200:
                return failed, _describe(response)
            answer = response.json()
        except requests.RequestException as error:
            return failed, f"{type(error).__name__}: {_cause(error)}, {self._after(start)}"
        means = answer.get("mean") if isinstance(answer, dict) else None
        if not isinstance(means, list) or len(means) != len(images) or not all(map(_is_reward, means)):
            return failed, "its answer is not a list of as many numbers as images"
        errors = answer.get("errors") or []
        return means, next((str(error) for error in errors if error), "it gives no reason")

    def _after(self, start: float) -> str:
        return f"after {time.monotonic() - start:.1f} s. {self._limit}"

    def _check_server(self, token: str | None) -> None:
        start = time.monotonic()
        try:
            with self._notices.request():
                response = self._session.get(f"{self.url}/health", timeout=self.timeout, allow_redirects=False)
        except requests.RequestException as error:
            raise ConnectionError(
                f"The reward server {self.url} cannot be reached ({_cause(error)}, {self._after(start)}) Start it, "
                "`trl_spatial serve --model MODEL`, and check address and port."
            ) from error
        if response.status_code == 401:
            raise ConnectionError(
                f"The reward server {self.url} does not know the token. Set {TOKEN_VARIABLE} to the one it was started with."
            )
        try:
            health = response.json() if response.status_code == 200 else None
        except requests.RequestException:
            health = None
        if not isinstance(health, Mapping) or "needs_token" not in health:
            raise ConnectionError(
                f"{self.url} is not a reward server: its page /health {_describe(response)}. Name the address that `trl_spatial "
                "serve` listens on."
            )
        most = health.get("max_images")
        if isinstance(most, int) and most > 0:
            self.batch_size = min(self.batch_size, most)
        if health["needs_token"] and token is None:
            raise ConnectionError(
                f"The reward server {self.url} needs a token. Set {TOKEN_VARIABLE} to the one it was started with."
            )


class _Retry(Retry):
    def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
        wait = super().get_retry_after(response)
        return None if wait is None else min(wait, _LONGEST_WAIT)


def _check_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is not a number
        is_address = False
    if not is_address or parts.query or parts.fragment:
        raise ValueError(
            f"{url!r} is not the address of a server. Write http://HOST:PORT, such as http://127.0.0.1:8000."
        )
    if parts.username is not None:
        raise ValueError(f"The address of a server holds no user and no password; its token is {TOKEN_VARIABLE}.")
    return url.rstrip("/")


def _is_reward(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value))


def _describe(response: requests.Response) -> str:
    try:
        message = str(response.json()["error"])
    except (requests.RequestException, KeyError, TypeError):
        message = response.reason or "no reason"
    return f"answers {response.status_code}, {message[:300]}"


def _cause(error: BaseException) -> str:
    """Returns the underlying reason of an error that urllib3 has wrapped."""
    reason = getattr(error.args[0], "reason", error) if error.args else error
    return str(reason or error)[:300]
