"""The server around the application: timeouts for clients, the limit on connections, and shutdown."""

import asyncio
import logging
import socket
from collections import Counter
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http import h11_impl


HEAD_TIMEOUT = 10.0  # seconds for a client to send the head of a request, or to read an answer
MAX_CONNECTIONS = 512
_BACKLOG = 256  # connections waiting to be accepted
_ROOM_DELAY = 0.02  # seconds, enough to read the head of an honest request
ANSWER_TIME = 6.0  # seconds after SIGTERM in which pending requests are answered
_GRACE = 8  # seconds after which the server ends whatever clients do; the application takes one or two more


class Connection(h11_impl.H11Protocol):
    """
    A connection that may be closed while it waits for its client. When there are too many, a new one replaces one that
    has kept the server waiting: of the client with the most such connections, the one that has waited longest.
    """

    since: float  # when it became the client's turn

    @property
    def is_waiting(self) -> bool:
        """Whether it is the client's turn: to send the head of a request, or to read an answer."""
        return self.cycle is None or self.cycle.response_complete or self.flow.write_paused

    @property
    def is_receiving(self) -> bool:
        """Whether the body of a request is on its way."""
        return not self.is_waiting and self.cycle.more_body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.since = self.loop.time()
        if len(self.connections) > MAX_CONNECTIONS:
            self.loop.call_later(_ROOM_DELAY, self._make_room)

    def _make_room(self) -> None:
        if len(self.connections) <= MAX_CONNECTIONS:
            return
        others: list[Any] = list(self.connections)
        candidates = [other for other in others if other.is_waiting] or [
            other for other in others if other.is_receiving
        ]
        counts = Counter(other.client and other.client[0] for other in candidates)
        victim = max(
            candidates, key=lambda other: (counts[other.client and other.client[0]], -other.since), default=self
        )
        self.connections.discard(victim)  # the event loop removes it only later
        victim.transport.abort()

    def on_response_complete(self) -> None:
        self.since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        self.since = self.loop.time()
        super().pause_writing()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11_impl.h11.IDLE, h11_impl.h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # an answer has already been sent
            self.transport.abort()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # the application's answer would be a second one
            self.cycle.message_event.set()

    def shutdown(self) -> None:
        if self.is_receiving or self.flow.write_paused:
            self.transport.abort()
        else:
            super().shutdown()


class Server(uvicorn.Server):
    """A server that closes connections whose client keeps it waiting, and shuts down in time."""

    async def on_tick(self, counter: int) -> bool:
        latest = asyncio.get_running_loop().time() - HEAD_TIMEOUT
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection) and connection.is_waiting and connection.since < latest:
                connection.transport.abort()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        app: Any = self.config.app
        asyncio.get_running_loop().call_later(ANSWER_TIME, app.state.endpoint.closing.set)
        await super().shutdown(sockets)


def make_server(app: FastAPI, *, host: str, port: int) -> Server:
    """
    Makes the server that `trl_spatial serve` runs for the application of [`~serving.app.create_app`]; port 0 is any free one.

    It closes a connection whose client takes more than 10 seconds to send the head of a request or to read an answer, and keeps
    at most 512. On SIGTERM it takes no more requests, gives up those that are still arriving, answers those that have arrived
    within 6 seconds (503 afterwards), and ends within 10 whatever clients do. Its log has paths without query strings.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="info",
        http=Connection,
        ws="none",
        backlog=_BACKLOG,
        h11_max_incomplete_event_size=16 * 2**10,
        timeout_graceful_shutdown=_GRACE,
    )
    logging.getLogger("uvicorn.access").addFilter(_drop_query)
    return Server(config)


def _drop_query(record: logging.LogRecord) -> bool:
    """Logging filter that cuts off query strings, which may hold a token; lets every record pass."""
    if isinstance(record.args, tuple) and len(record.args) > 2:
        client, method, path, *rest = record.args
        record.args = (client, method, str(path).partition("?")[0], *rest)
    return True
