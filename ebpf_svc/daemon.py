"""The agent: builds the parts, starts their threads, follows signals. The only wiring."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from ebpf_svc import __version__
from ebpf_svc.changeover import Changeover, Serving
from ebpf_svc.choice import Choice, Site, candidates
from ebpf_svc.config import DetectLocalMode, Settings
from ebpf_svc.config.detect import with_pod_cidrs
from ebpf_svc.control import ControlServer, SwitchRequest, Tell
from ebpf_svc.events import EventRecorder, EventSink, ObjectRef
from ebpf_svc.host.lock import DirectoryLock
from ebpf_svc.log import get_logger
from ebpf_svc.monitoring import ACTION, Monitoring
from ebpf_svc.notices import NodeCheck, Notices, say_who_else
from ebpf_svc.plan.options import PlanOptions
from ebpf_svc.plan.planner import Planner
from ebpf_svc.reload import ConfigWatch, Reloader
from ebpf_svc.sources import make_source
from ebpf_svc.status import SETTINGS, write_atomically
from ebpf_svc.sync import SyncLoop
from ebpf_svc.watch.addresses import AddressWatch
from ebpf_svc.watch.store import Store

LOADING_OBJECTS = 200_000
"""While loading, look for garbage after so many new objects only: there is none, and looking
costs a quarter of the time to the first sync."""
USUAL_THRESHOLDS = gc.get_threshold()
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
POD_CIDRS_S = 300.0
"""How long the Node may be without pod prefixes where they are needed (N3)."""
POLL_S = 0.1
UNSPECIFIED = ("0.0.0.0", "::")

log = get_logger(__name__)


def run(
    settings: Settings,
    *,
    reload: Callable[[], Settings] | None = None,
    config_files: Iterable[Path] = (),
) -> None:
    """Serve until SIGTERM or SIGINT; traffic goes on afterwards with what the kernel holds (Z2).

    Args:
        settings: an empty `node_name` becomes the host's.
        reload: reads the settings anew, at SIGHUP and when a file changes; raises ConfigError.
        config_files: the files those settings come from.

    Raises:
        ConfigError: there is nothing to serve, or the settings do not fit this node.
        UnsupportedHost: another agent runs here, or this machine cannot run the mode asked for.
        DataplaneError: the dataplane does not open.
    """
    loaded = settings
    node = (settings.node_name or socket.gethostname()).strip().lower()
    settings = settings.model_copy(update={"node_name": node})
    bound = "" if settings.bind_address in UNSPECIFIED else settings.bind_address
    store = Store(node, primary_address=bound)
    source, sink = make_source(settings, store)
    # Blocked in every thread, taken by one: no handler ever runs in the middle of a write.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    gc.set_threshold(LOADING_OBJECTS)
    deaths = _Deaths()
    with ExitStack() as stack:
        stack.enter_context(DirectoryLock(settings.run_dir))
        modes = candidates(settings)
        site = Site(settings)
        stack.callback(site.release)
        site.prepare(modes)
        log.info("agent.starting", version=__version__, node=node, mode=settings.mode.value)
        for watch in (AddressWatch(store), source):
            watch.start()
            stack.callback(watch.stop)
        pod_cidrs = _await_pod_cidrs(settings, store)
        if pod_cidrs is None:
            return
        settings = site.settings = with_pod_cidrs(settings, pod_cidrs)
        write_atomically(settings.run_dir / SETTINGS, settings.model_dump_json() + "\n")
        agent = _Agent(settings, site, store, sink, pod_cidrs)
        deaths.end(agent.loop)
        reloader = Reloader(loaded, settings, reload or (lambda: loaded), agent.take)
        _follow_signals(agent.loop, reloader)
        agent.start(stack, modes)
        config_watch = ConfigWatch(config_files, reloader)
        config_watch.start()
        stack.callback(config_watch.stop)
        agent.loop.run()
    log.info("agent.stopped")


class _Agent:
    """The parts that serve, put together."""

    def __init__(
        self,
        settings: Settings,
        site: Site,
        store: Store,
        sink: EventSink | None,
        pod_cidrs: tuple[str, ...],
    ) -> None:
        """Build them; nothing runs yet.

        Args:
            settings: in force, with the node's name.
            site: opens the dataplanes.
            store: fed already.
            sink: where Events about objects go; None = they have no place, and were logged.
            pod_cidrs: the Node's, as the settings took them.
        """
        self._settings, self._site = settings, site
        self._recorder = EventRecorder(sink)
        self._monitoring = Monitoring(settings, self._recorder)
        self._serving = Serving(self._serve)
        node = settings.node_name
        notices = Notices(
            self._recorder,
            lambda: self._serving.dataplane,
            node,
            tells_problems=sink is not None,
        )
        self.loop = SyncLoop(
            store,
            Planner(PlanOptions.from_settings(settings)),
            self._serving,
            settings,
            on_ready=self._when_ready,
            observers=(
                NodeCheck(settings, pod_cidrs),
                *self._monitoring.observers,
                notices,
            ),
            about=lambda: {"refused": dict(self._serving.refused)},
        )
        self._changeover = Changeover(site, self._serving, wake=self.loop.request_resync)
        self._control = ControlServer(settings.run_dir, self._switch)

    def start(self, stack: ExitStack, modes: Sequence[str]) -> None:
        """Open a dataplane and everything around it; `stack` ends it all."""
        # Before the dataplane opens, which may take a compile: a liveness probe does not wait.
        stack.callback(self._monitoring.stop)
        self._monitoring.start(on_fatal=self.loop.abort)
        choice = self._site.open_first(modes)
        stack.callback(self._serving.close)
        stack.callback(self._monitoring.stop)  # nobody may collect from a dataplane that closes
        self._serving.begin(choice)
        self._changeover.start()
        stack.callback(self._changeover.stop)
        self._control.start()
        stack.callback(self._control.stop)

    def take(self, settings: Settings) -> None:
        """Go by these settings from now on."""
        self.loop.reconfigure(Planner(PlanOptions.from_settings(settings)), settings)
        self._monitoring.take(settings)
        self._changeover.take(settings)

    def _serve(self, choice: Choice) -> None:
        """Tell the world that this dataplane serves."""
        mode = choice.dataplane.name
        self._monitoring.serve(choice.dataplane, choice.refused)
        node = ObjectRef("Node", "", self._settings.node_name)
        if choice.refused:
            reasons = "; ".join(f"{mode}: {reason}" for mode, reason in choice.refused.items())
            note = f"mode {mode} serves, for others cannot run here: {reasons}"
            self._recorder.warn(node, "ProxyModeFallback", note, action=ACTION)
        reason = "ProxyModeChanged" if self._serving.desired else "Starting"
        self._recorder.note(node, reason, mode, action=ACTION)

    def _switch(self, request: SwitchRequest, tell: Tell) -> None:
        asked = self._settings.model_copy(update={"mode": request.mode, "fallback": False})
        self._changeover.switch(candidates(asked), drain_s=request.drain_s, tell=tell)

    def _when_ready(self) -> None:
        """What can wait until services are served."""
        settle_memory()
        self._changeover.clean_leftovers()
        look = threading.Thread(
            target=say_who_else,
            args=(self._settings, self._recorder),
            name="neighbours",
            daemon=True,
        )
        look.start()


def settle_memory() -> None:
    """Keep what was loaded out of the garbage collector's way and give freed memory back."""
    gc.collect()
    gc.set_threshold(*USUAL_THRESHOLDS)
    gc.freeze()
    ctypes.CDLL(None).malloc_trim(0)


