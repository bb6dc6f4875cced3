"""Requests to the API server: address, credentials and TLS by the official client.

Its models are not used: an object would cost a hundred times what its JSON does.
"""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any
from urllib.parse import urlencode, urlsplit

import urllib3
import yaml
from kubernetes import config
from kubernetes.client import Configuration
from kubernetes.client.rest import RESTClientObject
from pydantic import ValidationError
from urllib3.exceptions import HTTPError, ReadTimeoutError

from ebpf_svc import __version__
from ebpf_svc.config import KubernetesSettings
from ebpf_svc.errors import ConfigError
from ebpf_svc.log import get_logger
from ebpf_svc.watch.kube import wire
from ebpf_svc.watch.kube.failures import Broken, Expired, Refused, Silent, Unreachable
from ebpf_svc.watch.kube.limit import RateLimit

log = get_logger(__name__)

CONNECT_TIMEOUT_S = 5.0
"""For TCP and TLS each: a busy API server takes its time to shake hands."""
PROBE_TIMEOUT_S = 0.9
"""For a bare TCP connection to a server that was away: short, so that its return is noticed."""
READ_TIMEOUT_S = 30.0
"""Silence in the middle of an answer."""
PIECE_BYTES = 262_144
RELOAD_S = 5.0
"""Credentials that are refused are read anew at most this often: a plugin may have to be run."""
_KEEPALIVE = (
    # A peer that vanished is noticed after 9 s, though nothing is sent.
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2),
    # Nor does one that never acknowledges what was sent to it.
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 9000),
)
_BROKEN = (HTTPError, http.client.HTTPException, OSError)
"""What a connection may end with."""
_UNUSABLE = (
    *(config.ConfigException, yaml.YAMLError, OSError),
    # A file of any other shape fails somewhere inside the official client.
    *(ValueError, TypeError, LookupError, AttributeError),
)
"""What reading credentials may end with."""


class Answer:
    """The body of a response that is still being received."""

    def __init__(self, response: urllib3.BaseHTTPResponse) -> None:
        self._response = response

    def read(self) -> bytes:
        """All of it.

        Raises:
            Broken: the connection broke before the end.
        """
        try:
            return self._response.read()
        except _BROKEN as error:
            raise Broken(_said(error)) from error
        finally:
            self.close()

    def lines(self) -> Iterator[bytes]:
        """Each line as soon as it is complete; one cut short by the end is dropped.

        Raises:
            Silent: nothing came for too long.
            Broken: the connection broke.
        """
        begun: list[bytes] = []
        while piece := self._piece():
            first, *others = piece.split(b"\n")
            begun.append(first)
            if others:
                yield b"".join(begun)
                yield from others[:-1]
                begun = [others[-1]]

    def _piece(self) -> bytes:
        try:
            return self._response.read1(PIECE_BYTES)
        except (ReadTimeoutError, TimeoutError) as error:
            raise Silent(_said(error)) from error
        except _BROKEN as error:
            raise Broken(_said(error)) from error
        except (AttributeError, ValueError) as error:
            # Another thread closed it while this one read.
            raise Broken("the connection was closed") from error

    def close(self) -> None:
        """Done with it; the connection is used again if all was read."""
        if self._response.closed:
            self._response.release_conn()
        else:
            self._response.close()

    def interrupt(self) -> None:
        """Make another thread's reading end now."""
        with suppress(ValueError, RuntimeError, OSError):
            self._response.shutdown()


