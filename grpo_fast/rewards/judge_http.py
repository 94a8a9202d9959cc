"""One POST of JSON with a limit on its whole time and size, whatever the server does."""

from __future__ import annotations

import http.client
import io
import json
import socket
import ssl
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

# a judge writes a page, not a book
LARGEST_REPLY = 1 << 23


class LateError(OSError):
    """The reply was not there in time."""


@dataclass(frozen=True)
class Reply:
    """What a server answered.

    Attributes:
        status: HTTP's.
        body: As it came.
        retry_after: Seconds that the server asks to wait, if it does.
    """

    status: int
    body: bytes
    retry_after: float | None


class _Received:
    """A socket that has received all it will, as `http.client` wants one."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self._data)


def check_url(url: str, name: str) -> None:
    """Refuse what is no address of a server (ValueError)."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{name}: url must be an address like http://host:8000/v1, it is {url!r}")


def post_json(url: str, payload: dict[str, Any], headers: dict[str, str], *, timeout_s: float) -> Reply:
    """Send a request on a connection of its own and read the answer.

    Args:
        url: http or https.
        payload: The body.
        headers: Beside the usual ones.
        timeout_s: For all of it, but the look-up of the host's name.

    Raises:
        LateError: If it takes longer.
        OSError: If there is no connection, or it breaks.
        ValueError: If the answer is no whole HTTP, or larger than 8 MiB.
    """
    deadline = time.monotonic() + timeout_s
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    body = json.dumps(payload).encode()
    lines = [f"POST {parts.path or '/'}{'?' * bool(parts.query)}{parts.query} HTTP/1.1", f"Host: {parts.netloc}"]
    fields = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close", **headers}
    head = "\r\n".join([*lines, *(f"{key}: {value}" for key, value in fields.items()), "", ""])
    try:
        with socket.create_connection((parts.hostname or "", port), timeout=timeout_s) as plain:
            if parts.scheme == "http":
                return _exchange(plain, head.encode() + body, deadline)
            context = ssl.create_default_context()
            with context.wrap_socket(plain, server_hostname=parts.hostname) as secure:
                return _exchange(secure, head.encode() + body, deadline)
    except TimeoutError as error:
        raise LateError(f"no reply in {timeout_s:g} s") from error


def _exchange(connection: socket.socket, request: bytes, deadline: float) -> Reply:
    connection.settimeout(_left(deadline))
    connection.sendall(request)
    received, size = bytearray(), 0
    while not _is_whole(received):
        connection.settimeout(_left(deadline))
        part = connection.recv(65536)
        if not part:
            break
        received += part
        size += len(part)
        if size > LARGEST_REPLY:
            raise ValueError(f"the reply is larger than {LARGEST_REPLY} bytes")
    return _parsed(bytes(received))


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _is_whole(received: bytearray) -> bool:
    """Whether the body's announced end is there: servers may keep a connection open that they were asked to close."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return False
    head = bytes(received[:end]).lower()
    _, is_given, rest = head.partition(b"\r\ncontent-length:")
    if is_given:
        length = rest.partition(b"\r\n")[0].strip()
        return length.isdigit() and len(received) - end - 4 >= int(length)
    return b"\r\ntransfer-encoding:" in head and received.endswith(b"0\r\n\r\n")


def _parsed(data: bytes) -> Reply:
    response = http.client.HTTPResponse(_Received(data))  # type: ignore[arg-type]
    try:
        response.begin()
        body = response.read()
    except http.client.HTTPException as error:
        raise ValueError(f"the reply is broken: {type(error).__name__} {error}") from error
    wait = response.getheader("Retry-After", "")
    return Reply(response.status, body, float(wait) if wait.isdigit() else None)
