"""The server of the review page: hands out pairs, takes votes, and exposes nothing else."""

import hashlib
import hmac
import json
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from importlib import resources
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from .votes import ANSWERS, VERSION, ReviewItem, VoteLog


if TYPE_CHECKING:
    from fastapi import FastAPI


LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
MAX_BODY = 64 * 1024  # bytes per vote
MAX_ITEMS = 8  # items per request
_COOKIE = "review_token"
_SIDES = ("left", "right")
_INSTALL = 'Reviewing needs a server: pip install "trl-spatial[serve]"'


class ReviewDesk:
    """
    Decides what each reviewer sees next. The order of the items, and of the sides of each, differs between reviewers
    and depends only on the seed.

    Args:
        items (`Sequence[ReviewItem]`):
            The items to be judged.
        votes ([`VoteLog`]):
            Where votes are kept.
        votes_per_item (`int`):
            Number of reviewers who see an item; items with a known answer are seen by all.
        seed (`int`):
            Seed of the orders.
    """

    def __init__(self, items: Sequence[ReviewItem], votes: VoteLog, votes_per_item: int, seed: int):
        self.items = {item.id: item for item in items}
        self.votes, self.votes_per_item, self.seed = votes, votes_per_item, seed
        self._orders: dict[str, list[str]] = {}

    def order_of_sides(self, reviewer: str, item: str) -> list[str]:
        """The sides of an item from left to right."""
        sides = ["original", "edited"]
        return sides if self._draw(reviewer, item, "sides")[0] % 2 else sides[::-1]

    def next_items(self, reviewer: str, number: int) -> list[ReviewItem]:
        """The next items for a reviewer."""
        found: list[ReviewItem] = []
        for item in self._open_items(reviewer):
            found.append(item)
            if len(found) == number:
                break
        return found

    def progress(self, reviewer: str) -> dict[str, int]:
        """How many items a reviewer has done, and how many are left."""
        done = sum(1 for item, name in self.votes.current() if name == reviewer and item in self.items)
        return {"done": done, "left": len(self._open_items(reviewer))}

    def _open_items(self, reviewer: str) -> list[ReviewItem]:
        votes = self.votes.current()
        counts = Counter(item for item, _ in votes)
        if reviewer not in self._orders:
            self._orders[reviewer] = sorted(self.items, key=lambda item: self._draw(reviewer, item, "order"))
        return [
            self.items[item]
            for item in self._orders[reviewer]
            if (item, reviewer) not in votes
            and (counts[item] < self.votes_per_item or self.items[item].gold is not None)
        ]

    def _draw(self, *path: str) -> bytes:
        return hashlib.blake2b(json.dumps([self.seed, *path]).encode(), digest_size=8).digest()


def make_vote(content: Any, desk: ReviewDesk, reviewer: str) -> dict[str, Any]:
    """
    Makes a vote from what the page sent.

    Args:
        content (`Any`):
            The JSON value.
        desk ([`ReviewDesk`]):
            Knows the items.
        reviewer (`str`):
            Who sent it.

    Raises:
        `ValueError`: If it is not a vote on one of the items.
    """
    if not isinstance(content, Mapping):
        raise ValueError("A vote is a JSON object.")
    vote_id, item, answer = content.get("id"), content.get("item"), content.get("answer")
    if not isinstance(vote_id, str) or not 8 <= len(vote_id) <= 64:
        raise ValueError("`id` should be a string of 8 to 64 characters.")
    if not isinstance(item, str) or item not in desk.items:
        raise ValueError("`item` is not one of the items here.")
    if answer is not None and answer not in ANSWERS:
        raise ValueError(f"`answer` should be one of {', '.join(ANSWERS)}, or null to take a vote back.")
    milliseconds, ticks = content.get("milliseconds", 0), content.get("ticks", {})
    if isinstance(milliseconds, bool) or not isinstance(milliseconds, int) or not 0 <= milliseconds < 10**10:
        raise ValueError("`milliseconds` should be a whole number that is not negative.")
    number = len(desk.items[item].relations)
    names = {str(relation) for relation in range(number)}
    if not isinstance(ticks, Mapping) or not all(
        key in names and isinstance(sides, Mapping) and sides.keys() <= set(_SIDES)
        and all(isinstance(value, bool) for value in sides.values())
        for key, sides in ticks.items()
    ):  # fmt: skip
        raise ValueError("`ticks` should map numbers of relations to {'left': true or false, 'right': ...}.")
    return {
        "id": vote_id, "item": item, "reviewer": reviewer, "answer": answer,
        "order": desk.order_of_sides(reviewer, item), "ticks": ticks, "milliseconds": milliseconds,
        "version": VERSION, "time": datetime.now().astimezone().isoformat(timespec="seconds"),
    }  # fmt: skip