class ApiServer:
    """One API server; thread-safe.

    Raises:
        ConfigError: the kubeconfig, or what stands in its place, cannot be used.
    """

    def __init__(self, settings: KubernetesSettings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._limit = RateLimit(settings.qps, settings.burst)
        self._configuration = load_configuration(settings)
        self._rest = RESTClientObject(self._configuration)
        self._loaded_s = time.monotonic()

    @property
    def url(self) -> str:
        # The client sets its own host to the kubeconfig's whenever it looks at its credentials.
        return self._settings.master.rstrip("/") or str(self._configuration.host)

    def get(
        self,
        path: str,
        query: Mapping[str, str],
        *,
        silence_s: float | None = None,
        packed: bool = False,
    ) -> Answer:
        """Ask; returns when the answer begins. Waits for its turn, as `qps` and `burst` say.

        Args:
            path: of the resource, from the root.
            query: what else the URL says; empty values are left out.
            silence_s: how long nothing may be received before the connection counts as broken;
                None = the answer is to come in one go.
            packed: the answer is large and wanted whole, so it may be compressed.

        Raises:
            Expired: the resource version is too old.
            Refused: the server answered with any other error.
            Unreachable: it did not answer.
        """
        if not query.get("continue"):
            # The pages of a list are one request: a list that has begun is to be had whole.
            self._limit.wait()
        asked = urlencode({key: value for key, value in query.items() if value})
        return self._send("GET", f"{path}?{asked}", self._headers(packed), silence_s)

    def post(self, path: str, item: Mapping[str, Any]) -> None:
        """Create an object; waits for its turn, as `qps` and `burst` say.

        Args:
            path: of the collection, from the root.
            item: the object.

        Raises:
            Refused, Expired: the server did not take it.
            Unreachable: it did not answer.
        """
        self._limit.wait()
        headers = {**self._headers(packed=False), "content-type": "application/json"}
        self._send("POST", path, headers, body=json.dumps(item).encode()).read()

    def _send(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str],
        silence_s: float | None = None,
        body: bytes | None = None,
    ) -> Answer:
        try:
            response = self._rest.pool_manager.request(
                method,
                f"{self.url}{target}",
                headers=headers,
                body=body,
                timeout=urllib3.Timeout(
                    connect=CONNECT_TIMEOUT_S, read=silence_s or READ_TIMEOUT_S
                ),
                preload_content=False,
                retries=False,
            )
        except _BROKEN as error:
            if _is_about_tls(error):
                # The authority or our certificate may have been replaced on disk.
                self._reload()
            raise Unreachable(_said(error)) from error
        answer = Answer(response)
        if response.status not in (http.client.OK, http.client.CREATED):
            raise self._refusal(response.status, response.headers.get("Retry-After"), answer)
        return answer

    def probe(self) -> None:
        """See whether anybody listens, at the cost of one TCP connection.

        Raises:
            Unreachable: nobody does.
        """
        url = urlsplit(self.url)
        if self._configuration.proxy or not url.hostname:
            return
        address = (url.hostname, url.port or (443 if url.scheme == "https" else 80))
        try:
            socket.create_connection(address, timeout=PROBE_TIMEOUT_S).close()
        except OSError as error:
            raise Unreachable(_said(error)) from error

    def close(self) -> None:
        """Close idle connections."""
        self._rest.close()

    def _headers(self, packed: bool) -> dict[str, str]:
        headers = {
            "accept": "application/json",
            "accept-encoding": "gzip" if packed else "identity",
            "user-agent": f"ebpf-svc/{__version__}",
        }
        try:
            # A service account's token is read from disk once a minute: it is rotated.
            auth = self._configuration.auth_settings()
        except (config.ConfigException, OSError) as error:
            raise Unreachable(f"no credentials: {error}") from error
        for setting in auth.values():
            if setting["value"]:
                # Token files may end with a newline, headers may not hold one.
                headers[setting["key"]] = setting["value"].strip()
        return headers

    def _refusal(self, status: int, retry_after: str | None, answer: Answer) -> Exception:
        text = answer.read()
        try:
            message = wire.STATUS.validate_json(text).get("message") or ""
        except ValidationError:
            message = text[:200].decode(errors="replace")
        message = message.strip() or http.client.responses.get(status, "")
        if status == http.client.GONE:
            return Expired(message)
        if status == http.client.UNAUTHORIZED:
            self._reload()
        seconds = float(retry_after) if retry_after and retry_after.isdecimal() else None
        return Refused(status, message, seconds)

    def _reload(self) -> None:
        """Read credentials anew; those at hand stay in use when that fails."""
        with self._lock:
            if time.monotonic() - self._loaded_s < RELOAD_S:
                return
            self._loaded_s = time.monotonic()
            try:
                self._configuration = load_configuration(self._settings)
                self._rest = RESTClientObject(self._configuration)
            except ConfigError as error:
                log.warning("watch.credentials-unreadable", error=str(error))


def load_configuration(settings: KubernetesSettings) -> Any:
    """The official client's configuration: a kubeconfig, or what a pod is given.

    Raises:
        ConfigError: it cannot be read or makes no sense.
    """
    configuration = Configuration()
    configuration.socket_options = [
        *urllib3.connection.HTTPConnection.default_socket_options,
        *_KEEPALIVE,
    ]
    try:
        if settings.kubeconfig is not None:
            config.load_kube_config(
                str(settings.kubeconfig),
                context=settings.context or None,
                client_configuration=configuration,
                persist_config=False,
            )
        elif not settings.master:
            config.load_incluster_config(client_configuration=configuration)
    except _UNUSABLE as error:
        where = settings.kubeconfig or "none, and no service account of a pod"
        raise ConfigError("kubeconfig", got=str(where), expected=f"credentials: {error}") from error
    return configuration


def _said(error: BaseException) -> str:
    reason = getattr(error, "reason", None)
    return str(reason if isinstance(reason, Exception) else error) or type(error).__name__


def _is_about_tls(error: BaseException) -> bool:
    reason = getattr(error, "reason", None)
    return isinstance(error, (ssl.SSLError, urllib3.exceptions.SSLError)) or isinstance(
        reason, ssl.SSLError
    )
