"""The iptables dataplane: kube-proxy's chains, in whichever iptables the host uses.

Connections are netfilter's: its connection tracking carries them on, whatever becomes of rules and
of us. So nothing waits here, and everything that is open is known to `conntrack`, not to us.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ebpf_svc.config import Settings
from ebpf_svc.dataplane.base import ApplyReport, Support
from ebpf_svc.dataplane.inspect import KernelPart, Series
from ebpf_svc.dataplane.iptables import backend, chains, check, readback, removal
from ebpf_svc.dataplane.iptables.check import Found
from ebpf_svc.dataplane.iptables.family import FamilyRules
from ebpf_svc.dataplane.iptables.options import RuleOptions
from ebpf_svc.dataplane.netfilter.stale import StaleFlows
from ebpf_svc.errors import ApplyError, DataplaneError, UnsupportedHost
from ebpf_svc.host import sysctl
from ebpf_svc.host.iptables import Variant
from ebpf_svc.host.kubeproxy import MARKER
from ebpf_svc.log import get_logger
from ebpf_svc.model.desired import (
    DesiredState,
    FrontendKey,
    FrontendKind,
    FrontendView,
    PlanKey,
    ServicePlan,
)
from ebpf_svc.model.identity import differences
from ebpf_svc.model.net import Family

_ROUTE_LOCALNET = "net/ipv4/conf/all/route_localnet"
_LOOPBACK = "127.0.0.1"
_BE_LIBERAL = "net/netfilter/nf_conntrack_tcp_be_liberal"
_METRIC = "kubeproxy_sync_proxy_rules_iptables_"

log = get_logger(__name__)


@dataclass(slots=True)
class _Running:
    """What is there between `open` and `close`."""

    families: Mapping[Family, FamilyRules]
    stale: StaleFlows
    written: Mapping[PlanKey, ServicePlan]
    """Plans the kernel holds, apart from those that failed."""
    others: tuple[Variant, ...]
    """Tools an earlier run wrote with, and the host no longer uses."""
    routes_loopback: bool = False


class IptablesDataplane:
    """The dataplane of one node; works in the network namespace of the thread that calls."""

    name = "iptables"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._running: _Running | None = None

    def check(self) -> Support:
        """Try rules like ours in a network namespace that is thrown away."""
        return Support(self.name, tuple(check.checks(check.probe(self._settings.families))))

    def open(self) -> None:
        """Choose the tools; the first `apply` takes over what an earlier run left.

        Raises:
            UnsupportedHost: this machine lacks something; each thing missing is a sentence.
        """
        found = check.probe(self._settings.families)
        support = Support(self.name, tuple(check.checks(found)))
        if not support.ok:
            raise UnsupportedHost(support.missing)
        families = {
            family: FamilyRules(each.variant, self._options(family, each))
            for family, each in found.items()
            if each.variant is not None
        }
        others = tuple(_other_backends(families))
        self._running = _Running(families, StaleFlows(tuple(families)), {}, others)
        for family, rules in families.items():
            log.info("iptables.backend", family=family.label, command=str(rules.variant))

    def apply(self, desired: DesiredState, *, resync: bool = False) -> ApplyReport:
        """Write the difference to what was applied last; raises DataplaneError."""
        running = self._running
        if running is None:
            raise DataplaneError("apply before open")
        changed: dict[Family, list[PlanKey]] = {family: [] for family in running.families}
        for key in differences(running.written, desired.plans):
            if key.family in changed:
                changed[key.family].append(key)
        failure: DataplaneError | None = None
        failed: list[ApplyError] = []
        failed_keys: set[PlanKey] = set()
        repaired: list[str] = []
        writes = count = 0
        for family, rules in running.families.items():
            try:
                outcome = rules.apply(
                    desired.plans, changed[family], desired.health_checks, resync=resync
                )
            except DataplaneError as error:
                # The other family's rules are none the worse for it.
                failure = failure or error
                continue
            failed += outcome.failed
            failed_keys |= outcome.failed_keys
            repaired += outcome.repaired
            writes += outcome.writes
            count += outcome.changed
        if failure is not None:
            raise failure
        if not running.routes_loopback and any(
            _has_loopback(desired.plans.get(key)) for key in changed.get(Family.V4, ())
        ):
            _route_localnet()
            running.routes_loopback = True
        for variant in running.others:
            log.warning("iptables.moved", command=str(variant))
            removal.remove(variant)
        running.others = ()
        running.written = desired.plans
        if failed_keys:
            plans = desired.plans.items()
            running.written = {key: plan for key, plan in plans if key not in failed_keys}
        return ApplyReport(
            writes=writes,
            changed=count,
            failed=tuple(failed),
            repaired=tuple(repaired),
            details={"rules": writes},
            reconciled=running.stale.reconcile(desired),
        )

    def view(self, desired: DesiredState) -> dict[FrontendKey, FrontendView]:
        """What rules can tell of a state; see `readback`."""
        views: dict[FrontendKey, FrontendView] = {}
        for family, options in self._served().items():
            plans = (plan for key, plan in desired.plans.items() if key.family is family)
            views.update(readback.view(plans, options))
        return views

    def read(self) -> dict[FrontendKey, FrontendView]:
        """What the rules say, as far as they are ours; works without `open`."""
        views: dict[FrontendKey, FrontendView] = {}
        for variant in backend.written_by_us(self._settings.families):
            views |= readback.read(variant.save())
        return views

    def parts(self) -> Iterator[KernelPart]:
        """Our chains, by table; works without `open`."""
        for variant in backend.written_by_us(self._settings.families):
            for name, table in variant.save().items():
                ours = chains.OURS.get(name, frozenset())
                mine = {
                    each for each in table.chains if each in ours or chains.is_per_service(each)
                }
                count = sum(rule.chain in mine for rule in table.rules)
                if mine:
                    detail = f"{len(mine)} chains, {count} rules"
                    yield KernelPart(
                        "table", f"{name} of {variant.family.label}", str(variant), detail
                    )

    def series(self) -> Iterator[Series]:
        """kube-proxy's counters of this mode; nothing while not open."""
        running = self._running
        for family, rules in running.families.items() if running else ():
            labels, counts = {"ip_family": family.label}, rules.counts
            yield Series(f"{_METRIC}restore_failures_total", labels, counts.restore_failures)
            yield Series(
                f"{_METRIC}partial_restore_failures_total", labels, counts.partial_restore_failures
            )
            for table in (chains.FILTER, chains.NAT):
                of_table = {"table": table, **labels}
                yield Series(f"{_METRIC}total", of_table, counts.rules[table])
                yield Series(f"{_METRIC}last", of_table, counts.written[table])

    def retire(self) -> bool:
        """Nothing depends on us: connections are translated by their conntrack entries."""
        return True

    def hand_over(self) -> None:
        """Make our rules a kube-proxy's: its first full sync takes them over in place."""
        self.close()
        for variant in list(backend.written_by_us(tuple(Family))):
            variant.restore(f"*nat\n:{MARKER} - [0:0]\n-X {MARKER}\nCOMMIT\n")

    def close(self) -> None:
        """Stop working; rules stay (Z2)."""
        self._running = None

    def cleanup(self) -> None:
        """Remove our rules from every iptables of this host; leaves those of a real kube-proxy.

        Raises:
            DataplaneError: something could not be removed; the rest was.
        """
        self.close()
        failure: DataplaneError | None = None
        for variant in list(backend.written_by_us(tuple(Family))):
            try:
                removal.remove(variant)
            except DataplaneError as error:
                failure = failure or error
        if failure is not None:
            raise DataplaneError(f"not everything could be removed: {failure}") from failure

    def _options(self, family: Family, found: Found) -> RuleOptions:
        return RuleOptions.from_settings(
            self._settings,
            family,
            has_recent=found.has_recent,
            has_random_fully=found.has_random_fully,
            has_sctp=found.has_sctp,
            # Who calls segments outside the window valid has none to drop (S6).
            drops_invalid=sysctl.read(_BE_LIBERAL) in (None, "0"),
        )

    def _served(self) -> Mapping[Family, RuleOptions]:
        """How the rules of each family look; as far as the settings tell, while not open."""
        if self._running:
            return {family: each.options for family, each in self._running.families.items()}
        return {
            family: RuleOptions.from_settings(self._settings, family)
            for family in self._settings.families
        }


def _other_backends(families: Mapping[Family, FamilyRules]) -> Iterator[Variant]:
    """Where rules of ours stand, beside the tools chosen now."""
    chosen = {rules.variant for rules in families.values()}
    return (each for each in backend.written_by_us(tuple(Family)) if each not in chosen)


def _has_loopback(plan: ServicePlan | None) -> bool:
    """Whether node ports of it answer on 127.0.0.1."""
    return plan is not None and any(
        each.kind is FrontendKind.NODE_PORT and each.key.address == _LOOPBACK
        for each in plan.frontends
    )


def _route_localnet() -> None:
    """Let packets from 127.0.0.1 leave for a pod (S7); KUBE-FIREWALL guards against the reverse."""
    try:
        sysctl.write(_ROUTE_LOCALNET, "1")
    except OSError as error:
        log.warning("iptables.route-localnet", path=_ROUTE_LOCALNET, error=error.strerror)
