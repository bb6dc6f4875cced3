"""The nftables dataplane: kube-proxy's tables `ip kube-proxy` and `ip6 kube-proxy`, over netlink.

Connections live in the kernel's connection tracking: what was translated stays so, whatever the
rules say by then. One lock covers the tables; whoever reads has a socket of its own.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing

from ebpf_svc.config import Settings
from ebpf_svc.dataplane.base import ApplyReport, Reconciled, Support
from ebpf_svc.dataplane.inspect import KernelPart, Series
from ebpf_svc.dataplane.netfilter.pods import pod_match
from ebpf_svc.dataplane.netfilter.stale import StaleFlows
from ebpf_svc.dataplane.nftables import loopback, probe, views
from ebpf_svc.dataplane.nftables.content import Content
from ebpf_svc.dataplane.nftables.family import Blamed, FamilyTable, NotTaken, Written
from ebpf_svc.dataplane.nftables.frame import frame
from ebpf_svc.dataplane.nftables.layout import LAYOUTS, NAT, Layout
from ebpf_svc.dataplane.nftables.writer import Writer
from ebpf_svc.errors import ApplyError, DataplaneError, UnsupportedHost
from ebpf_svc.host.nf_dump import base_chains, has_chain, read_table
from ebpf_svc.host.nf_owner import NAME as TABLE
from ebpf_svc.host.nf_owner import SIGN_CHAIN, is_ours, is_signed
from ebpf_svc.host.nfnetlink import Refused, Socket
from ebpf_svc.model.desired import DesiredState, FrontendKey, FrontendView, PlanKey, ServicePlan
from ebpf_svc.model.identity import differences
from ebpf_svc.model.net import Family

_NFPROTO_INET = 1
_TRIES = 5
_METRIC = "kubeproxy_sync_proxy_rules_nftables_"
Plans = Mapping[PlanKey, ServicePlan]


class NftablesDataplane:
    """The dataplane of one node; works in the network namespace of the thread that opens it."""

    name = "nftables"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.RLock()
        self._writer: Writer | None = None
        self._tables: dict[Family, FamilyTable] = {}
        self._frames: dict[Family, Content] = {}
        self._applied: Plans = {}
        """What the tables hold; plans that failed are as they were before."""
        self._in_doubt = True
        """The tables must be read before anything is written."""
        self._stale = StaleFlows(settings.families)
        self._routes_loopback = False
        self._is_marked = False
        """The table says that we turned route_localnet on."""
        self._service_cidrs: tuple[str, ...] = ()

    def check(self) -> Support:
        """Look at this host by a transaction that undoes itself."""
        return Support(self.name, tuple(probe.checks(self._layouts)))

    def open(self) -> None:
        """Open a socket; what the tables hold is taken over by the first apply.

        Raises:
            UnsupportedHost: this machine lacks something; each thing missing is a sentence.
        """
        support = self.check()
        if not support.ok:
            raise UnsupportedHost(support.missing)
        settings = self._settings
        with self._lock:
            self.close()
            self._writer = Writer()
            for layout in self._layouts:
                pods = pod_match(settings, layout.family)
                self._tables[layout.family] = FamilyTable(layout, self._writer, pods=pods)
            self._is_marked = _has_marker(self._writer.socket)
            # With an API server the ranges are its own, whatever ours say.
            self._make_frames(settings.service_cidrs if settings.manifests else ())
            self._applied, self._in_doubt = {}, True
            self._stale, self._routes_loopback = StaleFlows(settings.families), False

    def _make_frames(self, service_cidrs: tuple[str, ...]) -> None:
        """Render what does not depend on service ports."""
        settings = self._settings
        self._service_cidrs = service_cidrs
        for layout in self._layouts:
            content = frame(
                layout,
                mark=1 << settings.masquerade_bit,
                pods=pod_match(settings, layout.family),
                masquerade_all=settings.masquerade_all,
                service_cidrs=service_cidrs,
                localhost=settings.localhost_node_ports,
            )
            if self._is_marked and layout.family is Family.V4:
                content.chains[loopback.MARKER] = loopback.marker()
            self._frames[layout.family] = content

    def apply(self, desired: DesiredState, *, resync: bool = False) -> ApplyReport:
        """Write the difference to what was applied last; raises DataplaneError."""
        with self._lock:
            if self._writer is None:
                raise DataplaneError("apply before open")
            try:
                return self._apply(self._writer, desired, resync=resync)
            except OSError as error:
                self._doubt(self._writer)
                raise DataplaneError(f"nf_tables: {error.strerror}") from error
            except DataplaneError:
                self._doubt(self._writer)
                raise

    def _apply(self, writer: Writer, desired: DesiredState, *, resync: bool) -> ApplyReport:
        for table in self._tables.values():
            table.tidy()
        keys = list(differences(self._applied, desired.plans))
        if desired.service_cidrs and desired.service_cidrs != self._service_cidrs:
            self._make_frames(desired.service_cidrs)
            self._in_doubt = True
        must_read = self._in_doubt or (resync and not writer.is_untouched())
        failed: Mapping[PlanKey, str] = {}
        done: list[Written] = []
        is_news = True
        if not must_read:
            try:
                done = self._update(keys, desired.plans)
            except (Refused, NotTaken) as error:
                # Somebody changed what we built upon, or the kernel is an old one.
                must_read, is_news = True, isinstance(error, Refused)
        if must_read:
            done, failed = self._write_whole(writer, desired.plans)
        self._in_doubt = False
        self._applied = self._without(desired.plans, failed)
        if not self._routes_loopback and loopback.is_needed(map(self._applied.get, keys)):
            self._route_loopback(writer)
        changed = set[PlanKey]().union(*(written.changed for written in done))
        reconciled: tuple[Reconciled, ...] = ()
        if not failed:
            reconciled = self._stale.reconcile(desired)
        return ApplyReport(
            writes=sum(written.writes for written in done),
            changed=len(changed),
            failed=tuple(ApplyError(str(key), reason) for key, reason in failed.items()),
            repaired=tuple(what for written in done for what in written.repaired if is_news),
            details=_sum(written.details for written in done),
            reconciled=reconciled,
        )

    def _route_loopback(self, writer: Writer) -> None:
        """Let node ports on 127.0.0.1 answer; the guard was written with the first apply."""
        if loopback.turn_on():
            self._is_marked = True
            self._make_frames(self._service_cidrs)
            writer.commit([LAYOUTS[Family.V4].table.add_chain(loopback.marker().chain)])
        self._routes_loopback = True

    def _update(self, keys: Iterable[PlanKey], plans: Plans) -> list[Written]:
        """Write what changed, family by family; raises Refused."""
        by_family: dict[Family, list[PlanKey]] = {}
        for key in keys:
            by_family.setdefault(key.family, []).append(key)
        return [
            self._tables[family].update(keys, self._applied, plans)
            for family, keys in by_family.items()
            if family in self._tables
        ]

    def _write_whole(
        self, writer: Writer, plans: Plans
    ) -> tuple[list[Written], Mapping[PlanKey, str]]:
        """Read each table and make it hold these plans, but for those the kernel refuses."""
        writer.start_check()
        done: list[Written] = []
        failed: dict[PlanKey, str] = {}
        for family, table in self._tables.items():
            for _ in range(_TRIES):
                wanted = {
                    key: plan
                    for key, plan in self._without(plans, failed).items()
                    if key.family is family
                }
                try:
                    done.append(table.write_whole(self._frames[family], wanted))
                    break
                except Blamed as blamed:
                    if blamed.owners.keys() <= failed.keys():
                        raise DataplaneError(str(blamed)) from blamed
                    failed |= blamed.owners
            else:
                raise DataplaneError("the kernel refuses one service after the other")
        return done, failed

    def _without(self, plans: Plans, failed: Mapping[PlanKey, str]) -> Plans:
        """These plans, those that failed as they were before."""
        if not failed:
            return plans
        kept = {key: plan for key, plan in plans.items() if key not in failed}
        kept |= {key: self._applied[key] for key in failed if key in self._applied}
        return kept

    def _doubt(self, writer: Writer) -> None:
        self._in_doubt = True
        writer.doubt()

    def view(self, desired: DesiredState) -> dict[FrontendKey, FrontendView]:
        """See `views.view` for what tables have no place for."""
        return views.view(desired)

    def read(self) -> dict[FrontendKey, FrontendView]:
        """What the tables hold; works without `open`, beside a running agent."""
        found: dict[FrontendKey, FrontendView] = {}
        with closing(Socket()) as socket:
            for layout in self._layouts:
                held = read_table(socket, layout.table)
                if held is not None and is_signed(held):
                    found |= views.read(held, layout)
        return found

    def parts(self) -> list[KernelPart]:
        """Both tables with what is in them; works without `open`."""
        return list(self._parts())

    def _parts(self) -> Iterator[KernelPart]:
        with closing(Socket()) as socket:
            for layout in self._layouts:
                held = read_table(socket, layout.table)
                if held is None or not is_signed(held):
                    continue
                place = f"table {'ip' if layout.family is Family.V4 else 'ip6'} {TABLE}"
                for chain in sorted(held.chains.values(), key=lambda chain: chain.name):
                    if chain.hook is not None:
                        detail = f"type {chain.hook.type}, priority {chain.hook.priority}"
                        yield KernelPart("base chain", chain.name, place, detail)
                count = len(held.chains), sum(map(len, held.rules.values()))
                yield KernelPart("chains", "all", place, f"{count[0]} with {count[1]} rules")
                for name, elements in sorted(held.elements.items()):
                    kind = "map" if held.sets[name].data else "set"
                    yield KernelPart(kind, name, place, f"{len(elements)} elements")

    def retire(self) -> bool:
        """Serve no new connections.

        Open ones are translated by connection tracking as long as some chain of type nat is there;
        where no other dataplane has one, ours stay, empty.
        """
        with closing(Socket()) as socket:
            done = [self._retire(socket, layout) for layout in self._layouts]
        return all(done)

    def _retire(self, socket: Socket, layout: Layout) -> bool:
        if not is_ours(socket, layout.table):
            return True
        held = read_table(socket, layout.table)
        if held is not None:
            maps = (name for name, one in held.sets.items() if one.data)
            socket.commit([layout.table.flush_set(name) for name in maps])
        families = (layout.table.family, _NFPROTO_INET)
        return any(
            kind == NAT and table != TABLE
            for family in families
            for table, kind in base_chains(socket, family)
        )

    def series(self) -> Iterator[Series]:
        """kube-proxy's counters of this mode; nothing while not open."""
        for family, table in list(self._tables.items()):
            labels = {"ip_family": family.label}
            yield Series(f"{_METRIC}sync_failures_total", labels, table.sync_failures)
            yield Series(f"{_METRIC}cleanup_failures_total", labels, table.cleanup_failures)

    def hand_over(self) -> None:
        """Make our tables a kube-proxy's, whose first full sync takes them over in place.

        It has no node ports on loopback, and removes what guards them.
        """
        self.close()
        with closing(Socket()) as socket:
            if _has_marker(socket):
                loopback.turn_off()
                marker = LAYOUTS[Family.V4].table.remove_chain(loopback.MARKER)
                socket.commit([marker])
            for layout in LAYOUTS.values():
                if is_ours(socket, layout.table):
                    socket.commit([layout.table.remove_chain(SIGN_CHAIN.name)])

    def close(self) -> None:
        """Stop working; the tables go on (Z2)."""
        with self._lock:
            if self._writer is not None:
                self._writer.close()
            self._writer = None
            self._tables.clear()

    def cleanup(self) -> None:
        """Remove our tables, whoever left them; raises DataplaneError."""
        self.close()
        try:
            with closing(Socket()) as socket:
                # The setting first: afterwards nothing of ours guards it.
                if _has_marker(socket):
                    loopback.turn_off()
                for layout in LAYOUTS.values():
                    if is_ours(socket, layout.table):
                        socket.commit([layout.table.remove()])
        except Refused as refused:
            if not refused.has_only(errno.ENOENT):
                raise DataplaneError(f"table {TABLE} could not be removed: {refused}") from refused
        except OSError as error:
            raise DataplaneError(f"nf_tables: {error.strerror}") from error

    @property
    def _layouts(self) -> list[Layout]:
        return [LAYOUTS[family] for family in self._settings.families]


def _has_marker(socket: Socket) -> bool:
    table = LAYOUTS[Family.V4].table
    return is_ours(socket, table) and has_chain(socket, table, loopback.MARKER)


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for each in counts:
        for name, count in each.items():
            total[name] = total.get(name, 0) + count
    return total
