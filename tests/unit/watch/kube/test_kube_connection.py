"""Reaching the API server: kubeconfig, service account, TLS, credentials that rotate."""

from __future__ import annotations

import json
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.config import incluster_config

from ebpf_svc.bench.apiserver import MockApiServer
from ebpf_svc.config import KubernetesSettings
from ebpf_svc.errors import ConfigError
from ebpf_svc.watch.kube import connection
from ebpf_svc.watch.kube.connection import ApiServer
from ebpf_svc.watch.kube.failures import Broken, Expired, Refused, Unreachable
from tests.lib import apiserver as api
from tests.lib.apiserver import running, watching
from tests.lib.waiting import eventually

Fault = MockApiServer.Fault
SERVICES = "/api/v1/services"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a certificate authority (ca), and what it signed (server, client)."""
    folder = tmp_path_factory.mktemp("pki")
    new_key = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    _openssl(folder, *new_key, "-x509", "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=ca")
    for name in ("server", "client"):
        _openssl(folder, *new_key, "-keyout", f"{name}.key", "-out", f"{name}.csr",
                 "-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1")  # fmt: skip
        _openssl(folder, "x509", "-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key",
                 "-out", f"{name}.crt", "-copy_extensions", "copyall")  # fmt: skip
    return folder


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def secure(authority: Path) -> Iterator[MockApiServer]:
    """A server that speaks TLS and asks for a client certificate, without insisting."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority / "server.crt", authority / "server.key")
    context.load_verify_locations(authority / "ca.crt")
    context.verify_mode = ssl.CERT_OPTIONAL
    with running(tls=context) as server:
        yield server


