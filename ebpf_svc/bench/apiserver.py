"""A stand-in for a Kubernetes API server: lists, watches, and whatever can go wrong with them.

It keeps its objects and their history, pages lists, filters by selectors as the real one does (an
object that leaves a filter is DELETED to its watchers), sends bookmarks, streams lists, forgets old
versions, and fails in the ways it is told to. Objects are not validated.

One thread of its own runs it; every public method may be called from any other.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import gzip
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, urlsplit

from ebpf_svc.bench.apistate import Change, Collection, Gone, Item, Selector, matches

_T = TypeVar("_T")

PATHS = {
    "Service": ("v1", "/api/v1/services"),
    "EndpointSlice": ("discovery.k8s.io/v1", "/apis/discovery.k8s.io/v1/endpointslices"),
    "Node": ("v1", "/api/v1/nodes"),
    "ServiceCIDR": ("networking.k8s.io/v1", "/apis/networking.k8s.io/v1/servicecidrs"),
}
"""API version and path of the kinds served."""
PATHS_BEFORE_1_22 = PATHS | {
    "EndpointSlice": ("discovery.k8s.io/v1beta1", "/apis/discovery.k8s.io/v1beta1/endpointslices")
}
"""What clients of older releases ask for."""


@dataclass
class Fault:
    """An answer other than the right one."""

    path: str = ""
    """Part of the URL, query included, it is given to; empty = all."""
    status: int = 500
    message: str = "out of order"
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    """Sent as it is, in place of a Status object."""
    times: int = 1


class Request(NamedTuple):
    """A request as it was received."""

    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = b""
    """Not empty: something is to be created."""


class MockApiServer:
    """A server on 127.0.0.1; stopped and started again it has the same port and objects."""

    Fault = Fault

    def __init__(
        self,
        *,
        tls: ssl.SSLContext | None = None,
        make_socket: Callable[[], socket.socket] = socket.socket,
        paths: Mapping[str, tuple[str, str]] = PATHS,
    ) -> None:
        """Prepare; `make_socket` may make one of another network namespace."""
        self._tls, self._make_socket, self._paths = tls, make_socket, paths
        self._collections = {
            path: Collection(kind, version) for kind, (version, path) in paths.items()
        }
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="apiserver")
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()
        self._thawed = asyncio.Event()
        self.version = 1
        """The newest resource version."""
        self.port = 0
        self.requests: list[Request] = []
        """All that were received, in order."""
        self.created: list[Item] = []
        """What was posted, Events above all; it is not served."""
        self.faults: list[Fault] = []
        """Given to the next requests they fit."""
        self.streams_lists = True
        """Knows sendInitialEvents, as servers since 1.34 do by default."""
        self.selects_cluster_ips = True
        """Knows the field selector spec.clusterIP."""
        self.token = ""
        """Bearer token asked for; empty = anybody may come in."""
        self.compresses = False
        """Lists are compressed for those who say they can read it."""
        self.connections_made = 0
        self.piece_bytes, self.piece_pause_s = 0, 0.0
        """Send so many bytes at a time, with a pause after each; 0 = as fast as can be."""

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    # -- life --------------------------------------------------------------------------------------

    def start(self) -> MockApiServer:
        """Listen; on the port it had before, if any."""
        if not self._thread.is_alive():
            self._thread.start()

        async def listen() -> None:
            self._thawed.set()
            listener = self._make_socket()
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Inherited by connections, as with every Go server; asyncio does not see to it for a
            # socket it did not make, and events would wait 40 ms for a delayed acknowledgement.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            listener.bind(("127.0.0.1", self.port))
            self._server = await asyncio.start_server(
                self._serve, sock=listener, ssl=self._tls, limit=1 << 20
            )
            self.port = listener.getsockname()[1]

        asyncio.run_coroutine_threadsafe(listen(), self._loop).result(5)
        return self

    def stop(self) -> None:
        """Stop listening and break every connection; the objects stay."""
        self._call(self._close)

    def close(self) -> None:
        """End for good."""
        self.stop()

        async def end() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(5)
        self._call(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def kill_connections(self) -> None:
        """Break every connection, in the middle of whatever it is doing."""
        self._call(self._abort)

    def freeze(self) -> None:
        """Send nothing more, yet keep every connection."""
        self._call(self._thawed.clear)

    def thaw(self) -> None:
        """Go on where it was frozen."""
        self._call(self._thawed.set)

    # -- objects -----------------------------------------------------------------------------------

    def put(self, kind: str, *objects: Item) -> None:
        """Add or replace objects; each gets the next resource version."""

        def put_all() -> None:
            collection = self._of_kind(kind)
            for each in objects:
                self.version += 1
                collection.put(each, self.version)
            collection.wake()

        self._call(put_all)

    def delete(self, kind: str, namespace: str, name: str) -> None:
        """Delete an object that is there."""

        def delete_it() -> None:
            self.version += 1
            self._of_kind(kind).delete((namespace, name), self.version)
            self._of_kind(kind).wake()

        self._call(delete_it)

    def bookmark(self) -> None:
        """Tell every watcher that asked for bookmarks how far it is."""

        def tell() -> None:
            self.version += 1
            for collection in self._collections.values():
                collection.bookmark(self.version)
                collection.wake()

        self._call(tell)

    def forget_history(self) -> None:
        """Answer 410 to whoever asks for what happened until now, or goes on with a list."""

        def forget() -> None:
            self.version += 1
            for collection in self._collections.values():
                collection.forget(self.version)

        self._call(forget)

    def inject(self, kind: str, text: bytes) -> None:
        """Send bytes to every watcher of a kind, as they are."""

        def send() -> None:
            collection = self._of_kind(kind)
            collection.history.append(Change(self.version, None, None, raw=text))
            collection.wake()

        self._call(send)

    def watchers(self, kind: str) -> int:
        """How many watch a kind just now."""
        return self._call(lambda: len(self._of_kind(kind).watchers))

    def _of_kind(self, kind: str) -> Collection:
        return self._collections[self._paths[kind][1]]

    def _call(self, run: Callable[[], _T]) -> _T:
        done: concurrent.futures.Future[_T] = concurrent.futures.Future()

        def run_it() -> None:
            try:
                done.set_result(run())
            except Exception as error:
                done.set_exception(error)

        self._loop.call_soon_threadsafe(run_it)
        return done.result(10)

    def _close(self) -> None:
        if self._server:
            self._server.close()
        self._abort()

    def _abort(self) -> None:
        for writer in self._connections:
            writer.transport.abort()

    # -- requests ----------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        self.connections_made += 1
        try:
            while request := await _read_request(reader):
                self.requests.append(request)
                await self._thawed.wait()
                if not await self._answer(request, reader, writer):
                    break
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self._connections.discard(writer)
            writer.close()

    async def _answer(
        self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Answer a request; returns whether the connection may be used again."""
        asked = f"{request.path}?{'&'.join(f'{k}={v}' for k, v in request.query.items())}"
        for fault in self.faults:
            if fault.path in asked and fault.times:
                fault.times -= 1
                body = fault.body
                body = _status(fault.status, fault.message) if body is None else body
                await self._send(writer, fault.status, body, fault.headers)
                return True
        refused = self._refusal(request)
        if refused is not None:
            await self._send(writer, refused[0], _status(*refused))
            return True
        if request.body:
            self.created.append(json.loads(request.body))
            await self._send(writer, 201, request.body)
            return True
        collection = self._collections[request.path]
        try:
            if request.query.get("watch") == "true":
                await self._watch(collection, request.query, reader, writer)
                return False
            body, headers = self._list(collection, request.query), {}
            if self.compresses and "gzip" in request.headers.get("accept-encoding", ""):
                body, headers = gzip.compress(body, 1), {"content-encoding": "gzip"}
            await self._send(writer, 200, body, headers)
        except Gone as error:
            await self._send(writer, 410, _status(410, str(error)))
        return True

    def _refusal(self, request: Request) -> tuple[int, str] | None:
        """Status and message for what this server does not do."""
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if self.token and (scheme.lower(), token) != ("bearer", self.token):
            return 401, "Unauthorized"
        if not request.body and request.path not in self._collections:
            return 404, "the server could not find it"
        selected = request.query.get("fieldSelector", "")
        if "spec.clusterIP" in selected and not self.selects_cluster_ips:
            return 400, '"spec.clusterIP" is not a known field selector: only "metadata.name"'
        return None

    def _list(self, collection: Collection, query: Mapping[str, str]) -> bytes:
        limit = 0 if query.get("resourceVersion") == "0" else int(query.get("limit", 0))
        selector = Selector.of(query)
        version, entries, token = collection.page(
            self.version, limit, query.get("continue", ""), selector
        )
        meta = {"resourceVersion": str(version), **({"continue": token} if token else {})}
        head = json.dumps(
            {"kind": f"{collection.kind}List", "apiVersion": collection.version, "metadata": meta}
        )
        return f'{head[:-1]},"items":['.encode() + b",".join(e.body for e in entries) + b"]}\n"

    async def _watch(
        self,
        collection: Collection,
        query: Mapping[str, str],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        since, selector = query.get("resourceVersion", ""), Selector.of(query)
        streams = query.get("sendInitialEvents") == "true"
        if streams and not self.streams_lists:
            said = "sendInitialEvents: Forbidden: sendInitialEvents is forbidden for watch"
            await self._send(writer, 422, _status(422, said))
            return
        woken = asyncio.Event()
        collection.watchers.add(woken)
        # A watcher says nothing more: when its side can be read, it has gone.
        gone = asyncio.ensure_future(reader.read(1))
        gone.add_done_callback(lambda _: woken.set())
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n")
        writer.write(b"transfer-encoding: chunked\r\n\r\n")
        try:
            if since and since != "0" and int(since) < collection.oldest:
                said = f"too old resource version: {since} ({collection.oldest})"
                await self._chunk(writer, b'{"type":"ERROR","object":%s}\n' % _status(410, said))
                await self._chunk(writer, b"")
                return
            position = collection.position(int(since) if since else self.version)
            if not since or since == "0":
                current = [e for e in collection.objects.values() if matches(e, selector)]
                for entry in current:
                    await self._chunk(writer, collection.event("ADDED", entry))
                if streams:
                    end = {"k8s.io/initial-events-end": "true"}
                    await self._chunk(writer, collection.bookmark_event(self.version, end))
            while not gone.done():
                while position < len(collection.history):
                    change = collection.history[position]
                    position += 1
                    if text := collection.render(change, selector):
                        await self._chunk(writer, text)
                woken.clear()
                await woken.wait()
        finally:
            gone.cancel()
            collection.watchers.discard(woken)

    async def _chunk(self, writer: asyncio.StreamWriter, text: bytes) -> None:
        await self._write(writer, b"%x\r\n%s\r\n" % (len(text), text))

    async def _send(
        self,
        writer: asyncio.StreamWriter,
        status: int,
        body: bytes,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        headers = {"content-length": str(len(body)), **(headers or {})}
        lines = [f"HTTP/1.1 {status} .", *(f"{key}: {value}" for key, value in headers.items())]
        writer.write("\r\n".join((*lines, "", "")).encode())
        await self._write(writer, body)

    async def _write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        await self._thawed.wait()
        for piece in _cut(data, self.piece_bytes):
            writer.write(piece)
            await writer.drain()
            if self.piece_pause_s:
                await asyncio.sleep(self.piece_pause_s)


def _cut(data: bytes, size: int) -> Iterable[bytes]:
    return (data[i : i + size] for i in range(0, len(data), size)) if size else (data,)


async def _read_request(reader: asyncio.StreamReader) -> Request | None:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    target = urlsplit(first.split(" ")[1])
    pairs = (line.split(": ", 1) for line in lines if line)
    headers = {name.lower(): value for name, value in pairs}
    length = int(headers.get("content-length", 0))
    body = await reader.readexactly(length)
    return Request(target.path, dict(parse_qsl(target.query)), headers, body)


def _status(code: int, message: str) -> bytes:
    status: dict[str, Any] = {"kind": "Status", "apiVersion": "v1", "metadata": {}}
    status |= {"status": "Failure", "message": message, "code": code}
    return json.dumps(status).encode()
