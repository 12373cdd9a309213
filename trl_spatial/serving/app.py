"""The endpoint: what may be asked, who may ask, and what is answered."""

import asyncio
import base64
import binascii
import hmac
import html
import json
import math
import warnings
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse
from PIL import Image
from starlette.concurrency import run_in_threadpool

from .. import __version__
from ..gaussian_reward.scoring import SpatialScore
from ..preferences.images import load_image
from .batching import Batcher, QueueFullError


FORMATS = ("PNG", "JPEG", "WEBP")
# Requests whose images are being read at one time: it bounds the memory of what is not in the queue yet.
_MAX_READING = 8

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{model} · trl_spatial serve</title>
<style>body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 2rem auto; padding: 0 1rem }}
td, th {{ text-align: left; padding: .2rem 1rem .2rem 0 }} pre {{ background: #f3f3f3; padding: 1rem; overflow: auto }}</style>
</head><body><h1>{model}</h1>
<p>Scores how well images show the spatial relations of their prompts.</p>
<table>{rows}</table>
<h2>Ask it</h2>
<pre>POST /score
{{"prompts": ["a red cup to the left of a blue book"], "images": ["BASE64 OF A PNG, JPEG OR WEBP FILE"]}}</pre>
<p>It answers <code>{{"mean": [0.42], "std": [0.1], "errors": [null]}}</code>. As a reward in training:
<code>trl_spatial grpo --rewards ADDRESS_OF_THIS_PAGE</code>.</p>
</body></html>
"""


@dataclass(frozen=True)
class Limits:
    """
    What one request may hold.

    Args:
        max_images (`int`, *optional*, defaults to `64`):
            Images.
        max_image_bytes (`int`, *optional*, defaults to 8 MiB):
            Bytes of an image file.
        max_bytes (`int`, *optional*, defaults to 128 MiB):
            Bytes of the request.
        max_pixels (`int`, *optional*, defaults to 2048 × 2048):
            Pixels of an image. A small file can hold very many.
        max_prompt_length (`int`, *optional*, defaults to `4000`):
            Characters of a prompt.
    """

    max_images: int = 64
    max_image_bytes: int = 8 * 2**20
    max_bytes: int = 128 * 2**20
    max_pixels: int = 2048 * 2048
    max_prompt_length: int = 4000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")


class _Refusal(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.headers = status, headers


def create_app(
    scorer: SpatialScore,
    *,
    model_name: str,
    token: str | None = None,
    max_batch_size: int = 16,
    max_queue: int = 256,
    limits: Limits | None = None,
) -> FastAPI:
    """
    Makes the application that `trl_spatial serve` runs.

    - `POST /score` takes `{"prompts": [...], "images": [...]}`, the images as base64 of PNG, JPEG or WebP files, and answers
      `{"mean": [...], "std": [...], "errors": [...]}`. The row of an image that cannot be read or scored is `null`, with the
      reason in `errors`.
    - `GET /health` tells the state as JSON, `GET /` as a page; both without a token, but not with a wrong one.

    A request that is refused is answered with `{"error": "..."}`: 401 for the token, 413 and 422 for what it holds, 503 with
    `Retry-After` when the queue is full.

    Args:
        scorer ([`SpatialScore`]):
            Scores the images, in one thread.
        model_name (`str`):
            What the model is called, for everybody to read: no local path.
        token (`str`, *optional*):
            The bearer token that `POST /score` needs. If `None`, everybody who reaches the server may ask.
        max_batch_size (`int`, *optional*, defaults to `16`):
            Images per forward pass.
        max_queue (`int`, *optional*, defaults to `256`):
            Images that may wait.
        limits ([`Limits`], *optional*):
            What one request may hold. If `None`, the defaults.

    Returns:
        [`~fastapi.FastAPI`]: The application. When it shuts down, it scores what is waiting first.

    Raises:
        `ValueError`: If a number is not positive, or a request may hold more images than may wait.
    """
    limits = Limits() if limits is None else limits
    if limits.max_images > max_queue:
        raise ValueError(
            f"`max_images` is {limits.max_images} and `max_queue` is {max_queue}: the largest request would never fit. Raise "
            "`max_queue` or lower `max_images`."
        )

    def score(prompts: list[str], images: list[Any]) -> Sequence[tuple[float, float]]:
        scores = scorer.score(prompts, images, batch_size=max_batch_size, show_progress=False)
        return list(zip(scores.mean.tolist(), scores.std.tolist(), strict=True))

    batcher = Batcher(score, max_batch_size=max_batch_size, max_queue=max_queue)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(batcher.close)

    # no pages of FastAPI's own: they load scripts from elsewhere
    app = FastAPI(title="trl_spatial serve", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.batcher = batcher
    reading = asyncio.Semaphore(_MAX_READING)
    num_requests = 0

    def state() -> dict[str, Any]:
        counts = batcher.counts
        return {
            "status": "closing" if batcher.is_closed else "ok",
            "model": model_name,
            "version": __version__,
            "needs_token": token is not None,
            "queue": batcher.num_waiting,
            "max_queue": batcher.max_queue,
            "max_batch_size": batcher.max_batch_size,
            "max_images": limits.max_images,
            "requests": num_requests,
            "images": counts.images,
            "failures": counts.failures,
            "batches": counts.batches,
            "seconds_per_image": counts.seconds_per_image,
        }

    @app.exception_handler(_Refusal)
    async def refuse(request: Request, refusal: _Refusal) -> JSONResponse:
        return JSONResponse({"error": str(refusal)}, refusal.status, refusal.headers)

    @app.get("/health")
    async def health(request: Request) -> dict[str, Any]:
        _check_token(request, token, is_needed=False)
        return state()

    @app.get("/")
    async def page(request: Request) -> HTMLResponse:
        _check_token(request, token, is_needed=False)
        return HTMLResponse(_render_page(state()))

    @app.post("/score")
    async def score_images(request: Request) -> dict[str, list]:
        nonlocal num_requests
        _check_token(request, token, is_needed=True)
        # before anything is read: what is turned away should cost little
        if batcher.num_waiting >= batcher.max_queue:
            raise _busy(batcher)
        body = await _read_body(request, limits.max_bytes)
        async with reading:
            prompts, images, errors = await run_in_threadpool(_read_rows, body, limits)
        rows = [row for row, error in enumerate(errors) if error is None]
        try:
            futures = batcher.submit([prompts[row] for row in rows], [images[row] for row in rows])
        except QueueFullError:
            raise _busy(batcher) from None
        except RuntimeError:
            raise _Refusal(503, "The server is shutting down.", {"Retry-After": "10"}) from None
        num_requests += 1
        return await _answer(dict(zip(rows, futures, strict=True)), errors)

    return app


async def _answer(futures: dict[int, Future[tuple[float, float]]], errors: list[str | None]) -> dict[str, list]:
    answer: dict[str, list] = {"mean": [None] * len(errors), "std": [None] * len(errors), "errors": errors}
    scores = await asyncio.gather(*map(asyncio.wrap_future, futures.values()), return_exceptions=True)
    for row, score in zip(futures, scores, strict=True):
        if isinstance(score, ValueError):  # in words, about this row
            errors[row] = str(score)
        elif isinstance(score, BaseException):
            errors[row] = f"could not be scored ({type(score).__name__})"
        elif not all(map(math.isfinite, score)):
            errors[row] = "has a score that is not a finite number"
        else:
            answer["mean"][row], answer["std"][row] = score
    return answer


def _check_token(request: Request, token: str | None, *, is_needed: bool) -> None:
    given = request.headers.get("Authorization")
    if token is None or (given is None and not is_needed):
        return
    # the time of the comparison tells nothing about the token
    if given is None or not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        raise _Refusal(
            401,
            "This server needs its token: send the header `Authorization: Bearer TOKEN`.",
            {"WWW-Authenticate": "Bearer"},
        )


def _busy(batcher: Batcher) -> _Refusal:
    seconds = math.ceil(batcher.num_waiting * (batcher.counts.seconds_per_image or 0.0))
    return _Refusal(
        503, f"{batcher.num_waiting} images are waiting already: ask later.", {"Retry-After": str(min(max(seconds, 1), 60))}
    )  # fmt: skip


async def _read_body(request: Request, max_bytes: int) -> bytes:
    message = f"The request is larger than {max_bytes} bytes. Send fewer images at a time."
    length = request.headers.get("Content-Length", "0")
    if length.isdigit() and int(length) > max_bytes:
        raise _Refusal(413, message)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise _Refusal(413, message)
    return bytes(body)


def _read_rows(body: bytes, limits: Limits) -> tuple[list[str], list[Any], list[str | None]]:
    """Prompts, decoded images, and why an image is not there."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        raise _Refusal(422, "The request is not JSON.") from None
    prompts: Any
    images: Any
    prompts, images = (data.get("prompts"), data.get("images")) if isinstance(data, dict) else (None, None)
    for values in (prompts, images):
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise _Refusal(422, 'Send {"prompts": [...], "images": [...]}: two lists of strings.')
    if len(prompts) != len(images):
        raise _Refusal(422, f"There are {len(prompts)} prompts and {len(images)} images: send one prompt per image.")
    if len(images) > limits.max_images:
        raise _Refusal(413, f"There are {len(images)} images: send at most {limits.max_images} at a time.")
    for row, prompt in enumerate(prompts):
        if len(prompt) > limits.max_prompt_length:
            raise _Refusal(
                422, f"prompts[{row}] has {len(prompt)} characters: send at most {limits.max_prompt_length}."
            )
    opened: list[Any] = []
    errors: list[str | None] = []
    for row, image in enumerate(images):
        try:
            opened.append(_read_image(row, image, limits))
            errors.append(None)
        except ValueError as error:
            opened.append(None)
            errors.append(f"images[{row}] {error}")
    return prompts, opened, errors


def _read_image(row: int, text: str, limits: Limits) -> Image.Image:
    if len(text) * 3 // 4 > limits.max_image_bytes + 2:  # of padding
        raise _Refusal(413, f"images[{row}] is larger than {limits.max_image_bytes} bytes.")
    too_large = f"images[{row}] has more than {limits.max_pixels} pixels."
    try:
        data = base64.b64decode(text, validate=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # its size is looked at below
            image = Image.open(BytesIO(data), formats=FORMATS)
    except binascii.Error:
        raise ValueError("is not base64") from None
    except Image.DecompressionBombError:
        raise _Refusal(413, too_large) from None
    except Exception:  # whatever Pillow raises for what is no image
        raise ValueError(f"is no {', '.join(FORMATS)} file that can be opened") from None
    if image.width * image.height > limits.max_pixels:
        raise _Refusal(413, too_large)
    return load_image(image)


def _render_page(state: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(name.replace('_', ' '))}</th><td>{html.escape(_show(value))}</td></tr>"
        for name, value in state.items()
    )
    return _PAGE.format(model=html.escape(state["model"]), rows=rows)


def _show(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
