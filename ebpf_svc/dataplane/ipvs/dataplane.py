"""The ipvs dataplane: virtual and real servers of the kernel, the way kube-proxy's ipvs mode has
them.

A change is the difference of two renderings of its service ports, and costs as many messages with
ten thousand services as with one (unlike V17). At the start, on resync and after a refusal all is
read back and compared. Real servers that leave with connections rest with weight 0; each resync
takes away those whose connections have ended (V11).
"""

from __future__ import annotations

import ipaddress
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from ebpf_svc.config import Settings
from ebpf_svc.dataplane.base import ApplyReport, Support
from ebpf_svc.dataplane.inspect import FlowCounts, KernelPart, Series
from ebpf_svc.dataplane.ipvs import check, firewall, flows, readback, render, state, tuning
from ebpf_svc.dataplane.ipvs.connections import Connections
from ebpf_svc.dataplane.ipvs.firewall import Firewall
from ebpf_svc.dataplane.ipvs.kernel import Kernel, Refused
from ebpf_svc.dataplane.ipvs.render import NOTHING, Options, Share
from ebpf_svc.dataplane.ipvs.state import Found, Ledger
from ebpf_svc.dataplane.netfilter.stale import StaleFlows
from ebpf_svc.errors import ApplyError, CommandError, DataplaneError, UnsupportedHost
from ebpf_svc.host import dummy, ipvs
from ebpf_svc.host.command import run
from ebpf_svc.host.ipvs import ServerKey
from ebpf_svc.host.kubeproxy import LINK
from ebpf_svc.model.desired import (
    DesiredState,
    FrontendKey,
    FrontendView,
    HealthCheck,
    PlanKey,
    ServicePlan,
)
from ebpf_svc.model.identity import differences
from ebpf_svc.model.net import Family

_FAILURES = "kubeproxy_sync_proxy_rules_iptables_restore_failures_total"


@dataclass(slots=True)
class _Running:
    """What is there between `open` and `close`."""

    kernel: Kernel
    families: tuple[Family, ...]
    firewall: Firewall
    stale: StaleFlows
    ledger: Ledger = field(default_factory=Ledger)
    written: Mapping[PlanKey, ServicePlan] = field(default_factory=dict)
    checks: tuple[HealthCheck, ...] = ()
    elsewhere: frozenset[str] = frozenset()
    """Addresses other devices had when the kernel was read last."""
    adopting: bool = True
    """What is found stems from a run before us, so differences are no damage."""
    in_doubt: bool = True
    """The ledger may be wrong: read the kernel before the next change."""
    connections: Connections = field(default_factory=Connections)


