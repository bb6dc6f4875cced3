"""The little HTTP the agent speaks: one request, one answer, connection closed.

Pure: no sockets. `server` carries the bytes. A prober, Prometheus and curl all work with it; nobody
sends the agent anything but a method and a path, so headers and bodies of requests are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from typing import Any

HEAD_MAX_BYTES = 8192
"""A request line and headers may be this long; cookies of a browser fit, an attack does not."""

TEXT = "text/plain; charset=utf-8"
JSON = "application/json"
NO_SNIFFING = ("X-Content-Type-Options", "nosniff")
"""Kube-proxy's health servers send it (H3), and its text pages too."""


class BadRequest(Exception):
    """What came is no request; `status` is the answer."""

    def __init__(self, status: HTTPStatus) -> None:
        super().__init__(status.phrase)
        self.status = status


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked for."""

    method: str
    path: str
    """Without the query."""


@dataclass(frozen=True, slots=True)
class Response:
    """An answer; length, date and connection headers are added when it is rendered."""

    status: int
    body: bytes
    content_type: str = TEXT
    headers: tuple[tuple[str, str], ...] = (NO_SNIFFING,)


Handler = Callable[[Request], Response]
"""Answers a request, quickly: others wait meanwhile."""


def text_response(text: str, status: int = HTTPStatus.OK) -> Response:
    """A page of plain text."""
    return Response(status, text.encode())


def json_response(
    value: Any, status: int = HTTPStatus.OK, headers: tuple[tuple[str, str], ...] = ()
) -> Response:
    """A JSON document."""
    return Response(status, json.dumps(value).encode(), JSON, (NO_SNIFFING, *headers))


def pages(by_path: Mapping[str, Handler]) -> Handler:
    """Send each path to its handler and everything else to a 404."""

    def answer(request: Request) -> Response:
        handler = by_path.get(request.path)
        if handler is None:
            return text_response("404 page not found\n", HTTPStatus.NOT_FOUND)
        return handler(request)

    return answer


def parse(data: bytes | bytearray) -> Request | None:
    """Read a request from its first bytes.

    Returns:
        None while its head is not complete.

    Raises:
        BadRequest: it never will be a request we can answer.
    """
    end = data.find(b"\r\n\r\n")
    if end < 0 and b"\n\n" not in data:
        if len(data) > HEAD_MAX_BYTES:
            raise BadRequest(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        return None
    line = bytes(data[: data.find(b"\n")]).decode("latin-1").rstrip("\r")
    words = line.split(" ")
    if len(words) != 3 or not words[0] or not words[2].startswith("HTTP/1."):
        raise BadRequest(HTTPStatus.BAD_REQUEST)
    method, target, _ = words
    if not target.startswith("/"):
        # A proxy may send the whole URL, OPTIONS may ask about `*`.
        _, separator, rest = target.partition("://")
        target = "/" + rest.partition("/")[2] if separator else target
    return Request(method, target.partition("?")[0])


def render(response: Response, method: str = "GET") -> bytes:
    """The bytes of an answer; to HEAD without the body, whose length is told all the same."""
    try:
        phrase = HTTPStatus(response.status).phrase
    except ValueError:
        phrase = "Unknown"
    lines = [
        f"HTTP/1.1 {int(response.status)} {phrase}",
        f"Content-Type: {response.content_type}",
        *(f"{name}: {value}" for name, value in response.headers),
        f"Date: {formatdate(usegmt=True)}",
        f"Content-Length: {len(response.body)}",
        "Connection: close",
    ]
    head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
    return head if method == "HEAD" else head + response.body
