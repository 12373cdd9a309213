"""Reads the images that servers send, and recognizes refusals on grounds of content policy."""

import base64
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import requests

from ..preferences.images import open_image
from .sending import Failure, parse_retry_after


_LARGEST_FILE = 64 * 2**20  # bytes per image
_REFUSING = (400, 403, 422, 451)
# Words for a content policy in the errors of OpenAI, Azure, Seedream, Gemini and others.
_POLICY_WORDS = (
    "content_policy", "content policy", "content_filter", "content management policy", "moderation", "safety", "nsfw",
    "sensitivecontent", "sensitive content", "prohibited",
)  # fmt: skip


def is_policy_refusal(failure: Failure) -> bool:
    """Whether a server rejects a request because of its content."""
    said = f"{failure.code} {failure.message}".lower()
    return failure.status in _REFUSING and any(word in said for word in _POLICY_WORDS)


def is_flagged(answer: Mapping[str, Any], row: Mapping[str, Any]) -> bool:
    """Whether an answer, or its row of the image, marks the image as not safe for work."""
    for name, value in [*answer.items(), *row.items()]:
        if "nsfw" in name.lower() and (any(value) if isinstance(value, list) else value is True):
            return True
        results = value.values() if name == "content_filter_results" and isinstance(value, Mapping) else ()  # Azure
        if any(isinstance(result, Mapping) and result.get("filtered") is True for result in results):
            return True
    return False


def decode_picture(encoded: Any) -> bytes:
    """
    Bytes of an image file in Base64, perhaps as a data URL.

    Raises:
        [`~endpoints.sending.Failure`]: If it is not Base64, or not an image.
    """
    try:
        data = base64.b64decode(str(encoded).rpartition(",")[2], validate=True)
    except ValueError:
        raise Failure("it is no Base64") from None
    return _check_picture(data)


def download(url: str, address: str, timeout_s: float) -> bytes:
    """
    Downloads an image file that a server names instead of sending it.

    Args:
        url (`str`):
            Where it is: over https, or at the server itself. Redirects are not followed.
        address (`str`):
            Address of the server.
        timeout_s (`float`):
            Seconds to wait for a part of it.

    Raises:
        [`~endpoints.sending.Failure`]: If the URL is elsewhere, nothing arrives, or the file is too large or not an
            image.
    """
    place, server = urlsplit(url), urlsplit(address)
    if place.scheme != "https" and (place.scheme, place.netloc) != (server.scheme, server.netloc):
        raise Failure(f"it is at {place.scheme}://{place.hostname}, neither over https nor at the server itself", 403)
    data = bytearray()
    try:
        # without an `auth`, requests would send a password from ~/.netrc
        with requests.get(
            url, auth=lambda request: request, timeout=timeout_s, allow_redirects=False, stream=True
        ) as response:
            if response.status_code != 200:
                raise Failure(
                    f"{place.hostname} answers {response.status_code}",
                    response.status_code,
                    retry_after=parse_retry_after(response.headers),
                )
            for chunk in response.iter_content(2**16):
                data += chunk
                if len(data) > _LARGEST_FILE:
                    raise Failure(f"it has more than {_LARGEST_FILE // 2**20} MiB", 413)
            # requests does not notice a truncated body
            if (size := response.headers.get("Content-Length", "")).isdigit() and response.raw.tell() < int(size):
                raise Failure(f"{place.hostname} closed the connection")
    except requests.RequestException as error:
        raise Failure(f"{place.hostname} sends nothing ({type(error).__name__})") from None
    return _check_picture(bytes(data))


def _check_picture(data: bytes) -> bytes:
    try:
        open_image(data)
    except ValueError as error:
        raise Failure(f"what came, {len(data)} bytes, {error}", 415) from None
    return data
