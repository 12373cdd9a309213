"""Ports for servers that are told theirs."""

import os
import random
import socket


_RANDOM = random.Random(os.getpid())
_GIVEN: set[int] = set()


def free_port():
    """A port that nothing listens at, below those that systems hand out: no connection takes it before the server does."""
    while True:
        port = _RANDOM.randrange(20_000, 32_000)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        if port not in _GIVEN:
            _GIVEN.add(port)
            return port
