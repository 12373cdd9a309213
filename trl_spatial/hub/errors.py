"""Turns errors of the Hub into messages that say what to do, and retries calls."""

import errno
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging


logger = logging.get_logger(__name__)
T = TypeVar("T")

LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token from the settings of your account on the Hub."
# Disk, quota or file size limit exceeded, by a download or by the conversion of a dataset.
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_TRANSIENT = {408, 429, 500, 502, 503, 504}
_MAX_TRIES, _LONGEST_WAIT = 6, 300.0


class HubError(OSError):
    """A call to the Hub failed. The message says which one, why, and what to do."""


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an error, or `None` if there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def is_connection_error(error: BaseException) -> bool:
    """Whether the Hub was not reached at all."""
    return isinstance(error, (ConnectionError, OfflineModeIsEnabled)) or (
        isinstance(error, HTTPError) and status_of(error) is None
    )


@contextmanager
def explain_errors(action: str) -> Iterator[None]:
    """
    Turns the Hub's errors into a [`HubError`] that says what to do; others get a note of what failed. `action` is for the
    message: `"Uploading to org/name"`.
    """
    try:
        yield
    except HubError:
        raise
    except (HTTPError, LocalTokenNotFoundError, LocalEntryNotFoundError, ConnectionError) as error:
        status = status_of(error)
        code = "" if status is None else f" (HTTP {status})"
        raise HubError(f"{action} failed{code}: {_advice(error)}") from error
    except Exception as error:
        if not isinstance(error, OSError) or not _is_full(error):
            error.add_note(f"{action} failed.")
            raise
        raise HubError(
            f"{action} failed: there is no space left on the disk ({error}). Free some, or set HF_HOME to a folder on a "
            "larger one. Finished files are kept; run the same command again to continue."
        ) from error


def call_with_retries(function: Callable[..., T], *args: Any, has_fallback: bool = False, **kwargs: Any) -> T:
    """
    Calls a function, which may be called again after a failure, with these arguments. If the Hub is busy or the connection breaks,
    calls it again after the time that the Hub asks for (`Retry-After`), or after 1, 2, 4, … seconds; raises its last error. A caller
    that can do without an answer (`has_fallback`) does not wait for a Hub that cannot be reached.
    """
    for number in range(1, _MAX_TRIES + 1):
        try:
            return function(*args, **kwargs)
        except (HTTPError, ConnectionError, LocalEntryNotFoundError) as caught:
            # for a file missing from the cache, the cause is the Hub's own error
            error = caught.__cause__ if isinstance(caught, LocalEntryNotFoundError) and caught.__cause__ else caught
            is_transient = status_of(error) in _TRANSIENT or (
                is_connection_error(error) and not isinstance(error, OfflineModeIsEnabled) and not has_fallback
            )
            if number == _MAX_TRIES or not is_transient:
                raise
            asked = _retry_after(error)
            wait = 2.0 ** (number - 1) if asked is None else asked
            if wait > _LONGEST_WAIT:
                raise
            logger.warning(
                f"The Hub did not accept the request ({status_of(error) or error}). Next try in {wait:g} s."
            )
            time.sleep(wait)
    raise AssertionError("unreachable")


def _retry_after(error: BaseException) -> float | None:
    headers = getattr(getattr(error, "response", None), "headers", {})
    value = headers.get("Retry-After", "")
    return float(value) if value.isdigit() else None


def _is_full(error: BaseException) -> bool:
    # datasets wraps the original error, or checks the free space first and raises its own
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    return any(
        getattr(cause, "errno", None) in _FULL or str(cause).startswith("Not enough disk space") for cause in causes
    )


def _advice(error: BaseException) -> str:
    status = status_of(error)
    if isinstance(error, LocalTokenNotFoundError):
        return f"you are not logged in. {LOG_IN}"
    if isinstance(error, GatedRepoError):
        return "it is gated. Request access on its page with the account that your token belongs to."
    if isinstance(error, RevisionNotFoundError):
        return "it has no such revision. After the @ comes a branch, a tag or a commit."
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no such repository, or your token has no access to it. {LOG_IN}"
    if status == 401:
        return f"the Hub does not know your token. {LOG_IN}"
    if status == 403:
        return (
            "your token may not do this. Use a token with the role `write`, and a namespace that you can write to "
            "(--namespace)."
        )
    if status == 429:
        wait = _retry_after(error)
        later = "" if wait is None else f"; try again in {wait:g} s"
        return f"the Hub's rate limit was reached{later}. Run the same command again to continue."
    if isinstance(error, HfHubHTTPError) and status is not None:
        return str(error).splitlines()[0]
    if isinstance(error, LocalEntryNotFoundError):
        return (
            "it is not in the cache, and the Hub cannot be reached (HF_HUB_OFFLINE is set, or there is no network). Load "
            "it once while online."
        )
    return f"the Hub cannot be reached ({error}). Run the same command again to continue."
