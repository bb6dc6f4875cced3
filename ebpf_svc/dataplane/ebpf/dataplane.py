"""The eBPF dataplane: maps, programs, hooks and the masquerade rule, put together.

`Forwarding` keeps the maps, `Attachments` the programs on devices and cgroup; this module opens
both, and knows in which order they come and go. One lock covers the maps: the sync loop, the
sweeper and whoever reads take turns.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from ebpf_svc.config import EbpfSettings, Settings, SocketLB
from ebpf_svc.dataplane.base import ApplyReport, Check, Support
from ebpf_svc.dataplane.ebpf import (
    compiler,
    hooks,
    inventory,
    loopback,
    options,
    readback,
    tables,
    told,
    xdp,
)
from ebpf_svc.dataplane.ebpf.artifact import Artifact
from ebpf_svc.dataplane.ebpf.attach import Attachments, detach_all, is_anything_attached
from ebpf_svc.dataplane.ebpf.codec import Codec
from ebpf_svc.dataplane.ebpf.counters import NO_FLOWS, Counters, StepTimes
from ebpf_svc.dataplane.ebpf.events import RingEvents
from ebpf_svc.dataplane.ebpf.fastlinks import FastLinks
from ebpf_svc.dataplane.ebpf.flows import has_connections
from ebpf_svc.dataplane.ebpf.forwarding import Forwarding
from ebpf_svc.dataplane.ebpf.live import Live
from ebpf_svc.dataplane.ebpf.programs import PEER_PROGRAMS, SOCKET_PROGRAMS, Programs
from ebpf_svc.dataplane.ebpf.sweeper import Sweeper
from ebpf_svc.dataplane.ebpf.tables import Tables
from ebpf_svc.dataplane.inspect import (
    EventStream,
    FlowCounts,
    FlowView,
    KernelPart,
    MapFill,
    Traffic,
)
from ebpf_svc.errors import DataplaneError, UnsupportedHost
from ebpf_svc.host import nft
from ebpf_svc.host.nft import MasqueradeRules
from ebpf_svc.log import get_logger
from ebpf_svc.model.desired import DesiredState, FrontendKey, FrontendView, PlanKey
from ebpf_svc.model.net import Family

ANSWER_S = 5.0
"""How long after we retired the answer to a datagram is still told as from the frontend: the
patience of a resolver."""

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Running:
    """Everything that is open between `open` and `close`."""

    tables: Tables
    forwarding: Forwarding
    programs: Programs
    attachments: Attachments
    fast_links: FastLinks | None
    rules: MasqueradeRules
    sweeper: Sweeper
    counters: Counters
    start_s: Mapping[str, float]


class EbpfDataplane:
    """The dataplane of one node; works in the network namespace of the thread that opens it."""

    name = "ebpf"

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._mark = 1 << settings.masquerade_bit
        self._lock = threading.RLock()
        self._running: _Running | None = None
        self._retired_s: float | None = None
        """Monotonic time from which on new connections were not ours; None = they are."""

    def check(self) -> Support:
        """Look at this host by trying; takes a second, and runs a few programs of the host."""
        from ebpf_svc.host import features  # noqa: PLC0415  # only who asks pays for it

        settings = self._settings.ebpf
        is_compiled = compiler.is_cached(
            self._settings.families,
            settings.cache_dir,
            extra_defines=told.defines(self._settings, self._mark),
        )
        return Support(
            self.name,
            tuple(
                Check(probe.name, probe.ok, probe.detail, probe.mend, probe.required)
                for probe in features.probe_all(
                    settings.bpffs, settings.cgroup_root, is_compiled=is_compiled
                )
            ),
        )

    def open(self) -> None:
        """Adopt the maps an earlier run left, or make them; load and attach the programs.

        Raises:
            UnsupportedHost: this machine lacks something; each thing missing is a sentence.
            DataplaneError: it lacks nothing known, and still something failed.
        """
        try:
            self._running = self._open()
        except UnsupportedHost:
            raise
        except (DataplaneError, OSError) as error:
            # Probing takes longer than opening: only a failure is worth it.
            missing = self.check().missing
            if missing:
                raise UnsupportedHost(missing) from error
            if isinstance(error, DataplaneError):
                raise
            raise DataplaneError(str(error)) from error

    def _open(self, *, retiring: bool = False) -> _Running:
        settings, steps = self._settings.ebpf, StepTimes()
        artifacts = self._artifacts()
        steps.done("compile")
        with ExitStack() as undo:
            opened = Tables.open(settings, artifacts)
            undo.callback(opened.close)
            told.write(opened, self._settings.ebpf)
            forwarding = Forwarding(opened, settings)
            forwarding.adopt()
            steps.done("maps")
            programs = Programs.load(
                artifacts, {family: opened.fds(family) for family in artifacts}
            )
            undo.callback(programs.close)
            xdp.chain(programs, opened)
            steps.done("load")
            rules = nft.masquerade_rules(self._mark)
            rules.apply()
            fast_links = None
            if options.translates_host_packets(settings):
                loopback.allow()
            if settings.fast_path or options.translates_host_packets(settings):
                links = {family: of.links for family, of in opened.family.items()}
                fast_links = FastLinks(links, settings)
                fast_links.start()
                undo.callback(fast_links.stop)
            attachments = Attachments(
                programs, settings, hooks=PEER_PROGRAMS if retiring else SOCKET_PROGRAMS
            )
            undo.callback(attachments.stop)
            if retiring or not self._succeeds_others(opened):
                attachments.start()
            # Endpoints live on when we retire: a socket connected to one has lost nothing.
            uses_hooks = settings.socket_lb is not SocketLB.OFF and not retiring
            sweeper = Sweeper(
                forwarding.states,
                opened.udp_sockets,
                self._lock,
                cgroup=hooks.cgroup_of(settings) if uses_hooks else None,
            )
            sweeper.start()
            undo.pop_all()
        steps.done("attach")
        counters = Counters(opened, forwarding.states)
        return _Running(
            *(opened, forwarding, programs, attachments, fast_links, rules),
            *(sweeper, counters, steps.taken_s),
        )

    @staticmethod
    def _succeeds_others(opened: Tables) -> bool:
        """Whether programs are attached whose maps are not these, which are empty: an earlier
        version's. They serve until the first apply has filled ours.
        """
        is_empty = all(next(of.frontends.items(), None) is None for of in opened.family.values())
        return is_empty and is_anything_attached()

    def apply(self, desired: DesiredState, *, resync: bool = False) -> ApplyReport:
        """Write the difference to what was applied last; raises DataplaneError."""
        running = self._running
        if running is None:
            raise DataplaneError("apply before open")
        try:
            with self._lock:
                report = running.forwarding.apply(desired, resync=resync)
                if resync and told.write(running.tables, self._settings.ebpf):
                    report = replace(
                        report,
                        writes=report.writes + 1,
                        repaired=(*report.repaired, "settings of this run written again"),
                    )
        except OSError as error:
            raise DataplaneError(f"map {error.filename}: {error.strerror}") from error
        if not running.attachments.is_following:
            try:
                running.attachments.start()
            except UnsupportedHost as error:
                raise DataplaneError(str(error)) from error
        if resync:
            repaired = [*self._restore_pins(running.tables), *running.attachments.verify()]
            if not running.rules.read():
                running.rules.apply()
                repaired.append("masquerade rule written again")
            report = replace(report, repaired=(*report.repaired, *repaired))
        running.sweeper.wake()
        return report

    def _restore_pins(self, opened: Tables) -> list[str]:
        try:
            return opened.restore_pins(self._settings.ebpf)
        except OSError as error:
            # What forwards needs no pins; the next resync tries again.
            log.warning("pins.failed", error=str(error))
            return []

    def view(self, desired: DesiredState) -> dict[FrontendKey, FrontendView]:
        """The maps hold all of it."""
        return desired.view()

    def read(self) -> dict[FrontendKey, FrontendView]:
        """What the pinned maps hold; works without `open`, beside a running agent."""
        views: dict[FrontendKey, FrontendView] = {}
        with self._looking() as codecs:
            for opened, codec, family in codecs:
                views |= readback.read_family(codec, opened.family[family])
        return views

    def flows(self) -> list[FlowView]:
        """Flows that are alive; works without `open`."""
        with self._looking() as codecs:
            return [
                flow
                for opened, codec, family in codecs
                for flow in inventory.flow_views(family, codec, opened.family[family])
            ]

    def events(self) -> EventStream:
        """What happens to flows from now on; works without `open`, beside a running agent."""
        settings = self._settings.ebpf
        opened = Tables.look(settings, self._artifacts()) if _has_pins(settings) else None
        if opened is None:
            raise UnsupportedHost([f"no maps in {tables.pin_dir(settings)}: no agent served here"])
        try:
            return RingEvents(opened, tables.pin_dir(settings))
        except BaseException:
            opened.close()
            raise

    @contextmanager
    def looking_at(self, family: Family) -> Iterator[tuple[Live, Artifact] | None]:
        """The maps of one family and what their programs were loaded from, for a trial; None when
        there are none. Works without `open`, beside a running agent.
        """
        settings, artifacts = self._settings.ebpf, self._artifacts()
        opened = Tables.look(settings, artifacts) if _has_pins(settings) else None
        if opened is None:
            yield None
            return
        try:
            yield (Live(family, opened), artifacts[family])
        finally:
            opened.close()

    def parts(self) -> list[KernelPart]:
        """Every map, filter, hook and rule of ours in this kernel; works without `open`."""
        return inventory.parts(self._settings.ebpf, self._mark)

    def drops(self) -> Mapping[str, int]:
        """Packets not forwarded, by reason; empty while not open."""
        return self._running.counters.drops() if self._running else {}

    def fill(self) -> list[MapFill]:
        """How full each map is; empty while not open."""
        return self._running.counters.fill() if self._running else []

    def flow_counts(self) -> FlowCounts:
        """Flows that are alive, by service port; none while not open."""
        return self._running.counters.flow_counts() if self._running else NO_FLOWS

    def traffic(self) -> Mapping[PlanKey, Traffic]:
        """Connections, packets and bytes by service port; empty while not open."""
        return self._running.counters.traffic() if self._running else {}

    def start_s(self) -> Mapping[str, float]:
        """How long compiling, maps, loading and attaching took; empty while not open."""
        return self._running.start_s if self._running else {}

    def retire(self) -> bool:
        """Pass new connections to the stack, and translate those that are open until they end.

        Frontends of TCP drain and those of UDP go, so netfilter sees what another dataplane is to
        translate as it was sent. Of the socket hooks those stay that say who a socket talks to, for
        answers under way; but what sockets are connected to is theirs and no flow of ours.

        Returns:
            whether all TCP connections through the programs have ended.

        Raises:
            DataplaneError, UnsupportedHost, OSError: the maps could not be written or read.
        """
        if self._retired_s is None:
            self.close()
            if not _has_pins(self._settings.ebpf):
                return True
            self._running = self._open(retiring=True)
            self.apply(DesiredState())
            self._retired_s = time.monotonic()
        with self._looking() as codecs:
            is_busy = any(
                has_connections(codec, opened.family[family]) for opened, codec, family in codecs
            )
        return not is_busy and time.monotonic() - self._retired_s >= ANSWER_S

    def close(self) -> None:
        """Stop following and sweeping; programs and maps stay and forward (Z2)."""
        self._retired_s = None
        running, self._running = self._running, None
        if running is None:
            return
        running.sweeper.stop()
        running.attachments.stop()
        if running.fast_links is not None:
            running.fast_links.stop()
        running.programs.close()
        with self._lock:
            running.tables.close()

    def cleanup(self) -> None:
        """Remove programs, rules and pins, whoever left them; all that can be removed is.

        Raises:
            DataplaneError: something could not be removed; the rest was.
        """
        self.close()
        failure: Exception | None = None
        settings = self._settings.ebpf
        steps: tuple[Callable[[], object], ...] = (
            # Programs first: without them no packet meets half of a dataplane.
            lambda: detach_all(settings),
            lambda: nft.masquerade_rules(self._mark).remove(),
            lambda: tables.remove_pins(settings),
        )
        for remove in steps:
            try:
                remove()
            except (DataplaneError, OSError) as error:
                failure = failure or error
        if failure is not None:
            raise DataplaneError(f"not everything could be removed: {failure}") from failure

    def _artifacts(self) -> Mapping[Family, Artifact]:
        return compiler.obtain(
            self._settings.families,
            self._settings.ebpf.cache_dir,
            extra_defines=told.defines(self._settings, self._mark),
        )

    @contextmanager
    def _looking(self) -> Iterator[list[tuple[Tables, Codec, Family]]]:
        """The maps of a running or of a gone agent, by family; none when there are none."""
        opened = self._running.tables if self._running else None
        with ExitStack() as closing, self._lock:
            if opened is None and _has_pins(self._settings.ebpf):
                opened = Tables.look(self._settings.ebpf, self._artifacts())
                if opened is not None:
                    closing.callback(opened.close)
            if opened is None:
                yield []
            else:
                yield [
                    (opened, Codec(family, of_family), family)
                    for family, of_family in opened.family.items()
                ]


def _has_pins(settings: EbpfSettings) -> bool:
    return tables.pin_dir(settings).is_dir()
