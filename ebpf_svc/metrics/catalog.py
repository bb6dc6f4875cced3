"""Every metric the agent exports: name, type, labels, buckets, meaning. The only place that has
them; the code that counts, the reference and the tests of dashboards and alerts look here.

Kube-proxy's keep its names, types and labels, so that what watches kube-proxy watches us (section
3.7 of the behaviour notes). Those of one mode are registered only where that mode serves. Left out:
`go_*`, because this is no Go; `kubernetes_build_info`, because alerts on version skew would take
ours for a Kubernetes version; registry counters of the Kubernetes libraries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

DURATION_BUCKETS = tuple(0.001 * 2**exponent for exponent in range(15))
"""Kube-proxy's: 1 ms to 16 s."""
PROGRAMMING_BUCKETS = (0.25, 0.5, *range(1, 60), *range(60, 120, 5), *range(120, 301, 30))
"""Kube-proxy's, for the way from a pod's change to the rules of every node."""
LATENCY_BUCKETS = tuple(0.0001 * 2**exponent for exponent in range(17))
"""Ours: 0.1 ms to 6.5 s; an endpoint change takes a few milliseconds."""

NOT_EBPF = ("iptables", "ipvs", "nftables")


class Kind(StrEnum):
    """Prometheus' types."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Spec:
    """One metric family."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    modes: tuple[str, ...] = ()
    """Registered only where one of these serves; empty = everywhere."""

    def serves(self, mode: str) -> bool:
        """Whether that mode has it."""
        return not self.modes or mode in self.modes


def _counter(name: str, text: str, *, labels: str = "", modes: tuple[str, ...] = ()) -> Spec:
    return Spec(name, Kind.COUNTER, text, tuple(labels.split()), modes=modes)


def _gauge(name: str, text: str, *, labels: str = "", modes: tuple[str, ...] = ()) -> Spec:
    return Spec(name, Kind.GAUGE, text, tuple(labels.split()), modes=modes)


def _histogram(
    name: str,
    text: str,
    buckets: tuple[float, ...],
    *,
    labels: str = "",
    modes: tuple[str, ...] = (),
) -> Spec:
    return Spec(name, Kind.HISTOGRAM, text, tuple(labels.split()), buckets, modes)


