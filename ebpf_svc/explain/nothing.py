"""Nothing is served at an address: what is near, and what then becomes of the packet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from ebpf_svc.explain.model import Verdict
from ebpf_svc.explain.scene import Scene
from ebpf_svc.model.desired import FrontendKey, FrontendKind, FrontendView
from ebpf_svc.model.net import family_of, is_inside
from ebpf_svc.plan.options import external_ip_ranges
from ebpf_svc.status import NamedFrontend

LEFT_ALONE = "The packet is left alone: it is routed as if there were no services."
_AT_CLUSTER_IP = {"nftables": Verdict.REFUSED, "ipvs": Verdict.REFUSED}
"""What modes do with other ports of a cluster IP; those left out do nothing."""
_UNALLOCATED = {"nftables": Verdict.DROPPED}
"""And with addresses of the range that no Service has."""


def verdict(scene: Scene, key: FrontendKey) -> Verdict:
    """What becomes of a packet to an address and port where nothing is served (P16)."""
    if _cluster_ip(scene, key) is not None:
        return _AT_CLUSTER_IP.get(scene.mode, Verdict.UNTOUCHED)
    is_free = not any(other.address == key.address for other in scene.views)
    if is_free and is_inside(key.address, _service_cidrs(scene)):
        return _UNALLOCATED.get(scene.mode, Verdict.UNTOUCHED)
    return Verdict.UNTOUCHED


def sentences(scene: Scene, key: FrontendKey) -> Iterator[str]:
    """Say why there is no frontend at `key`, as far as it shows, and what happens then."""
    views, names = scene.views, scene.names
    same = {other: view for other, view in views.items() if other.address == key.address}
    node_ports = {
        other
        for other, view in views.items()
        if view.frontend.kind is FrontendKind.NODE_PORT
        and (other.port, other.protocol) == (key.port, key.protocol)
        and family_of(other.address) is family_of(key.address)
    }
    is_local = key.address in scene.around.local_addresses
    cluster_ip = _cluster_ip(scene, key)
    yield f"No service is served at {key}."
    if endpoint := _endpoint(key, views, names):
        yield f"It is an endpoint of {endpoint} itself: called directly, no service is involved."
    elif cluster_ip is not None:
        yield (
            f"{key.address} is the cluster IP of {_service(names, cluster_ip)}, which has no such "
            f"port: it has {_ports(same)}."
        )
        yield _consequence(scene, key)
        return
    elif refused := _refused_external_ip(scene, key):
        yield f"It is an external IP of {refused}, but allowExternalIPs does not allow it (F8)."
    elif node_ports and is_local:
        where = ", ".join(sorted({other.address for other in node_ports}))
        yield (
            f"{key.port} is a node port of {_service(names, min(node_ports))}, but not at this "
            f"address: nodePortAddresses selects {where} (P15)."
        )
    elif node_ports:
        yield (
            f"{key.port} is a node port of {_service(names, min(node_ports))}, but {key.address} "
            "is no address of this node: a foreign address is not touched (P15)."
        )
    elif is_local:
        yield f"{key.address} is an address of this node; no Service has node port {key.port}."
    elif same:
        yield f"Other ports are served there: {_ports(same)}."
    elif is_inside(key.address, _service_cidrs(scene)):
        yield "It is in the range of cluster IPs, and no Service has it."
        yield _consequence(scene, key)
        return
    yield LEFT_ALONE


def _consequence(scene: Scene, key: FrontendKey) -> str:
    if (found := verdict(scene, key)) is Verdict.UNTOUCHED:
        return LEFT_ALONE + " Usually nobody answers (P16)."
    return f"In mode {scene.mode} it is {found.value} (P16)."


def _cluster_ip(scene: Scene, key: FrontendKey) -> FrontendKey | None:
    """A frontend of the cluster IP that is called at a port it does not have."""
    for other, view in scene.views.items():
        if other.address == key.address and view.frontend.kind is FrontendKind.CLUSTER_IP:
            return other
    return None


def _service_cidrs(scene: Scene) -> tuple[str, ...]:
    """Where cluster IPs come from: as the API says, else as the settings do."""
    snapshot = scene.known.snapshot
    return (snapshot.service_cidrs if snapshot else ()) or scene.settings.service_cidrs


def _ports(keys: Iterable[FrontendKey]) -> str:
    return ", ".join(sorted(f"{key.port}/{key.protocol}" for key in keys))


def _service(names: Mapping[FrontendKey, NamedFrontend], key: FrontendKey) -> str:
    named = names.get(key)
    return f"{named.namespace}/{named.name}" if named else "a Service"


def _endpoint(
    key: FrontendKey,
    views: Mapping[FrontendKey, FrontendView],
    names: Mapping[FrontendKey, NamedFrontend],
) -> str:
    """The service of which this is an endpoint; empty for none."""
    for other, view in views.items():
        if other.protocol is key.protocol:
            for backend in view.backends:
                if (backend.address, backend.port) == (key.address, key.port):
                    return _service(names, other)
    return ""


def _refused_external_ip(scene: Scene, key: FrontendKey) -> str:
    """The services that would be called there if the settings allowed it; empty for none."""
    snapshot = scene.known.snapshot
    if snapshot is None or is_inside(key.address, external_ip_ranges(scene.settings)):
        return ""
    wanted = (key.port, key.protocol)
    names = (
        str(name)
        for name, each in snapshot.services.items()
        if key.address in each.external_ips
        and wanted in ((port.port, port.protocol) for port in each.ports)
    )
    return ", ".join(sorted(names))