def create_review_app(
    items: Sequence[ReviewItem],
    votes: VoteLog,
    *,
    reviewers: Mapping[str, str],
    votes_per_item: int = 2,
    seed: int = 0,
    allowed_hosts: Sequence[str] = LOOPBACK,
) -> "FastAPI":
    """
    Makes the app of the review page.

    Args:
        items (`Sequence[ReviewItem]`):
            The items to be judged. Images are read when they are shown.
        votes ([`VoteLog`]):
            Where votes are kept.
        reviewers (`Mapping[str, str]`):
            Token → name of each reviewer.
        votes_per_item (`int`, *optional*, defaults to `2`):
            Number of reviewers who see an item.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the orders in which they see the items, and of the sides.
        allowed_hosts (`Sequence[str]`, *optional*):
            Names under which the server may be called: others are refused, so that no web page can reach it through a name
            of its own.

    Returns:
        `FastAPI`: the app.

    Raises:
        `ImportError`: If the extra `serve` is missing.
    """
    try:
        from fastapi import FastAPI, Request
        from fastapi.exceptions import RequestValidationError
        from fastapi.responses import JSONResponse
        from starlette.exceptions import HTTPException
        from starlette.middleware.trustedhost import TrustedHostMiddleware
    except ImportError as error:
        raise ImportError(_INSTALL) from error

    app = FastAPI(title="Review", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts))

    @app.exception_handler(HTTPException)
    async def show_error(request: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": error.detail}, error.status_code)

    @app.exception_handler(RequestValidationError)
    async def show_fault(request: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse({"error": "A value in the address is missing or of the wrong type."}, 422)

    def name_of(token: str | None) -> str:
        for known, name in reviewers.items():
            if token is not None and hmac.compare_digest(known.encode(), token.encode()):
                return name
        raise HTTPException(401, "Open the address with your token, as `trl_spatial data review` printed it.")

    def reviewer_of(request: Request, by: str | None = None) -> str:
        name = name_of(request.cookies.get(_COOKIE))
        # two reviewers in one browser share the cookie, which names the one who came last
        if unquote(by or request.headers.get("X-Reviewer", quote(name))) != name:
            raise HTTPException(409, f"{name} has opened the page in this browser since. Open your own address again.")
        return name

    desk = ReviewDesk(items, votes, votes_per_item, seed)
    _add_page(app, name_of)
    _add_items(app, reviewer_of, desk)
    _add_votes(app, reviewer_of, desk)
    return app


def _add_page(app: "FastAPI", name_of: Callable[[str | None], str]) -> None:
    from fastapi import Request
    from fastapi.responses import HTMLResponse, RedirectResponse, Response

    page = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")

    @app.get("/")
    async def show_page(request: Request, token: str | None = None) -> Response:
        if token is not None:  # move it to a cookie, so that it does not stay in the address bar and the history
            name_of(token)
            response = RedirectResponse("/", 303)
            response.set_cookie(_COOKIE, token, max_age=30 * 86400, httponly=True, samesite="lax")
            return response
        name, nonce = name_of(request.cookies.get(_COOKIE)), secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'nonce-{nonce}'; "
            f"script-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        content = page.replace("{{nonce}}", nonce).replace("{{reviewer}}", json.dumps(name).replace("<", "\\u003c"))
        return HTMLResponse(content, headers={"Content-Security-Policy": policy, "Cache-Control": "no-store"})


def _add_items(app: "FastAPI", reviewer_of: Callable[..., str], desk: ReviewDesk) -> None:
    from fastapi import HTTPException, Request
    from fastapi.responses import Response

    def hand_out(items: Sequence[ReviewItem], name: str) -> dict[str, Any]:
        shown = [
            {"id": item.id, "prompt": item.prompt, "spans": item.spans, "relations": item.relations} for item in items
        ]
        return {"items": shown, "progress": desk.progress(name)}

    @app.get("/api/next")
    def hand_out_next(request: Request, number: int = 3) -> dict[str, Any]:
        name = reviewer_of(request)
        return hand_out(desk.next_items(name, min(max(number, 1), MAX_ITEMS)), name)

    @app.get("/image")
    def show_image(request: Request, id: str, side: str, by: str | None = None) -> Response:
        name = reviewer_of(request, by)
        if id not in desk.items or side not in _SIDES:
            raise HTTPException(404, "There is no such image.")
        path = desk.items[id].images[desk.order_of_sides(name, id)[_SIDES.index(side)]]
        try:
            content = path.read_bytes()
        except OSError:
            raise HTTPException(404, "The file of this image is missing.") from None
        kind = "image/png" if content.startswith(b"\x89PNG") else "image/jpeg"
        headers = {"Cache-Control": "private, max-age=86400", "X-Content-Type-Options": "nosniff"}
        return Response(content, media_type=kind, headers=headers)


def _add_votes(app: "FastAPI", reviewer_of: Callable[..., str], desk: ReviewDesk) -> None:
    from fastapi import HTTPException, Request

    @app.post("/api/votes")
    async def take_vote(request: Request) -> dict[str, Any]:
        name = reviewer_of(request)
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                raise HTTPException(413, "A vote is not that large.")
        try:
            vote = make_vote(json.loads(body), desk, name)
        except (ValueError, RecursionError) as error:
            raise HTTPException(422, str(error)) from None
        desk.votes.append(vote)  # on disk before the response is sent
        return {"progress": desk.progress(name)}


def serve_review(app: "FastAPI", *, host: str = "127.0.0.1", port: int = 8765) -> None:
    """
    Serves the page until the process is told to end.

    Args:
        app (`FastAPI`):
            From [`create_review_app`].
        host (`str`, *optional*, defaults to `"127.0.0.1"`), port (`int`, *optional*, defaults to `8765`):
            Where to listen.

    Raises:
        `ImportError`: If the extra `serve` is missing.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise ImportError(_INSTALL) from error
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", access_log=False, timeout_graceful_shutdown=3,
        timeout_keep_alive=30, limit_concurrency=256,
    )  # fmt: skip
    uvicorn.Server(config).run()
