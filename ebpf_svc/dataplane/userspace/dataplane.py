"""The userspace dataplane: a relay in the agent's process, and what leads packets to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ebpf_svc.config import Settings
from ebpf_svc.dataplane.base import ApplyReport, Support
from ebpf_svc.dataplane.inspect import FlowCounts, FlowView, KernelPart, Series, Traffic
from ebpf_svc.dataplane.userspace import affinity, probes, window
from ebpf_svc.dataplane.userspace.affinity import Affinity
from ebpf_svc.dataplane.userspace.flows import flow_views
from ebpf_svc.dataplane.userspace.relay import Relay
from ebpf_svc.dataplane.userspace.rules import PROTOCOLS
from ebpf_svc.dataplane.userspace.steering import Steering, make_steering, remove_all
from ebpf_svc.dataplane.userspace.window import Sight
from ebpf_svc.errors import ApplyError, DataplaneError, UnsupportedHost
from ebpf_svc.log import get_logger
from ebpf_svc.model.desired import (
    DesiredState,
    FrontendKey,
    FrontendView,
    PlanKey,
    ServicePlan,
)
from ebpf_svc.model.identity import differences
from ebpf_svc.model.net import Family

log = get_logger(__name__)


@dataclass(slots=True)
class _Running:
    """Everything between `open` and `close`."""

    relay: Relay
    steering: Steering
    plans: dict[PlanKey, ServicePlan] = field(default_factory=dict)
    """Served now. Replaced as a whole, so that any thread may read it."""
    retires: bool = False


class UserspaceDataplane:
    """The dataplane of one node; works in the network namespace of the thread that opens it."""

    name = "userspace"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._running: _Running | None = None

    def check(self) -> Support:
        """Look at this host by trying: a listener, a pipe, a table of nftables."""
        return Support(self.name, probes.probe_all(self._settings))

    def open(self) -> None:
        """Start the relay; what an earlier one left in the kernel is taken over.

        Raises:
            UnsupportedHost: this machine lacks something.
            DataplaneError: it lacks nothing known, and still something failed.
        """
        run_dir = self._settings.run_dir
        relay = Relay(self._settings.userspace, Affinity(_affinity_file(run_dir)))
        steering = make_steering(self._settings)
        try:
            steering.open()
            relay.start()
            running = _Running(relay, steering)
            relay.call(self._show, running)
        except (DataplaneError, OSError) as error:
            relay.stop()
            missing = self.check().missing
            if missing:
                raise UnsupportedHost(missing) from error
            raise DataplaneError(str(error)) from error
        self._running = running

    def apply(self, desired: DesiredState, *, resync: bool = False) -> ApplyReport:
        """Open doors, lead packets to them, then close what nobody needs any more.

        Raises:
            DataplaneError: the kernel refused; what was served before still is.
        """
        running = self._running
        if running is None:
            raise DataplaneError("apply before open")
        relay, steering = running.relay, running.steering
        repaired = steering.verify() if resync else ()
        wanted = {key: plan for key, plan in desired.plans.items() if _is_possible(key)}
        before = running.plans
        # A new planner makes plans anew; those that say the same are no change.
        changed = {key for key in differences(before, wanted) if before.get(key) != wanted.get(key)}
        taken = [plan for key, plan in wanted.items() if key in changed]
        failed = relay.call(partial(_take, relay, steering, taken)) if taken else {}
        plans = {key: plan for key, plan in wanted.items() if key not in failed}
        written = steering.write(plans, relay.call(relay.numbers))
        running.plans = plans
        if changed:
            relay.call(partial(_release, relay, steering, changed, plans))
        return ApplyReport(
            writes=written.writes + len(changed - failed.keys()),
            changed=len(changed),
            failed=tuple(failed.values()),
            repaired=repaired,
            details={"elements": written.writes},
            reconciled=written.reconciled,
        )

    def view(self, desired: DesiredState) -> dict[FrontendKey, FrontendView]:
        """All but SCTP, which a relay cannot carry (U6)."""
        return _views(plan for key, plan in desired.plans.items() if _is_possible(key))

    def read(self) -> dict[FrontendKey, FrontendView]:
        """Frontends that the kernel leads to a relay that serves them, here or in the agent."""
        sight = self._look()
        steering = self._running.steering if self._running else make_steering(self._settings)
        held = steering.held(sight.plans, sight.numbers)
        views = _views(sight.plans.values())
        return {key: view for key, view in views.items() if key in held}

    def retire(self) -> bool:
        """Take no new connections; True once none is left that depends on the relay."""
        running = self._running
        if running is None:
            # The relay of an earlier run has ended, and its connections with it.
            steering = make_steering(self._settings)
            steering.retire()
            steering.let_go()
            return True
        running.steering.retire()
        first, running.retires = not running.retires, True
        if first:
            # Answers to datagrams are under way: these doors stay until the next call.
            running.relay.call(partial(running.relay.retire, datagrams=False))
            return False
        running.steering.let_go()
        return running.relay.call(running.relay.retire) == 0

    def close(self) -> None:
        """End the relay and every connection: here traffic does need the process (Z2).

        The rules stay. They lead to closed doors, so clients are refused at once, and the next
        start finds its ports in them.
        """
        running, self._running = self._running, None
        if running is not None:
            running.relay.stop()
            running.steering.close()

    def cleanup(self) -> None:
        """Remove rules, routes and files, whoever left them."""
        self.close()
        run_dir = self._settings.run_dir
        for path in (_affinity_file(run_dir), run_dir / window.FILE):
            path.unlink(missing_ok=True)
        remove_all()

    # -- what it shows -----------------------------------------------------------------------------

    def flows(self) -> list[FlowView]:
        """Connections and clients of the relay, here or in the agent."""
        return list(self._look().flows)

    def parts(self) -> list[KernelPart]:
        """Rules, routes and listening sockets."""
        parts = make_steering(self._settings).parts()
        for door, number in self._look().numbers.items():
            where = f"port {number}"
            parts.append(KernelPart("listener", str(door.key), where, door.name))
        return parts

    def drops(self) -> Mapping[str, int]:
        """Packets that the rules dropped, by reason."""
        return self._running.steering.drops() if self._running else {}

    def flow_counts(self) -> FlowCounts:
        """Flows by service port."""
        by_port: dict[PlanKey, int] = {}
        draining = dict.fromkeys(Family, 0)
        running = self._running
        if running is not None:
            for key, count in running.relay.call(running.relay.flows_by_port).items():
                if key in running.plans:
                    by_port[key] = count
                else:
                    draining[key.family] += count
        return FlowCounts(by_port, draining)

    def traffic(self) -> Mapping[PlanKey, Traffic]:
        """What each service port got; packets are datagrams, of TCP nobody counts them here."""
        running = self._running
        if running is None:
            return {}
        return running.relay.call(
            lambda: {
                key: Traffic(port.connections, port.packets, port.bytes)
                for key, port in running.relay.ports.items()
                if port.connections
            }
        )

    def series(self) -> Iterator[Series]:
        """The relay's own counters."""
        running = self._running
        if running is not None:
            counts = running.relay.counts
            for event in ("retries", "failed", "limited", "loops"):
                labels = {"event": event}
                yield Series("ebpf_svc_relay_events_total", labels, getattr(counts, event))

    def _look(self) -> Sight:
        running = self._running
        if running is None:
            return window.look(self._settings.run_dir)
        return running.relay.call(self._sight, running)

    def _sight(self, running: _Running) -> Sight:
        """In the relay's thread."""
        return Sight(running.plans, running.relay.numbers(), tuple(flow_views(running.relay)))

    def _show(self, running: _Running) -> None:
        """In the relay's thread: let other processes look in."""
        served = window.show(self._settings.run_dir, partial(self._sight, running))
        running.relay.keep(running.relay.loop.create_task(served))


