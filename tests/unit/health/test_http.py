"""What counts as a request, and how answers look on the wire."""

from __future__ import annotations

import pytest

from ebpf_svc.health.http import (
    HEAD_MAX_BYTES,
    BadRequest,
    Request,
    Response,
    json_response,
    pages,
    parse,
    render,
    text_response,
)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n", Request("GET", "/healthz")),
        (b"GET /healthz HTTP/1.0\r\n\r\n", Request("GET", "/healthz")),
        (b"GET /healthz HTTP/1.0\n\n", Request("GET", "/healthz")),
        (b"HEAD /livez?verbose=1&a=/b HTTP/1.1\r\n\r\n", Request("HEAD", "/livez")),
        (b"POST / HTTP/1.1\r\nContent-Length: 4\r\n\r\nbody", Request("POST", "/")),
        (b"GET http://node:10256/healthz?x HTTP/1.1\r\n\r\n", Request("GET", "/healthz")),
        (b"OPTIONS * HTTP/1.1\r\n\r\n", Request("OPTIONS", "*")),
        (b"M-SEARCH /x HTTP/1.1\r\n\r\n", Request("M-SEARCH", "/x")),
    ],
)
def test_complete_head_is_a_request(data: bytes, expected: Request) -> None:
    """Method and path are all that is read."""
    assert parse(data) == expected


@pytest.mark.parametrize(
    "data", [b"", b"GET", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nA: b\r\n"]
)
def test_half_a_head_is_not_a_request_yet(data: bytes) -> None:
    """A client may send byte by byte."""
    assert parse(data) is None


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\n\n", 400),
        (b"GET /a b HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * HEAD_MAX_BYTES, 431),
    ],
)
def test_what_never_becomes_a_request_is_answered(data: bytes, status: int) -> None:
    """TLS, HTTP/2 and endless headers get an error, not patience."""
    with pytest.raises(BadRequest) as caught:
        parse(data)
    assert caught.value.status == status


def test_answer_has_length_and_ends_the_connection() -> None:
    """A client knows where the body ends, and that no second request will be read."""
    head, _, body = render(text_response("ok")).partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "HTTP/1.1 200 OK"
    assert {"Content-Length: 2", "Connection: close", "X-Content-Type-Options: nosniff"} <= {*lines}
    assert body == b"ok"


def test_head_gets_the_length_without_the_body() -> None:
    """HEAD is GET without the body."""
    whole = render(json_response({"a": 1}))
    head = render(json_response({"a": 1}), "HEAD")
    assert head.endswith(b"\r\n\r\n")
    assert b"Content-Length: 8\r\n" in head
    assert len(whole) == len(head) + 8


def test_unknown_path_is_not_found() -> None:
    """Only the pages there are exist; a slash more is another page."""
    handler = pages({"/healthz": lambda request: Response(200, b"")})
    assert handler(Request("GET", "/healthz")).status == 200
    assert handler(Request("GET", "/healthz/")).status == 404
