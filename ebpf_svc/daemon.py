"""The agent: builds the parts, starts their threads, follows signals. The only wiring."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

from ebpf_svc import __version__
from ebpf_svc.config import DetectLocalMode, Settings
from ebpf_svc.config.detect import with_pod_cidrs
from ebpf_svc.events import EventRecorder, ObjectRef
from ebpf_svc.host.lock import DirectoryLock
from ebpf_svc.log import get_logger
from ebpf_svc.modes import make_dataplane
from ebpf_svc.monitoring import ACTION, Monitoring
from ebpf_svc.notices import NodeCheck, Notices, say_who_else
from ebpf_svc.plan.options import PlanOptions
from ebpf_svc.plan.planner import Planner
from ebpf_svc.prepare import prepare, set_oom_score
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
    mode: str = "ebpf",
    reload: Callable[[], Settings] | None = None,
    config_files: Iterable[Path] = (),
) -> None:
    """Serve until SIGTERM or SIGINT; traffic goes on afterwards with what the kernel holds (Z2).

    Args:
        settings: an empty `node_name` becomes the host's.
        mode: which dataplane, see `modes`.
        reload: reads the settings anew, at SIGHUP and when a file changes; raises ConfigError.
        config_files: the files those settings come from.

    Raises:
        ConfigError: there is nothing to serve, or the settings do not fit this node.
        UnsupportedHost: another agent runs here, or this machine cannot run the dataplane.
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
        if mode == "ebpf":
            # Mounted first: the lock must lie on what every agent will find there.
            prepare(settings, strict=False)
            stack.enter_context(DirectoryLock(settings.ebpf.bpffs))
            set_oom_score(settings.oom_score_adj)
        log.info("agent.starting", version=__version__, node=node, mode=mode)
        addresses = AddressWatch(store)
        for watch in (addresses, source):
            watch.start()
            stack.callback(watch.stop)
        pod_cidrs = _await_pod_cidrs(settings, store)
        if pod_cidrs is None:
            return
        settings = with_pod_cidrs(settings, pod_cidrs)
        write_atomically(settings.run_dir / SETTINGS, settings.model_dump_json() + "\n")

        recorder = EventRecorder(sink)
        dataplane = make_dataplane(mode, settings)
        monitoring = Monitoring(settings, recorder)
        notices = Notices(recorder, lambda: dataplane, node, tells_problems=sink is not None)
        loop = SyncLoop(
            store,
            Planner(PlanOptions.from_settings(settings)),
            dataplane,
            settings,
            on_ready=lambda: _when_ready(settings, recorder),
            observers=(NodeCheck(settings, pod_cidrs), *monitoring.observers, notices),
        )
        deaths.end(loop)

        def apply(settings: Settings) -> None:
            loop.reconfigure(Planner(PlanOptions.from_settings(settings)), settings)
            monitoring.take(settings)

        reloader = Reloader(loaded, settings, reload or (lambda: loaded), apply)
        _follow_signals(loop, reloader)
        # Before the dataplane opens, which may take a compile: a liveness probe does not wait.
        stack.callback(monitoring.stop)
        monitoring.start(on_fatal=loop.abort)
        dataplane.open()
        monitoring.serve(dataplane, {})
        stack.callback(dataplane.close)
        stack.callback(monitoring.stop)  # nobody may collect from a dataplane that closes
        recorder.note(ObjectRef("Node", "", node), "Starting", mode, action=ACTION)
        config_watch = ConfigWatch(config_files, reloader)
        config_watch.start()
        stack.callback(config_watch.stop)
        loop.run()
    log.info("agent.stopped")


def settle_memory() -> None:
    """Keep what was loaded out of the garbage collector's way and give freed memory back."""
    gc.collect()
    gc.set_threshold(*USUAL_THRESHOLDS)
    gc.freeze()
    ctypes.CDLL(None).malloc_trim(0)


def _when_ready(settings: Settings, recorder: EventRecorder) -> None:
    """What can wait until services are served."""
    settle_memory()
    look = threading.Thread(
        target=say_who_else, args=(settings, recorder), name="neighbours", daemon=True
    )
    look.start()


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
