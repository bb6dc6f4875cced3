"""Settings of the eBPF dataplane."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from ebpf_svc.config.values import Section


class SocketLB(StrEnum):
    """Which processes the socket hooks translate at connect time."""

    FULL = "full"
    HOST_ONLY = "hostOnly"
    OFF = "off"


def _switch(value: Any) -> Any:
    """YAML reads `on` and `off` as true and false."""
    if isinstance(value, bool) or value == "on":
        return SocketLB.FULL if value else SocketLB.OFF
    return value


class EbpfSettings(Section):
    """The eBPF dataplane on this node."""

    bpffs: Path = Path("/sys/fs/bpf")
    """Where the BPF file system is mounted; pins live in `ebpf-svc/v<LAYOUT_VERSION>/` below it."""
    cgroup_root: Path | None = None
    """Socket hooks act on processes below this cgroup; none = the root of the cgroup2 hierarchy,
    found in /proc/mounts.
    """
    cache_dir: Path = Path("/var/cache/ebpf-svc")
    """Compiled programs, keyed by sources, constants and compiler: a restart then needs no
    compiler.
    """
    socket_lb: Annotated[SocketLB, BeforeValidator(_switch)] = SocketLB.FULL
    """full (or on): pods and host, but the host alone with `fast_path`, which is faster for pods;
    hostOnly: pods are left to tc (meshes and sandboxes see the VIP); off: tc alone, for host
    processes where their packets leave, and no fast path.
    """
    pod_devices: tuple[str, ...] = ("veth*", "cali*", "lxc*", "eni*", "azv*", "gke*", "vz-*")
    """Patterns of the host side of pod interfaces. A device that also matches `node_devices` is a
    node device.
    """
    node_devices: tuple[str, ...] = (
        "eth*",
        "en[ospx]*",
        "bond*",
        "wl*",
        "ib*",
        "team*",
        "flannel*",
        "vxlan*",
        "geneve*",
        "tunl*",
        "wg*",
        "cilium_vxlan",
        "antrea-gw*",
    )
    """Patterns of devices through which other machines are reached: NICs and the CNI's tunnels."""
    fast_path: bool = False
    """Send packets of services straight to the device they leave by, past netfilter and routing,
    where both directions of a flow can take that way. Faster than forwarding; but whatever filters
    forwarded packets on this node (network policies in netfilter) does not see them, so it is for
    nodes that have none.
    """
    xdp: bool = False
    """Forward established flows between other machines in the driver of the NIC, before the kernel
    makes a buffer of a packet; with `fast_path` only, and on NICs whose driver can.
    """
    flow_entries: int = Field(default=262_144, ge=1024)
    """Flows kept, each family; least recently used go first. 256 Ki costs 40 MiB (IPv4) and inserts
    twice as fast as 1 Mi.
    """
    affinity_entries: int = Field(default=65_536, ge=64)
    """Clients remembered for ClientIP affinity, each family."""
    frontend_entries: int = Field(default=131_072, ge=64)
    """Addresses of services, each family."""
    backend_entries: int = Field(default=131_072, ge=64)
    """Endpoints of service ports, each family."""
    slot_entries: int = Field(default=1_048_576, ge=1024)
    """Slots of all lists and Maglev tables, both families; 8 bytes each, which count as the agent's
    memory too, since it maps them.
    """
    maglev: bool = True
    """Choose backends of external frontends by the client's hash, the same on every node."""
    maglev_slots_per_backend: int = Field(default=100, ge=10, le=1000)
    """A table is the next prime above this many slots a backend: 100 keeps the imbalance within 1
    %.
    """
    maglev_seed: str = "ebpf-svc"
    """Same seed, same tables: give every node of a cluster the same."""