def _is_possible(key: PlanKey) -> bool:
    return key.port_name.protocol in PROTOCOLS


def _take(
    relay: Relay, steering: Steering, plans: Iterable[ServicePlan]
) -> dict[PlanKey, ApplyError]:
    """Be ready for plans: their doors are open, their backends known. In the relay's thread."""
    failed = {}
    for plan in plans:
        relay.take(plan)
        try:
            for door in steering.doors(plan):
                relay.open_door(door)
        except OSError as error:
            failed[plan.key] = ApplyError(str(plan.key), f"cannot listen: {error}")
    return failed


def _release(
    relay: Relay,
    steering: Steering,
    changed: Iterable[PlanKey],
    plans: Mapping[PlanKey, ServicePlan],
) -> None:
    """Close the doors nobody is led to any more, and end flows to backends that left."""
    for key in changed:
        plan = plans.get(key)
        wanted = {door.id for door in steering.doors(plan)} if plan is not None else set()
        port = relay.ports.get(key)
        for door_id in list(port.doors) if port is not None else ():
            if door_id not in wanted:
                relay.close_door(door_id)
        if plan is not None:
            relay.retain(plan)
        else:
            relay.forget(key)


def _views(plans: Iterable[ServicePlan]) -> dict[FrontendKey, FrontendView]:
    return {
        frontend.key: FrontendView(frontend, plan.backends, plan.has_endpoints, plan.affinity_s)
        for plan in plans
        for frontend in plan.frontends
    }


def _affinity_file(run_dir: Path) -> Path:
    return run_dir / affinity.FILE
