"""The agent's settings: each field says unit, default and why.

Validated once, here, at the edge; the rest of the program trusts them. Fields may be given in a
YAML file, and the
command line overrides single ones.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from ebpf_svc.model.net import Family


class SocketLB(StrEnum):
    """Which processes the socket hooks translate at connect time."""

    FULL = "full"
    HOST_ONLY = "hostOnly"
    OFF = "off"


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EbpfSettings(_Settings):
    """The eBPF dataplane on this node."""

    bpffs: Path = Path("/sys/fs/bpf")
    """Where the BPF file system is mounted; pins live in `ebpf-svc/v<LAYOUT_VERSION>/` below it."""
    cgroup_root: Path | None = None
    """Socket hooks act on processes below this cgroup; None = the root of the cgroup2 hierarchy,
    found in /proc/mounts.
    """
    cache_dir: Path = Path("/var/cache/ebpf-svc")
    """Compiled programs, keyed by sources, constants and compiler: a restart then needs no
    compiler.
    """
    socket_lb: SocketLB = SocketLB.FULL
    """full: pods and host; hostOnly: pods are left to tc (meshes and sandboxes see the VIP); off:
    tc alone.
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
    flow_entries: int = Field(default=262_144, ge=1024)
    """Flows kept, each family; least recently used go first. 256 Ki costs 40 MiB (IPv4) and inserts
    twice as fast as 1 Mi.
    """
    affinity_entries: int = Field(default=65_536, ge=64)
    """Clients remembered for ClientIP affinity, each family."""
    frontend_entries: int = Field(default=131_072, ge=64)
    """Addresses of services, each family."""
    backend_entries: int = Field(default=262_144, ge=64)
    """Endpoints of service ports, each family."""
    slot_entries: int = Field(default=2_097_152, ge=1024)
    """Slots of all lists and Maglev tables, both families; 8 bytes each."""
    maglev: bool = True
    """Choose backends of external frontends by the client's hash, the same on every node."""
    maglev_slots_per_backend: int = Field(default=100, ge=10, le=1000)
    """A table is the next prime above this many slots a backend: 100 keeps the imbalance within 1
    %.
    """
    maglev_seed: str = "ebpf-svc"
    """Same seed, same tables: give every node of a cluster the same."""


class Settings(_Settings):
    """Everything `ebpf-svc run` can be told."""

    node_name: str = ""
    """Name of this node as Nodes and endpoints spell it; empty = the host name, lower case (W7)."""
    manifests: Path | None = None
    """Folder of manifests to serve."""
    state_dir: Path = Path("/var/lib/ebpf-svc")
    """Allocated cluster IPs and node ports, so that they survive a restart."""
    run_dir: Path = Path("/run/ebpf-svc")
    """Lock and status of the running agent; `show` reads it."""
    families: tuple[Family, ...] = (Family.V4, Family.V6)
    cluster_cidrs: tuple[str, ...] = ()
    """Pod addresses of the cluster: a source inside is a pod (D1 ClusterCIDR), else an outside
    client. Empty = no detector: off-cluster traffic to cluster IPs is not masqueraded (D2)."""
    service_cidrs: tuple[str, ...] = ("10.96.0.0/16", "fd00:10:96::/112")
    """Ranges cluster IPs are allocated from in standalone mode, one a family."""
    node_port_range: tuple[int, int] = (30000, 32767)
    """Node ports allocated or accepted in standalone mode, both ends included."""
    node_port_addresses: tuple[str, ...] = ()
    """CIDRs or the words primary, localhost, all (A1-A5, Q3); empty = all local addresses."""
    masquerade_all: bool = False
    """Masquerade all traffic to cluster IPs (D3)."""
    allow_external_ips: bool = True
    """Honour spec.externalIPs (F8)."""
    min_sync_period_s: float = Field(default=0.02, ge=0)
    """Shortest pause between the end of one apply and the start of the next (R2): a rollout becomes
    few writes.
    """
    resync_period_s: float = Field(default=30.0, gt=0)
    """How often the kernel is read back and drift repaired."""
    retry_max_s: float = Field(default=30.0, gt=0)
    """Longest pause before a failed apply is tried again; the first is 0.1 s and each doubles."""
    ebpf: EbpfSettings = EbpfSettings()