class IpvsDataplane:
    """The dataplane of one node; works in the network namespace of the thread that calls."""

    name = "ipvs"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._options = Options.from_settings(settings)
        self._excluded = [ipaddress.ip_network(each) for each in settings.ipvs.exclude_cidrs]
        self._running: _Running | None = None
        self._lock = threading.RLock()
        """Sockets are for one thread at a time: who reads and who applies take turns."""

    def check(self) -> Support:
        """Look for IPVS, sets, dummy devices and iptables; what is tried is undone."""
        return Support(self.name, tuple(check.checks(self._settings)))

    def open(self) -> None:
        """Load modules, make device and sets; the first `apply` takes over what is there.

        Raises:
            UnsupportedHost: this machine lacks something; each thing missing is a sentence.
            DataplaneError: it lacks nothing known, and still something failed.
        """
        try:
            self._running = self._open()
        except (DataplaneError, OSError) as error:
            missing = self.check().missing
            if missing:
                raise UnsupportedHost(missing) from error
            raise DataplaneError(str(error)) from error

    def _open(self) -> _Running:
        settings = self._settings
        for module in ("ip_vs", f"ip_vs_{settings.ipvs.scheduler}", "dummy"):
            with suppress(CommandError):  # it is built in, or the kernel loads it itself
                run(["modprobe", "--quiet", module])
        families = check.served_families(settings)
        if settings.families[0] not in families:
            raise UnsupportedHost(self.check().missing or ("iptables is not installed",))
        why = ipvs.try_scheduler(settings.ipvs.scheduler)
        if why:
            raise DataplaneError(f"scheduler {settings.ipvs.scheduler}: {why}")
        kernel = Kernel()
        try:
            kernel.prepare(families)
            tuning.set_up(settings.ipvs, kernel)
        except BaseException:
            kernel.close()
            raise
        return _Running(kernel, families, Firewall(settings, families), StaleFlows(families))

    def apply(self, desired: DesiredState, *, resync: bool = False) -> ApplyReport:
        """Write the difference to what was applied last; raises DataplaneError."""
        with self._lock:
            return self._apply(desired, resync=resync)

    def _apply(self, desired: DesiredState, *, resync: bool) -> ApplyReport:
        running = self._running
        if running is None:
            raise DataplaneError("apply before open")
        if running.in_doubt or resync:
            report = self._apply_all(running, desired)
        else:
            report = self._apply_changes(running, desired)
        running.written = desired.plans
        running.checks = desired.health_checks
        if report.failed:
            running.in_doubt = True
            return report
        return ApplyReport(
            report.writes,
            report.changed,
            repaired=report.repaired,
            details=report.details,
            reconciled=running.stale.reconcile(desired),
        )

    def view(self, desired: DesiredState) -> dict[FrontendKey, FrontendView]:
        """A state as IPVS can hold it; see `render.view`."""
        families = self._running.families if self._running else self._settings.families
        return {
            key: view
            for plan in desired.plans.values()
            if plan.key.family in families
            for key, view in render.view(plan, self._options)
        }

    def read(self) -> dict[FrontendKey, FrontendView]:
        """What virtual servers and sets say, if they are ours; works without `open`."""
        with self._looking() as looking:
            if looking is None:
                return {}
            return readback.views(looking[1], self._options)

    def parts(self) -> Iterator[KernelPart]:
        """Virtual servers, sets, device and chains of ours; works without `open`."""
        with self._looking() as looking:
            if looking is None:
                return
            found = looking[1]
        for variant, tables in firewall.ours():
            yield from firewall.parts(variant, tables)
        served = self._owned(found)
        reals = sum(len(found.reals.get(key, ())) for key in served)
        yield KernelPart("virtual servers", "IPVS", "", f"{len(served)}, {reals} real ones")
        yield KernelPart("device", LINK, "", f"{len(found.addresses)} addresses")
        for name, entries in found.sets.items():
            yield KernelPart("ipset", name, "", f"{len(entries)} elements")

    def series(self) -> Iterator[Series]:
        """kube-proxy's counters of this mode; nothing while not open."""
        counts = self._running.firewall.failure_counts if self._running else {}
        for family, count in counts.items():
            yield Series(_FAILURES, {"ip_family": family.label}, count)

    def flow_counts(self) -> FlowCounts:
        """Connections the kernel knows of, by service port; none while not open.

        Where looking is slow they are those of the last look, and nobody waits for one.
        """
        running = self._running
        if running is not None and running.connections.of_slow_look is not None:
            return running.connections.of_slow_look
        with self._lock:
            running = self._running
            if running is None:
                return FlowCounts({}, {})
            began = time.monotonic()
            reals = running.kernel.real_servers(running.ledger.servers)
            return running.connections.note(running.written, reals, began)

    def retire(self) -> bool:
        """Give all real servers weight 0; True once none has a connection left (V11)."""
        with self._looking() as looking:
            if looking is None:
                return True
            kernel, found = looking
            served = self._owned(found)
            kernel.rest(found, served)
        return not any(real.connection_count for key in served for real in found.reals[key])

    def close(self) -> None:
        """Stop working; the kernel goes on by itself (Z2)."""
        with self._lock:
            running, self._running = self._running, None
            if running is not None:
                running.kernel.close()

    def cleanup(self) -> None:
        """Remove what is ours; virtual servers of others stay, and all of a real kube-proxy's.

        Raises:
            DataplaneError: something could not be removed; the rest was.
        """
        self.close()
        mine = [variant for variant, _ in firewall.ours()]
        if not mine:
            return
        families = tuple(sorted({variant.family for variant in mine}))
        failures: list[str] = []
        try:
            self._remove_servers(families)
        except (DataplaneError, OSError) as error:
            failures.append(str(error))
        for variant in mine:
            try:
                firewall.remove(variant, marker=False)
            except CommandError as error:
                failures.append(str(error))
        try:
            self._remove_sets(families)
        except (DataplaneError, OSError) as error:
            failures.append(str(error))
        if failures:
            raise DataplaneError(f"not everything could be removed: {'; '.join(failures)}")
        for variant in mine:
            firewall.remove(variant, marker=True)

    @contextmanager
    def _looking(self) -> Iterator[tuple[Kernel, Found] | None]:
        """The kernel and what it holds, whether we are open or not; None = nothing of ours."""
        running = self._running
        if running is not None:
            with self._lock:
                yield running.kernel, running.kernel.read(running.families)
        elif not dummy.index_of(LINK) or not any(True for _ in firewall.ours()):
            yield None
        else:
            kernel = Kernel()
            try:
                yield kernel, kernel.read(self._settings.families)
            finally:
                kernel.close()

    # -- writing -----------------------------------------------------------------------------------

    def _apply_changes(self, running: _Running, desired: DesiredState) -> ApplyReport:
        """Write the service ports whose plan is another than last time."""
        keys = [
            key
            for key in differences(running.written, desired.plans)
            if key.family in running.families
        ]
        pairs = [
            (self._share(running.written.get(key)), self._share(desired.plans.get(key)))
            for key in keys
        ]
        if running.checks != desired.health_checks:
            pairs.append((_health(running.checks), _health(desired.health_checks)))
        change = state.change(running.ledger, pairs)
        counted = tuple(dict.fromkeys(key for key, _ in change.leaving))
        change.settle_leaving(running.kernel.connection_counts(counted))
        running.in_doubt = True  # until all of it is done
        before = running.ledger.occupied
        filling = {name for name, _ in change.steps.add_entries}
        # What is to be looked at is, before anything leads there, and until nothing does.
        rule_count = running.firewall.follow(before | filling)
        refused = running.kernel.take(change.steps)
        change.commit(running.ledger)
        rule_count += running.firewall.follow(running.ledger.occupied)
        running.in_doubt = False
        changed = sum(old != new for old, new in pairs)
        details = {**change.steps.counts(), "rules": rule_count}
        failed = self._failed(desired, refused)
        return ApplyReport(change.steps.count + rule_count, changed, failed, details=details)

    def _apply_all(self, running: _Running, desired: DesiredState) -> ApplyReport:
        """Read the kernel and write whatever differs."""
        keys = list(differences(running.written, desired.plans))
        kernel = running.kernel
        kernel.prepare(running.families)
        began = time.monotonic()
        found = kernel.read(running.families)
        running.connections.note(desired.plans, found.reals, began)
        running.elsewhere = found.elsewhere
        wanted = Ledger()
        for plan in desired.plans.values():
            if plan.key.family in running.families:
                wanted.add(self._share(plan))
        wanted.add(_health(desired.health_checks))
        steps = state.compare(found, wanted, self._is_excluded)
        damages: list[str] = []
        if not running.adopting and not running.in_doubt and not keys:
            damages = state.damages(steps, running.ledger)
        rule_count = 0
        if not running.adopting:
            rule_count, rules_found = running.firewall.apply(wanted.occupied | found.occupied)
            damages += rules_found
        refused = kernel.take(steps)
        # At the start not before: the chains may be those of the iptables mode, which serves by
        # them until servers and addresses are there.
        rule_count += running.firewall.follow(wanted.occupied)
        running.ledger = wanted
        running.adopting = running.in_doubt = False
        return ApplyReport(
            steps.count + rule_count,
            len(keys),
            self._failed(desired, refused),
            tuple(damages),
            {**steps.counts(), "rules": rule_count},
        )

    def _share(self, plan: ServicePlan | None) -> Share:
        if plan is None:
            return NOTHING
        assert self._running is not None
        return render.render(plan, self._options, self._running.elsewhere)

    def _failed(self, desired: DesiredState, refused: Refused) -> tuple[ApplyError, ...]:
        """The service ports that miss something the kernel refused, with its reasons.

        Raises:
            DataplaneError: it belongs to none.
        """
        if not refused:
            return ()
        failed = []
        for key, plan in desired.plans.items():
            share = self._share(plan)
            reasons = {
                *(reason for item, reason in refused.servers.items() if item in share.servers),
                *(reason for item, reason in refused.addresses.items() if item in share.addresses),
                *(reason for item, reason in refused.entries.items() if item in share.entries),
            }
            if reasons:
                failed.append(ApplyError(str(key), "; ".join(sorted(reasons))))
        if not failed:
            reasons = {*refused.servers.values(), *refused.addresses.values()}
            reasons |= set(refused.entries.values())
            assert self._running is not None
            self._running.in_doubt = True
            raise DataplaneError(f"the kernel refused changes: {'; '.join(sorted(reasons))}")
        return tuple(failed)

    # -- removing ----------------------------------------------------------------------------------

    def _is_excluded(self, key: ServerKey) -> bool:
        """Somebody else's, by the administrator's word (V12)."""
        if not self._excluded:
            return False
        address = ipaddress.ip_address(key.address)
        return any(address in prefix for prefix in self._excluded)

    def _owned(self, found: Found) -> list[ServerKey]:
        return [key for key in found.reals if found.is_served(key) and not self._is_excluded(key)]

    def _remove_servers(self, families: tuple[Family, ...]) -> None:
        kernel = Kernel()
        try:
            found = kernel.read(families)
            served = self._owned(found)
            flows.hand_on(served)
            kernel.remove_servers(served)
            going = found.addresses - found.elsewhere
            # Before, so that the other ends hear of it; after, for those that came meanwhile.
            flows.end_sockets(going)
            kernel.remove_device()
            flows.end_sockets(going)
        finally:
            kernel.close()
        flows.forget(served)

    def _remove_sets(self, families: tuple[Family, ...]) -> None:
        kernel = Kernel()
        try:
            kernel.remove_sets(families)
        finally:
            kernel.close()


def _health(checks: tuple[HealthCheck, ...]) -> Share:
    return Share({}, (), render.health_entries(checks))
