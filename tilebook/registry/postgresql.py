"""Whether a PostgreSQL server answers, asked before a driver asks it that waits for two seconds at least."""

from __future__ import annotations

import os
import socket
import struct
import time

from tilebook.registry.target import Unreachable

_PORT = 5432
_SSL_REQUEST = struct.pack(">II", 8, 80877103)  # every server says one letter to it, before anything else


def demand_answer(label: str, host: str | None, port: str | int | None, wait_s: float) -> None:
    """Raises Unreachable where the server says nothing within `wait_s`; where it is known by other means than a host
    and a port, nothing is asked."""
    host = host or os.environ.get("PGHOST")
    try:
        number = int(port or os.environ.get("PGPORT") or _PORT)
    except ValueError:
        return
    if not host or "," in host:
        return
    deadline = time.monotonic() + wait_s
    try:
        with _connected(host, number, wait_s) as connection:
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            connection.sendall(_SSL_REQUEST)
            if connection.recv(1):
                return
    except TimeoutError:
        raise Unreachable(f"registry {label} does not answer within {wait_s:g} s") from None
    except OSError as error:
        raise Unreachable(f"registry {label} cannot be reached: {error.strerror or error}") from error
    raise Unreachable(f"registry {label} cannot be reached: the server closed the connection")


def _connected(host: str, port: int, wait_s: float) -> socket.socket:
    if not host.startswith("/"):
        return socket.create_connection((host, port), wait_s)
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(wait_s)
    try:
        connection.connect(f"{host}/.s.PGSQL.{port}")
    except BaseException:
        connection.close()
        raise
    return connection