SYNC_DURATION = _histogram(
    "kubeproxy_sync_proxy_rules_duration_seconds",
    "Time of a sync: plan and apply. One apply carries both families, so both show the same.",
    DURATION_BUCKETS,
    labels="ip_family",
)
LAST_QUEUED = _gauge(
    "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
    "When the last sync was begun. Later than the last_timestamp for long: the sync hangs.",
    labels="ip_family",
)
LAST_SYNCED = _gauge(
    "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
    "When the last sync succeeded.",
    labels="ip_family",
)
ENDPOINT_CHANGES_PENDING = _gauge(
    "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
    "EndpointSlices that changed since the last successful sync.",
)
ENDPOINT_CHANGES = _counter(
    "kubeproxy_sync_proxy_rules_endpoint_changes_total",
    "Changes of EndpointSlices; several of one slice between two syncs count once.",
)
SERVICE_CHANGES_PENDING = _gauge(
    "kubeproxy_sync_proxy_rules_service_changes_pending",
    "Services that changed since the last successful sync.",
)
SERVICE_CHANGES = _counter(
    "kubeproxy_sync_proxy_rules_service_changes_total",
    "Changes of Services; several of one Service between two syncs count once.",
)
HEALTHZ = _counter(
    "kubeproxy_proxy_healthz_total",
    "Answers of /healthz.",
    labels="code",
)
LIVEZ = _counter(
    "kubeproxy_proxy_livez_total",
    "Answers of /livez.",
    labels="code",
)
PROGRAMMING_DURATION = _histogram(
    "kubeproxy_network_programming_duration_seconds",
    "From the change of a pod or Service, as its EndpointSlice tells, to this node's kernel.",
    PROGRAMMING_BUCKETS,
    labels="ip_family",
)
NO_LOCAL_ENDPOINTS = _gauge(
    "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
    "Service ports whose Local policy drops here, because endpoints are only elsewhere.",
    labels="traffic_policy ip_family",
)
FULL_SYNC_DURATION = _histogram(
    "kubeproxy_sync_full_proxy_rules_duration_seconds",
    "Time of syncs that looked at every rule.",
    DURATION_BUCKETS,
    labels="ip_family",
    modes=("iptables", "nftables"),
)
PARTIAL_SYNC_DURATION = _histogram(
    "kubeproxy_sync_partial_proxy_rules_duration_seconds",
    "Time of syncs that wrote only what changed.",
    DURATION_BUCKETS,
    labels="ip_family",
    modes=("iptables", "nftables"),
)
RESTORE_FAILURES = _counter(
    "kubeproxy_sync_proxy_rules_iptables_restore_failures_total",
    "Failures of iptables-restore.",
    labels="ip_family",
    modes=("iptables", "ipvs"),
)
PARTIAL_RESTORE_FAILURES = _counter(
    "kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total",
    "Failures of iptables-restore with only what changed.",
    labels="ip_family",
    modes=("iptables",),
)
IPTABLES_RULES = _gauge(
    "kubeproxy_sync_proxy_rules_iptables_total",
    "Rules of ours in the kernel.",
    labels="table ip_family",
    modes=("iptables",),
)
IPTABLES_RULES_WRITTEN = _gauge(
    "kubeproxy_sync_proxy_rules_iptables_last",
    "Rules the last sync wrote.",
    labels="table ip_family",
    modes=("iptables",),
)
IPTABLES_INVALID_DROPPED = _counter(
    "kubeproxy_iptables_ct_state_invalid_dropped_packets_total",
    "Packets dropped because conntrack calls them invalid; absent without nfacct.",
    modes=("iptables",),
)
IPTABLES_LOCALHOST_ACCEPTED = _counter(
    "kubeproxy_iptables_localhost_nodeports_accepted_packets_total",
    "Packets to node ports on loopback addresses; absent without nfacct.",
    modes=("iptables",),
)
CONNTRACK_DURATION = _histogram(
    "kubeproxy_conntrack_reconciler_sync_duration_seconds",
    "Time to delete stale conntrack entries.",
    DURATION_BUCKETS,
    labels="ip_family",
    modes=NOT_EBPF,
)
CONNTRACK_DELETED = _counter(
    "kubeproxy_conntrack_reconciler_deleted_entries_total",
    "Stale conntrack entries deleted.",
    labels="ip_family",
    modes=NOT_EBPF,
)
NFTABLES_SYNC_FAILURES = _counter(
    "kubeproxy_sync_proxy_rules_nftables_sync_failures_total",
    "Syncs nft refused.",
    labels="ip_family",
    modes=("nftables",),
)
NFTABLES_CLEANUP_FAILURES = _counter(
    "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total",
    "Deletions of old chains nft refused.",
    labels="ip_family",
    modes=("nftables",),
)
RELAY_EVENTS = _counter(
    "ebpf_svc_relay_events_total",
    "What befell flows of the relay: another backend was tried (retries), none answered (failed), "
    "open files were short (limited), an endpoint led back to the relay (loops).",
    labels="event",
    modes=("userspace",),
)
BUILD = _gauge(
    "ebpf_svc_build_info",
    "Always 1; which version runs.",
    labels="version python",
)
MODE = _gauge(
    "ebpf_svc_mode",
    "1 for the dataplane that serves.",
    labels="mode",
)
MODE_REFUSED = _gauge(
    "ebpf_svc_mode_refused",
    "1 for each dataplane that was preferred and cannot run here, with why.",
    labels="mode reason",
)
READY = _gauge(
    "ebpf_svc_ready",
    "1 once the kernel has been told everything for the first time.",
)
PLAN_DURATION = _histogram(
    "ebpf_svc_plan_duration_seconds",
    "Time to plan.",
    LATENCY_BUCKETS,
)
APPLY_DURATION = _histogram(
    "ebpf_svc_apply_duration_seconds",
    "Time to write a plan to the kernel. With resync: the kernel was read back first.",
    LATENCY_BUCKETS,
    labels="resync",
)
EVENT_TO_KERNEL = _histogram(
    "ebpf_svc_event_to_kernel_duration_seconds",
    "From a change's arrival in the agent to the end of the apply that carried it, the pause "
    "between two applies included; the oldest change of each apply counts.",
    LATENCY_BUCKETS,
)
WRITES = _counter(
    "ebpf_svc_writes_total",
    "Entries put or deleted in the kernel.",
    labels="map",
)
REPAIRS = _counter(
    "ebpf_svc_repairs_total",
    "Things a look at the kernel found missing or foreign, and put right.",
)
SYNC_FAILURES = _counter(
    "ebpf_svc_sync_failures_total",
    "Applies the dataplane refused as a whole.",
)
FAILED_PORTS = _gauge(
    "ebpf_svc_failed_service_ports",
    "Service ports the last sync could not write; the others were.",
    labels="ip_family",
)
PORTS = _gauge(
    "ebpf_svc_service_ports",
    "Service ports in the kernel.",
    labels="ip_family",
)
FRONTENDS = _gauge(
    "ebpf_svc_frontends",
    "Addresses clients can call.",
    labels="ip_family",
)
BACKENDS = _gauge(
    "ebpf_svc_backends",
    "Endpoints, each once for every service port.",
    labels="ip_family",
)
REFUSING = _gauge(
    "ebpf_svc_service_ports_without_endpoints",
    "Service ports that refuse connections because they have no endpoint anywhere.",
    labels="ip_family",
)
HEALTH_CHECKS = _gauge(
    "ebpf_svc_health_check_node_ports",
    "Health-check node ports planned.",
    labels="ip_family",
)
PROBLEMS = _gauge(
    "ebpf_svc_problems",
    "Objects skipped because they are wrong, and frontends two Services claim.",
    labels="kind",
)
DROPPED = _counter(
    "ebpf_svc_dropped_packets_total",
    "Packets to Services that were not forwarded. Counted by the kernel, also while no agent runs.",
    labels="reason",
)
MAP_ENTRIES = _gauge(
    "ebpf_svc_map_entries",
    "Entries of a table of the kernel, up to 10 s old.",
    labels="map",
)
MAP_CAPACITY = _gauge(
    "ebpf_svc_map_capacity",
    "Room of a table of the kernel. When full, one that evicts forgets its oldest entry, and "
    "another takes no new one.",
    labels="map evicts",
)
FLOWS = _gauge(
    "ebpf_svc_flows",
    "Flows that are alive, up to 10 s old. Connections the socket hooks translate are none.",
    labels="ip_family",
)
DRAINING_FLOWS = _gauge(
    "ebpf_svc_draining_flows",
    "Flows that are alive though their service port is gone.",
    labels="ip_family",
)
SERVICE_FLOWS = _gauge(
    "ebpf_svc_service_flows",
    "Flows that are alive, by service port; those without any are left out. In mode ipvs, where "
    "looking takes more than a second, those of the last read-back.",
    labels="namespace service port protocol ip_family",
)
SERVICE_CONNECTIONS = _counter(
    "ebpf_svc_service_connections_total",
    "Connections and flows opened to a service port since this node serves it, also those the "
    "socket hooks translate. Counted by the kernel, also while no agent runs; service ports "
    "without any are left out.",
    labels="namespace service port protocol ip_family",
)
SERVICE_PACKETS = _counter(
    "ebpf_svc_service_packets_total",
    "Packets to and from a service port that were translated. Packets of connections the socket "
    "hooks translated are not among them: they need no translation. What the kernel has merged "
    "(GSO, GRO) is one packet.",
    labels="namespace service port protocol ip_family",
)
SERVICE_BYTES = _counter(
    "ebpf_svc_service_bytes_total",
    "Bytes of the packets counted, with their link-layer headers.",
    labels="namespace service port protocol ip_family",
)
START_SECONDS = _gauge(
    "ebpf_svc_start_seconds",
    "How long the steps of this start took.",
    labels="step",
)
COLLECT_FAILURES = _counter(
    "ebpf_svc_collect_failures_total",
    "Collections in which the kernel did not give everything.",
)
SLI_HEALTH = _gauge(
    "kubernetes_healthcheck",
    "Whether a check passes, on /metrics/slis.",
    labels="name type",
)
SLI_HEALTH_TOTAL = _counter(
    "kubernetes_healthchecks_total",
    "Outcomes of a check, on /metrics/slis.",
    labels="name type status",
)

PROCESS = (
    _counter(
        "process_cpu_seconds_total",
        "CPU time of the agent.",
    ),
    _gauge(
        "process_resident_memory_bytes",
        "Memory of the agent that is in RAM.",
    ),
    _gauge(
        "process_virtual_memory_bytes",
        "Address space of the agent.",
    ),
    _gauge(
        "process_start_time_seconds",
        "When the agent started.",
    ),
    _gauge(
        "process_open_fds",
        "Open file descriptors.",
    ),
    _gauge(
        "process_max_fds",
        "Limit of open file descriptors.",
    ),
)
"""Made by the Prometheus library; here for the reference."""


def specs() -> Iterator[Spec]:
    """All of them, in the order of this file."""
    for value in globals().values():
        if isinstance(value, Spec):
            yield value
    yield from PROCESS
