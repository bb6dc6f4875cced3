"""Who serves on a benchmark's node: our agent from manifests, or the real kube-proxy."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ebpf_svc.bench.apiserver import PATHS, PATHS_BEFORE_1_22, MockApiServer
from ebpf_svc.bench.population import Population
from ebpf_svc.config import Settings
from ebpf_svc.errors import CommandError, EbpfSvcError
from ebpf_svc.host.command import run
from ebpf_svc.testbed import addressing
from ebpf_svc.testbed.agent import Agent, AgentError
from ebpf_svc.testbed.host import Node

PROGRAMMED_S = 1_200.0
_POLL_S = 0.02
_STOP_S = 10.0
_METRICS_URL = "http://127.0.0.1:10249"
_PENDING = re.compile(r"^kubeproxy_sync_proxy_rules_\w+_changes_pending(?:{.*})? (\S+)", re.M)
_SYNCED = re.compile(r"^kubeproxy_sync_proxy_rules_last_timestamp_seconds(?:{.*})? (\S+)", re.M)
_RELEASE = re.compile(r"^Kubernetes v(\d+)\.(\d+)")
_SLICES_V1_SINCE = (1, 22)
"""The API server has them since 1.21, kube-proxy asks for them since 1.22."""
_NFTABLES_SINCE = (1, 31)
_DUAL_SINCE = (1, 21)
"""Both families without being asked."""
Item = dict[str, Any]


class Serving(Protocol):
    """Something that programs a node."""

    pid: int
    """Of its process; 0 before it runs."""

    def grow(self, population: Population, wanted_ports: int) -> None:
        """Serve so many services of a population, and wait until they are programmed.

        Args:
            wanted_ports: service ports that are served then, those measured included.

        Raises:
            EbpfSvcError: that did not happen in time.
        """

    def close(self) -> None:
        """End it."""


class OurAgent:
    """`ebpf-svc run`."""

    def __init__(self, node: Node, settings: Settings, mode: str, items: Iterable[Item]) -> None:
        assert settings.manifests is not None
        self.pid = 0
        self._manifests = settings.manifests
        self._services = 0
        document = {"apiVersion": "v1", "kind": "List", "items": list(items)}
        (self._manifests / "bench.json").write_text(json.dumps(document))
        self._agent = Agent(node, settings, mode=mode)

    def grow(self, population: Population, wanted_ports: int) -> None:
        population.write_manifests(self._manifests, after=self._services)
        self._services = population.services
        if not self._agent.running:
            self._agent.start(wait=False)
        deadline = time.monotonic() + PROGRAMMED_S
        while (status := self._agent.status()).get("services", {}).get("ports") != wanted_ports:
            if not self._agent.running or time.monotonic() > deadline:
                said = f"{wanted_ports} service ports are not served"
                raise AgentError(said, self._agent.log_tail())
            time.sleep(_POLL_S)
        if status["failed"]:
            raise AgentError(f"not all is served: {status['failed'][:3]}", self._agent.log_tail())
        self.pid = int(status["pid"])

    def close(self) -> None:
        # What it wrote goes with the node's namespace, sooner than it would tidy up.
        self._agent.kill()


class KubeProxyError(EbpfSvcError):
    """The real kube-proxy did not do what it was told; the end of its log is told."""


def reason_against(binary: Path | None, mode: str) -> str:
    """Why a kube-proxy cannot be measured in a mode; empty = it can."""
    if binary is None or not binary.is_file():
        return "no kube-proxy was given (--kube-proxy PATH)"
    try:
        release = release_of(binary)
    except KubeProxyError as error:
        return str(error)
    if mode == "nftables" and release < _NFTABLES_SINCE:
        return f"kube-proxy {release[0]}.{release[1]} has no nftables mode"
    if mode == "ipvs" and not shutil.which("ipset"):
        return "kube-proxy's ipvs mode runs ipset, and it is not installed (apt-get install ipset)"
    return ""


def release_of(binary: Path) -> tuple[int, int]:
    """Major and minor version; raises KubeProxyError."""
    try:
        said = run([str(binary), "--version"])
    except (CommandError, OSError) as error:
        raise KubeProxyError(f"{binary} does not run: {error}") from error
    found = _RELEASE.search(said)
    if found is None:
        raise KubeProxyError(f"{binary} is no kube-proxy: its version is {said.strip()!r}")
    return int(found[1]), int(found[2])


class KubeProxy:
    """The real one, fed by a stand-in API server in the node's network namespace."""

    def __init__(self, node: Node, binary: Path, mode: str, items: Iterable[Item]) -> None:
        self.pid = 0
        self._node, self._binary, self._mode = node, binary, mode
        self._log_path = node.folders.root / "kube-proxy.log"
        self._services = 0
        self._release = release_of(binary)
        is_old = self._release < _SLICES_V1_SINCE
        self._server = MockApiServer(paths=PATHS_BEFORE_1_22 if is_old else PATHS)
        with node.namespace.entered():  # its thread stays there
            self._server.start()
        self._server.put("Node", _node_object(node))
        self._put(items)
        self._process: subprocess.Popen[str] | None = None

    def grow(self, population: Population, wanted_ports: int) -> None:
        put_s = time.time()
        self._put(population.objects(after=self._services))
        self._services = population.services
        if self._process is None:
            self.start()
        assert self._process is not None
        deadline = time.monotonic() + PROGRAMMED_S
        while not self._has_synced(put_s):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise self._wrong(f"does not serve {wanted_ports} ports")
            time.sleep(0.2)
        # Old versions take another mode where something is missing, and say so in their log alone.
        if (mode := self._page("proxyMode").strip()) != self._mode:
            raise self._wrong(f"was asked for mode {self._mode} and serves in mode {mode}")

    def _wrong(self, what: str) -> KubeProxyError:
        tail = "\n".join(self._log_path.read_text().splitlines()[-20:])
        return KubeProxyError(f"{self._binary} {what}\n{tail}")

    def stop(self) -> None:
        """End the process; its rules stay."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def close(self) -> None:
        self.stop()
        self._server.close()

    def argv(self) -> list[str]:
        """Its command line."""
        return [
            str(self._binary),
            f"--master={self._server.url}",
            f"--proxy-mode={self._mode}",
            f"--hostname-override={self._node.name}",
            f"--cluster-cidr={','.join(addressing.CLUSTER_CIDRS)}",
            "--kube-api-content-type=application/json",
            "--conntrack-max-per-core=0",
            *(("--feature-gates=IPv6DualStack=true",) if self._release < _DUAL_SINCE else ()),
        ]

    def start(self) -> None:
        """Start it with the objects there are; it may be started again after `stop`."""
        with self._log_path.open("a") as log:
            self._process = self._node.popen(
                self.argv(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.pid = self._process.pid

    def _put(self, items: Iterable[Item]) -> None:
        by_kind: dict[str, list[Item]] = {}
        for item in items:
            by_kind.setdefault(item["kind"], []).append(_completed(item))
        for kind, found in by_kind.items():
            self._server.put(kind, *found)

    def _has_synced(self, since_s: float) -> bool:
        """It has nothing left to do, and has done something since then."""
        try:
            return is_settled(self._page("metrics"), since_s)
        except OSError:
            return False

    def _page(self, path: str) -> str:
        """A page of its metrics address; raises OSError."""
        with (
            self._node.namespace.entered(),
            urllib.request.urlopen(f"{_METRICS_URL}/{path}", timeout=5) as answer,
        ):
            return str(answer.read().decode())


def is_settled(metrics: str, since_s: float) -> bool:
    """Whether its metrics say that all changes are programmed, and later than that."""
    pending = [float(value) for value in _PENDING.findall(metrics)]
    synced_s = [float(value) for value in _SYNCED.findall(metrics)]
    return bool(pending and synced_s) and not any(pending) and max(synced_s) > since_s


def _completed(item: Mapping[str, Any]) -> Item:
    """An object as an API server returns it: with the defaults kube-proxy relies on."""
    made = {name: value for name, value in item.items() if name not in ("kind", "apiVersion")}
    metadata = {"uid": f"{item['kind']}-{item['metadata']['name']}", **item["metadata"]}
    made["metadata"] = metadata
    if item["kind"] == "EndpointSlice":
        # Without a name kube-proxy leaves a port out, as rule E3 says.
        made["ports"] = [{"name": "", "protocol": "TCP", **port} for port in item["ports"]]
    if item["kind"] == "Service":
        spec = dict(item["spec"])
        spec["ports"] = [{"protocol": "TCP", **port} for port in spec["ports"]]
        made["spec"] = {
            "type": "ClusterIP",
            "clusterIPs": [spec["clusterIP"]],
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "sessionAffinity": "None",
            "internalTrafficPolicy": "Cluster",
            **({"externalTrafficPolicy": "Cluster"} if spec.get("type") == "NodePort" else {}),
            **spec,
        }
    return made


def _node_object(node: Node) -> Item:
    return {
        "metadata": {"name": node.name, "uid": node.name},
        "spec": {"podCIDRs": [addressing.pod_cidrs(node.number).v4]},
        "status": {"addresses": [{"type": "InternalIP", "address": node.addresses.v4}]},
    }
