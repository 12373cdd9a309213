"""The HTTP application of the server: routes, authorization and answers."""

import asyncio
import hmac
import html
import math
import re
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from .. import __version__
from ..gaussian_reward.scoring import Batch, SpatialScore
from .batching import Batcher, QueueFullError
from .intake import Intake, Refusal
from .limits import Limits
from .rows import Row, ScoreAnswer, decode_rows, num_decoded_bytes, read_rows


# Requests whose images are decoded at the same time; limited, because conversion takes additional memory.
_MAX_DECODING = 8
_CLOSING_TIME = 1.5  # seconds for the batch being scored to finish at shutdown

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{model} · trl_spatial serve</title>
<style>body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 44rem; margin: 2rem auto; padding: 0 1rem }}
td, th {{ text-align: left; padding: .2rem 1rem .2rem 0 }} pre {{ background: #f3f3f3; padding: 1rem; overflow: auto }}</style>
</head><body><h1>{model}</h1>
<p>Scores how well images match the spatial relations in their prompts.</p>
<table>{rows}</table>
<h2>Request</h2>
<pre>POST /score
{{"prompts": ["a red cup to the left of a blue book"], "images": ["BASE64 OF A PNG, JPEG OR OTHER IMAGE FILE"]}}</pre>
<p>The answer is <code>{{"mean": [0.42], "std": [0.1], "errors": [null]}}</code>. As a reward in training:
<code>trl_spatial grpo --rewards ADDRESS_OF_THIS_PAGE</code>.</p>
</body></html>
"""


class Endpoint:
    """The request handlers of [`create_app`]. Once `closing` is set, waiting requests are answered with 503."""

    def __init__(self, batcher: Batcher, *, model_name: str, token: str | None, limits: Limits):
        self.batcher, self.model_name, self.token, self.limits = batcher, model_name, token, limits
        self.closing = asyncio.Event()
        self._intake = Intake(limits)
        self._decoding = asyncio.Semaphore(_MAX_DECODING)
        self._num_requests = 0

    def state(self) -> dict[str, Any]:
        """The state that `/health` and the page show."""
        batcher, counts = self.batcher, self.batcher.counts
        return {
            "status": "closing" if batcher.is_closed else "ok",
            "model": self.model_name,
            "version": __version__,
            "needs_token": self.token is not None,
            "queue": batcher.num_waiting,
            "max_queue": batcher.max_queue,
            "max_batch_size": batcher.max_batch_size,
            "max_images": self.limits.max_images,
            "requests": self._num_requests,
            "images": counts.images,
            "failures": counts.failures,
            "batches": counts.batches,
            "seconds_per_image": counts.seconds_per_image,
        }

    async def health(self, request: Request) -> dict[str, Any]:
        self._check_token(request, is_needed=False)
        return self.state()

    async def page(self, request: Request) -> HTMLResponse:
        self._check_token(request, is_needed=False)
        return HTMLResponse(_render_page(self.state()))

    async def score(self, request: Request) -> ScoreAnswer:
        self._check_token(request, is_needed=True)
        # before reading the body, so that a rejected request costs little
        if self.batcher.num_waiting >= self.batcher.max_queue:
            raise self._busy()
        with self._intake.hold() as hold:
            body = await self._intake.read_body(request, hold)
            async with self._decoding:
                rows = await run_in_threadpool(read_rows, body, self.limits)
                self._intake.add(hold, num_decoded_bytes(rows))
                await run_in_threadpool(decode_rows, rows)
            good = [row for row in rows if row.error is None]
            try:
                futures = self.batcher.submit([row.prompt for row in good], [row.image for row in good])
            except QueueFullError:
                raise self._busy() from None
            except RuntimeError:
                raise _closing() from None
            self._num_requests += 1
            scores = await self._wait(request, futures)
        return _make_answer(rows, scores)

    async def _wait(self, request: Request, futures: list[Future[tuple[float, float]]]) -> list[Any]:
        """
        Waits for the scores, or errors, of images; raises if the client disconnects or the server shuts down first.
        """
        scores: asyncio.Future[list[Any]] = asyncio.gather(*map(asyncio.wrap_future, futures), return_exceptions=True)
        ends: list[asyncio.Future[Any]] = [
            asyncio.create_task(_wait_for_hanging_up(request)),
            asyncio.create_task(self.closing.wait()),
        ]
        try:
            await asyncio.wait([scores, *ends], return_when=asyncio.FIRST_COMPLETED)
            if scores.done():
                return scores.result()
            raise _closing() if self.closing.is_set() else ClientDisconnect()
        finally:
            self.batcher.cancel(futures)
            for end in ends:
                end.cancel()

    def _check_token(self, request: Request, *, is_needed: bool) -> None:
        given = request.headers.get("Authorization")
        if self.token is None or (given is None and not is_needed):
            return
        # `compare_digest` takes the same time for any wrong token
        if given is None or not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            raise Refusal(
                401,
                "This server requires its token: send the header `Authorization: Bearer TOKEN`.",
                WWW_Authenticate="Bearer",
            )

    def _busy(self) -> Refusal:
        num_waiting = self.batcher.num_waiting
        seconds = math.ceil(num_waiting * (self.batcher.counts.seconds_per_image or 0.0))
        return Refusal(
            503,
            f"{num_waiting} images are already waiting: try again later.",
            Retry_After=str(min(max(seconds, 1), 60)),
        )


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

    - `POST /score` takes `{"prompts": [...], "images": [...]}`, the images as base64 of image files, and answers `{"mean":
      [...], "std": [...], "errors": [...]}`. The row of an image that cannot be read or scored, or that is beyond the
      limits of a row, is `null`, with the reason in `errors`.
    - `GET /health` gives the state as JSON, `GET /` as a page; both without a token, but not with a wrong one.

    A request that is refused is answered with `{"error": "..."}`: 401 for the token, 413 and 422 for what it holds, 408 if it
    arrives too slowly, 503 with `Retry-After` when there is no room. Images of a client that hangs up are not scored.

    Args:
        scorer ([`SpatialScore`]):
            Scores the images, in one thread; another prepares the next batch.
        model_name (`str`):
            Name of the model, which is public: no local path.
        token (`str`, *optional*):
            The bearer token that `POST /score` needs. If `None`, everybody who reaches the server may ask.
        max_batch_size (`int`, *optional*, defaults to `16`), max_queue (`int`, *optional*, defaults to `256`):
            Images per forward pass, and images that may wait.
        limits ([`Limits`], *optional*):
            Limits of requests. If `None`, the defaults.

    Raises:
        `ValueError`: If a number is not positive, or a request may hold more images than may wait.
    """
    limits = Limits() if limits is None else limits
    if limits.max_images > max_queue:
        raise ValueError(
            f"`max_images` is {limits.max_images} and `max_queue` is {max_queue}: the largest request would never fit. Raise "
            "`max_queue` or lower `max_images`."
        )

    def prepare(prompts: list[str], images: list[Any]) -> list[Batch]:
        return list(scorer.prepare(prompts, images, batch_size=max_batch_size))

    def score(batches: list[Batch]) -> Sequence[tuple[float, float]]:
        num_rows = sum(len(rows) for rows, _ in batches)
        scores = scorer.score_batches(batches, num_rows, show_progress=False)
        return list(zip(scores.mean.tolist(), scores.std.tolist(), strict=True))

    batcher = Batcher(prepare, score, max_batch_size=max_batch_size, max_queue=max_queue)
    endpoint = Endpoint(batcher, model_name=model_name, token=token, limits=limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(batcher.close, _CLOSING_TIME)

    # no documentation pages of FastAPI, which load scripts from a CDN
    app = FastAPI(title="trl_spatial serve", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.endpoint = endpoint
    app.get("/health")(endpoint.health)
    app.get("/")(endpoint.page)
    app.post("/score")(endpoint.score)

    @app.exception_handler(Refusal)
    async def refuse(request: Request, refusal: Refusal) -> JSONResponse:
        return JSONResponse({"error": str(refusal)}, refusal.status, refusal.headers)

    @app.exception_handler(ClientDisconnect)
    async def hang_up(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # nobody reads it

    return app


async def _wait_for_hanging_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _closing() -> Refusal:
    return Refusal(503, "The server is shutting down.", Retry_After="10")


def _make_answer(rows: list[Row], scores: list[Any]) -> ScoreAnswer:
    answer = ScoreAnswer(mean=[], std=[], errors=[])
    remaining = iter(scores)
    for number, row in enumerate(rows):
        mean, std, error = None, None, row.error
        if error is None:
            score = next(remaining)
            if isinstance(score, ValueError):  # its message calls this row 0, because the row was scored alone
                error = re.sub(r"(\brow |images\[|prompts\[)0\b", rf"\g<1>{number}", str(score))
            elif isinstance(score, BaseException):
                error = f"could not be scored ({type(score).__name__})"
            elif not all(map(math.isfinite, score)):
                error = "has a score that is not a finite number"
            else:
                mean, std = score
        answer.mean.append(mean)
        answer.std.append(std)
        answer.errors.append(error)
    return answer


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