def kubeconfig(path: Path, url: str, *, cluster: Any = None, user: Any = None) -> Path:
    """Write a kubeconfig with one context."""
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": url, **(cluster or {})}}],
        "users": [{"name": "u", "user": user or {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path.write_text(yaml.safe_dump(document))
    return path


def ask(settings: KubernetesSettings) -> bytes:
    server = ApiServer(settings)
    try:
        return server.get(SERVICES, {}).read()
    finally:
        server.close()


def test_kubeconfig_gives_address_authority_and_certificate(
    secure: MockApiServer, authority: Path, tmp_path: Path
) -> None:
    """As kubectl reads it, files beside it included."""
    path = kubeconfig(
        tmp_path / "config",
        secure.url,
        cluster={"certificate-authority": str(authority / "ca.crt")},
        user={
            "client-certificate": str(authority / "client.crt"),
            "client-key": str(authority / "client.key"),
        },
    )
    assert b'"shop"' in ask(KubernetesSettings(kubeconfig=path))


def test_watch_over_tls_is_followed_and_ends_at_once_when_stopped(
    secure: MockApiServer, authority: Path, tmp_path: Path
) -> None:
    """What interrupts a thread that reads must do so under TLS too."""
    cluster = {"certificate-authority": str(authority / "ca.crt")}
    path = kubeconfig(tmp_path / "config", secure.url, cluster=cluster)
    with watching(secure, kubeconfig=path, master="") as seen:
        seen.serves("shop/web")
        secure.put("Service", api.service("shop/api"))
        seen.serves("shop/web", "shop/api")
        eventually(lambda: secure.watchers("EndpointSlice"))
        started_s = time.monotonic()
        seen.source.stop()
        assert time.monotonic() - started_s < 0.5
    assert not [t for t in threading.enumerate() if t.name.startswith("watch-")]


def test_server_of_another_authority_is_not_trusted(secure: MockApiServer, tmp_path: Path) -> None:
    """Nothing is sent to a server that cannot prove who it is."""
    path = kubeconfig(tmp_path / "config", secure.url)
    with pytest.raises(Unreachable, match="CERTIFICATE_VERIFY_FAILED"):
        ask(KubernetesSettings(kubeconfig=path))
    assert secure.requests == []


def test_authority_replaced_on_disk_is_found(
    secure: MockApiServer, authority: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A certificate that expired is renewed under a running agent."""
    monkeypatch.setattr(connection, "RELOAD_S", 0.0)
    path = kubeconfig(tmp_path / "config", secure.url)
    with watching(secure, kubeconfig=path, master="") as seen:
        eventually(lambda: seen.now is None)
        kubeconfig(path, secure.url, cluster={"certificate-authority": str(authority / "ca.crt")})
        seen.serves("shop/web")


def test_token_that_was_rotated_is_read_anew(
    server: MockApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """401: the token file is read again, its last newline notwithstanding."""
    monkeypatch.setattr(connection, "RELOAD_S", 0.0)
    token = tmp_path / "token"
    token.write_text("old\n")
    server.token = "old"
    path = kubeconfig(tmp_path / "config", server.url, user={"tokenFile": str(token)})
    with watching(server, kubeconfig=path, master="") as seen:
        seen.serves("shop/web")
        server.token = "new"
        token.write_text("new\n")
        server.kill_connections()
        server.put("Service", api.service("shop/api"))
        seen.serves("shop/web", "shop/api")


def test_pod_uses_its_service_account(
    secure: MockApiServer, authority: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a kubeconfig: the address from the environment, the token from its file."""
    (tmp_path / "token").write_text("account")
    secure.token = "account"
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(secure.port))
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(authority / "ca.crt"))
    assert b'"shop"' in ask(KubernetesSettings())


def test_service_account_token_missing_for_a_moment_is_no_crash(
    secure: MockApiServer, authority: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kubelet replaces the file; a request in between is tried again."""
    token = tmp_path / "token"
    token.write_text("account")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(secure.port))
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(token))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(authority / "ca.crt"))
    loader = incluster_config.InClusterConfigLoader
    monkeypatch.setattr(loader, "__init__", _with_zero_refresh(loader.__init__))
    server = ApiServer(KubernetesSettings())
    server.get(SERVICES, {}).read()
    token.unlink()
    with pytest.raises(Unreachable, match="no credentials"):
        server.get(SERVICES, {})
    token.write_text("account")
    server.get(SERVICES, {}).read()


def _with_zero_refresh(init: Any) -> Any:
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self._token_refresh_period *= 0

    return wrapped


def test_master_takes_the_place_of_the_kubeconfigs_server(
    server: MockApiServer, tmp_path: Path
) -> None:
    """As kube-proxy's --master does."""
    path = kubeconfig(tmp_path / "config", "http://127.0.0.1:1", user={"token": "t"})
    server.token = "t"
    ask(KubernetesSettings(kubeconfig=path, master=server.url + "/"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "current-context|Invalid|No such|no such"),
        ("{}", "current-context"),
        ("current-context: nowhere\ncontexts: []\n", "nowhere"),
        ("[", "expected"),
        ("contexts: 5\ncurrent-context: 7\n", "kubeconfig"),
        ("- a\n- b\n", "kubeconfig"),
    ],
)
def test_kubeconfig_that_cannot_be_used_is_refused_at_once(
    tmp_path: Path, text: str | None, said: str
) -> None:
    """A wrong path is a mistake to be told, not an outage to be waited for."""
    path = tmp_path / "config"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        ApiServer(KubernetesSettings(kubeconfig=path))


def test_no_credentials_at_all_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside a pod something must say where the API server is."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ConfigError, match="no service account"):
        ApiServer(KubernetesSettings())


def test_compressed_answer_is_unpacked(server: MockApiServer) -> None:
    """Large lists come compressed; watches do not ask for it."""
    client = ApiServer(KubernetesSettings(master=server.url))
    plain = client.get(SERVICES, {}).read()
    server.compresses = True
    assert client.get(SERVICES, {}, packed=True).read() == plain
    assert client.get(SERVICES, {}).read() == plain
    asked = [request.headers["accept-encoding"] for request in server.requests]
    assert asked == ["identity", "gzip", "identity"]


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        (Fault(status=410, message="too old"), Expired, "too old"),
        (Fault(status=403, message="no"), Refused, "403: no"),
        (Fault(status=502, body=b"<html>"), Refused, "502: <html>"),
        (Fault(status=503, body=b""), Refused, "503: Service Unavailable"),
        (Fault(status=302, headers={"location": "http://127.0.0.1:1"}), Refused, "302"),
    ],
)
def test_refusal_says_what_the_server_said(
    server: MockApiServer, fault: Fault, error: type[Exception], said: str
) -> None:
    """The log must name the reason."""
    server.faults.append(fault)
    with pytest.raises(error, match=said):
        ask(KubernetesSettings(master=server.url))


def test_retry_after_is_understood(server: MockApiServer) -> None:
    """429 with seconds; anything else is as if not said."""
    server.faults.append(Fault(status=429, headers={"Retry-After": "7"}))
    server.faults.append(Fault(status=429, headers={"Retry-After": "Fri, 31 Dec 1999 23:59:59"}))
    for expected in (7.0, None):
        with pytest.raises(Refused) as caught:
            ask(KubernetesSettings(master=server.url))
        assert caught.value.retry_after_s == expected


def test_answer_cut_short_is_broken(server: MockApiServer) -> None:
    """Half a list must never pass for a list."""
    server.faults.append(Fault(status=200, headers={"content-length": "999"}, body=b'{"items":['))
    client = ApiServer(KubernetesSettings(master=server.url))
    answer = client.get(SERVICES, {})
    server.kill_connections()
    with pytest.raises(Broken):
        answer.read()


def test_idle_connection_is_used_again(server: MockApiServer) -> None:
    """Pages of a list come over one connection."""
    client = ApiServer(KubernetesSettings(master=server.url))
    for _ in range(3):
        json.loads(client.get(SERVICES, {}).read())
    assert server.connections_made == 1