def _await_pod_cidrs(settings: Settings, store: Store) -> tuple[str, ...] | None:
    """The Node's pod prefixes, waited for where they are needed; None = a signal ended the wait."""
    deadline = time.monotonic() + POD_CIDRS_S
    is_needed = settings.detect_local.mode is DetectLocalMode.NODE_CIDR
    while is_needed and not store.node().pod_cidrs and time.monotonic() < deadline:
        taken = signal.sigtimedwait(SIGNALS, POLL_S)
        if taken is not None and taken.si_signo != signal.SIGHUP:
            return None
    return store.node().pod_cidrs


class _Deaths:
    """The first death of a thread, which must be that of the agent, once there is a loop to end."""

    def __init__(self) -> None:
        self._loop: SyncLoop | None = None
        self._error: BaseException | None = None
        threading.excepthook = self._note

    def end(self, loop: SyncLoop) -> None:
        """Let the loop end at the next death, or at the one that was."""
        self._loop = loop
        if self._error is not None:
            loop.abort(self._error)

    def _note(self, args: threading.ExceptHookArgs) -> None:
        self._error = args.exc_value or RuntimeError(f"thread {args.thread} ended")
        if self._loop is not None:
            self._loop.abort(self._error)


def _follow_signals(loop: SyncLoop, reload: Callable[[], None]) -> None:
    """Let signals reach the loop, from a thread of their own."""

    def follow() -> None:
        stopping = False
        while True:
            number = signal.sigwait(SIGNALS)
            log.info("agent.signal", signal=signal.Signals(number).name)
            if number == signal.SIGHUP:
                reload()
                loop.request_resync()
            elif stopping:
                os._exit(128 + number)
            else:
                stopping = True
                loop.close()

    threading.Thread(target=follow, name="signals", daemon=True).start()
