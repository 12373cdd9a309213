"""Ports for servers that are told theirs."""

import random
import socket


_RESERVED: list[socket.socket] = []


def free_port():
    """
    A port for a server of this machine, which is not given again while this process lives: neither here nor to another process
    that calls this function, nor to a connection.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)  # below those that systems hand out
        mark = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)  # of the callers, as no server here uses datagrams
        # a server may listen beside it, as servers set this option too
        place = socket.socket()
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            mark.bind(("127.0.0.1", port))
            socket.create_server(("127.0.0.1", port)).close()
            place.bind(("127.0.0.1", port))
        except OSError:
            mark.close()
            place.close()
            continue
        _RESERVED.extend((mark, place))
        return port
