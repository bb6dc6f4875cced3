"""`ebpf-svc show`: what is served here, read from the kernel, with the names the agent knows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import click

from ebpf_svc.cli.output import age, print_json, print_table
from ebpf_svc.cli.settings import PLACE, settings_from, settings_options
from ebpf_svc.config import Settings
from ebpf_svc.dataplane.base import Dataplane
from ebpf_svc.dataplane.inspect import ShowsFlows, ShowsParts
from ebpf_svc.errors import UnsupportedHost
from ebpf_svc.host.lock import lock_holder
from ebpf_svc.model.desired import Backend, FrontendKey, FrontendKind, FrontendView
from ebpf_svc.modes import make_dataplane
from ebpf_svc.status import STATUS, NamedFrontend, read_json, read_names

KINDS = {
    FrontendKind.CLUSTER_IP: "ClusterIP",
    FrontendKind.NODE_PORT: "NodePort",
    FrontendKind.EXTERNAL_IP: "ExternalIP",
    FrontendKind.LOAD_BALANCER: "LoadBalancer",
}

Record = dict[str, Any]
"""One line of a topic, as `--json` prints it."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything `show` looked at, once."""

    settings: Settings
    agent_pid: int | None
    status: Mapping[str, Any]
    names: Mapping[FrontendKey, NamedFrontend]
    dataplane: Dataplane
    namespace: str | None

    def frontends(self) -> list[tuple[NamedFrontend | None, FrontendView]]:
        """What the kernel holds, sorted by name, kind and address."""
        found = [(self.names.get(key), view) for key, view in self.dataplane.read().items()]
        return sorted(
            (pair for pair in found if self._is_wanted(pair[0])),
            key=lambda pair: (
                _full_name(pair[0]),
                pair[1].frontend.kind,
                *_sortable(pair[1].frontend.key),
            ),
        )

    def _is_wanted(self, name: NamedFrontend | None) -> bool:
        return self.namespace is None or (name is not None and name.namespace == self.namespace)


def _full_name(name: NamedFrontend | None) -> str:
    """`namespace/name:port`; `?` for an address that no agent has named."""
    if name is None:
        return "?"
    return f"{name.namespace}/{name.name}" + (f":{name.port}" if name.port else "")


def _sortable(key: FrontendKey) -> tuple[bool, str, int, str]:
    return (":" in key.address, key.address, key.port, key.protocol.value)


def _state(backend: Backend) -> str:
    """Which new flows a backend gets."""
    if backend.in_cluster:
        return "active, local" if backend.in_local else "active"
    return "local only" if backend.in_local else "draining"


def services(scene: Scene) -> list[Record]:
    """One record per service port."""
    records: dict[tuple[str, str], Record] = {}
    for name, view in scene.frontends():
        key, kind = view.frontend.key, view.frontend.kind
        record = records.setdefault(
            (_full_name(name), key.protocol.value),
            {
                "service": _full_name(name),
                "protocol": key.protocol.value,
                "cluster_ips": [],
                "port": 0,
                "node_port": 0,
                "external": [],
                "affinity_s": view.affinity_s,
                "backends": set(),
                "active": set(),
            },
        )
        if kind is FrontendKind.CLUSTER_IP:
            record["cluster_ips"].append(key.address)
        if kind is FrontendKind.NODE_PORT:
            record["node_port"] = key.port
        else:
            record["port"] = key.port
        if kind in (FrontendKind.EXTERNAL_IP, FrontendKind.LOAD_BALANCER):
            record["external"].append(key.address)
        record["backends"].update((each.address, each.port) for each in view.backends)
        record["active"].update(
            (each.address, each.port) for each in view.backends if each.in_cluster or each.in_local
        )
    for record in records.values():
        record["backends"], record["active"] = len(record["backends"]), len(record["active"])
    return list(records.values())


def frontends(scene: Scene) -> list[Record]:
    """One record per address clients can call."""
    return [
        {
            "frontend": str(view.frontend.key),
            "kind": KINDS[view.frontend.kind],
            "service": _full_name(name),
            "backends": len(view.backends),
            "without_endpoints": "balances" if view.has_endpoints else "refuses",
            "local_for": _words(view.frontend.local_for),
            "masquerade_for": _words(view.frontend.masquerade_for),
            "source_ranges": list(view.frontend.source_ranges or ()),
            "affinity_s": view.affinity_s,
        }
        for name, view in scene.frontends()
    ]


def _words(sources: Any) -> list[str]:
    return [str(source.name).lower() for source in sources]


def backends(scene: Scene) -> list[Record]:
    """One record per endpoint of a service port."""
    records: dict[tuple[str, str, str, int], Record] = {}
    for name, view in scene.frontends():
        service, protocol = _full_name(name), view.frontend.key.protocol.value
        for backend in view.backends:
            records[(service, protocol, backend.address, backend.port)] = {
                "service": service,
                "protocol": protocol,
                "address": backend.address,
                "port": backend.port,
                "state": _state(backend),
            }
    return [record for _, record in sorted(records.items())]


