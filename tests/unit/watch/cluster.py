"""A control plane fed from text: what the tests of manifests have in common."""

from __future__ import annotations

from textwrap import dedent

from ebpf_svc.model.service import Service, ServiceName
from ebpf_svc.model.snapshot import Problem
from ebpf_svc.watch.allocate import Allocator
from ebpf_svc.watch.controlplane import ControlPlane, ManifestState
from ebpf_svc.watch.manifests import read

CIDRS = ("10.96.0.0/16", "fd00:10:96::/112")
NODE_PORTS = (30000, 32767)


class Cluster:
    """One node's control plane; `apply` replaces the whole folder."""

    def __init__(
        self,
        *,
        cidrs: tuple[str, ...] = CIDRS,
        node_ports: tuple[int, int] = NODE_PORTS,
        node: str = "node1",
    ) -> None:
        self.allocator = Allocator(cidrs, node_ports)
        self._control = ControlPlane(node, self.allocator)

    def apply(self, *texts: str, complete: bool = True) -> ManifestState:
        """Reconcile with files a.yaml, b.yaml … of these texts."""
        files = [
            (f"{chr(ord('a') + i)}.yaml", read(f"{chr(ord('a') + i)}.yaml", dedent(text).encode()))
            for i, text in enumerate(texts)
        ]
        return self._control.reconcile(
            ((name, contents.parsed) for name, contents in files), complete=complete
        )


def apply(*texts: str) -> ManifestState:
    """What a fresh cluster makes of these files."""
    return Cluster().apply(*texts)


def service(name: str = "web", **spec: object) -> str:
    """A Service of one port 80, in YAML's flow style; fields of the spec replace the default's."""
    given = {"ports": [{"port": 80}], **spec}
    return f"{{apiVersion: v1, kind: Service, metadata: {{name: {name}}}, spec: {_flow(given)}}}\n"


def services(*names: str) -> str:
    """Several such Services in one file."""
    return "---\n".join(service(name) for name in names)


def only_service(state: ManifestState) -> Service:
    """The one Service there is."""
    assert state.problems == ()
    (found,) = state.services.values()
    return found


def named(name: str, namespace: str = "default") -> ServiceName:
    return ServiceName(namespace, name)


def told(problems: tuple[Problem, ...]) -> list[tuple[str, str]]:
    """Field and message of each problem."""
    return [(problem.field, problem.message) for problem in problems]


def _flow(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