def flows(scene: Scene) -> list[Record]:
    """One record per flow the dataplane keeps."""
    if not isinstance(scene.dataplane, ShowsFlows):
        raise UnsupportedHost([f"mode {scene.dataplane.name} keeps no flows: see conntrack -L"])
    records = []
    for flow in scene.dataplane.flows():
        name = scene.names.get(flow.frontend)
        if scene.namespace is not None and (name is None or name.namespace != scene.namespace):
            continue
        records.append(
            {
                "client": _address(flow.client, flow.client_port),
                "frontend": str(flow.frontend),
                "service": _full_name(name),
                "backend": _address(flow.backend, flow.backend_port),
                "state": flow.state,
                "idle_s": flow.idle_s,
            }
        )
    return sorted(records, key=lambda record: (record["service"], record["client"]))


def _address(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def problems(scene: Scene) -> list[Record]:
    """One record per object that was skipped or service port that could not be written."""
    skipped = list(scene.status.get("problems", ()))
    failed = [
        {"source": "kernel", "object": each["service"], "field": "", "message": each["reason"]}
        for each in scene.status.get("failed", ())
    ]
    return failed + skipped


def kernel(scene: Scene) -> list[Record]:
    """One record per map, program and rule of ours."""
    if not isinstance(scene.dataplane, ShowsParts):
        raise UnsupportedHost([f"mode {scene.dataplane.name} cannot list what it has installed"])
    return [
        {"kind": part.kind, "name": part.name, "place": part.place, "detail": part.detail}
        for part in scene.dataplane.parts()
    ]


TOPICS: Mapping[str, Callable[[Scene], list[Record]]] = {
    "services": services,
    "frontends": frontends,
    "backends": backends,
    "flows": flows,
    "problems": problems,
    "kernel": kernel,
}
EMPTY = {
    "services": "No service is served here.",
    "frontends": "No address is served here.",
    "backends": "No service here has an endpoint.",
    "flows": "No flow is alive.",
    "problems": "No problem is known.",
    "kernel": "Nothing of ours is in this kernel.",
}


@click.command(name="show")
@click.argument("topic", type=click.Choice(list(TOPICS)), default="services")
@click.option("-n", "--namespace", metavar="NS", help="Only services of this namespace.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
@settings_options(*PLACE)
def command(topic: str, namespace: str | None, as_json: bool, **options: Any) -> None:
    """Show what this node serves, as the kernel holds it.

    Works also when no agent runs: traffic goes on with what the kernel holds, and so does show.
    Names come from what the agent last wrote down; an address without one is called `?`.

    \b
    Topics:
      services    each service port: addresses, node port, endpoints (the default)
      frontends   each address: who is masqueraded, kept local, filtered
      backends    each endpoint and whether it gets new flows
      flows       each client's flow and the backend it has
      problems    objects that were skipped and why
      kernel      every map, program and rule of ours

    \b
    Example:
      ebpf-svc show backends -n shop
      ebpf-svc show services --json | jq '.services[] | select(.active == 0)'

    Next: `ebpf-svc show problems` when something is missing here.
    """
    scene = look(settings_from(options), namespace)
    records = TOPICS[topic](scene)
    if as_json:
        print_json({"agent": agent_record(scene), topic: records})
        return
    click.echo(_headline(scene))
    if not records:
        click.echo(EMPTY[topic])
    else:
        print_table(
            [column.replace("_", " ") for column in records[0]],
            [[_cell(value) for value in record.values()] for record in records],
            styles=("cyan",),
        )
    if topic != "problems" and (count := len(problems(scene))):
        click.echo(f"{count} problem{'s'[: count > 1]}: ebpf-svc show problems")


def look(settings: Settings, namespace: str | None = None) -> Scene:
    """Read what an agent wrote down and get ready to ask the kernel."""
    status = read_json(settings.run_dir / STATUS) or {}
    return Scene(
        settings=settings,
        agent_pid=lock_holder(settings.run_dir),
        status=status,
        names=read_names(settings.run_dir),
        dataplane=make_dataplane(status.get("mode", "ebpf"), settings),
        namespace=namespace,
    )


def agent_record(scene: Scene) -> Record:
    """The agent in the words of `--json`."""
    kept = {
        key: scene.status[key]
        for key in ("mode", "refused", "revision", "node")
        if key in scene.status
    }
    return {"running": scene.agent_pid is not None, "pid": scene.agent_pid, **kept}


def _headline(scene: Scene) -> str:
    status = scene.status
    if scene.agent_pid is None:
        return "No agent runs here; this is what the kernel holds." + (
            f" Last sync {age(time.time() - status['last_sync_s'])} ago." if status else ""
        )
    if not status.get("ready"):
        return f"The agent (pid {scene.agent_pid}) has not synced yet."
    refused = [f"Mode {mode} cannot run: {why}" for mode, why in status.get("refused", {}).items()]
    line = (
        f"Agent {scene.agent_pid} on {status['node']}, mode {status['mode']}, revision "
        f"{status['revision']}, last sync {age(time.time() - status['last_sync_s'])} ago."
    )
    return "\n".join([*refused, line])


def _cell(value: Any) -> str:
    """A value as a table shows it: lists joined, nothing as a dash."""
    if isinstance(value, Iterable) and not isinstance(value, str):
        value = ",".join(map(str, value))
    return str(value) if value not in ("", 0) else "-"
