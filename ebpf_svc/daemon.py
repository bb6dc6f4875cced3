"""The agent: builds the parts, starts their threads, follows signals. The only wiring."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import socket
import threading
from contextlib import ExitStack
from pathlib import Path

from ebpf_svc import __version__
from ebpf_svc.config import Settings
from ebpf_svc.errors import ConfigError, UnsupportedHost
from ebpf_svc.events import EventRecorder, ObjectRef
from ebpf_svc.host.lock import DirectoryLock
from ebpf_svc.host.mounts import ensure_bpffs
from ebpf_svc.log import get_logger
from ebpf_svc.modes import make_dataplane
from ebpf_svc.monitoring import Monitoring
from ebpf_svc.plan.options import PlanOptions
from ebpf_svc.plan.planner import Planner
from ebpf_svc.status import SETTINGS, write_atomically
from ebpf_svc.sync import SyncLoop
from ebpf_svc.watch.addresses import AddressWatch
from ebpf_svc.watch.files import FileSource
from ebpf_svc.watch.store import Store

LOADING_OBJECTS = 200_000
"""While loading, look for garbage after so many new objects only: there is none, and looking
costs a quarter of the time to the first sync."""
USUAL_THRESHOLDS = gc.get_threshold()
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

log = get_logger(__name__)


def run(settings: Settings, *, mode: str = "ebpf") -> None:
    """Serve until SIGTERM or SIGINT; traffic goes on afterwards with what the kernel holds (Z2).

    Args:
        settings: `manifests` is set; an empty `node_name` becomes the host's.
        mode: which dataplane, see `modes`.

    Raises:
        ConfigError: there is nothing to serve.
        UnsupportedHost: another agent runs here, or this machine cannot run the dataplane.
        DataplaneError: the dataplane does not open.
    """
    if settings.manifests is None:
        raise ConfigError("manifests", got=None, expected="a folder of manifests to serve")
    node = (settings.node_name or socket.gethostname()).strip().lower()
    settings = settings.model_copy(update={"node_name": node})
    # Blocked in every thread, taken by one: no handler ever runs in the middle of a write.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    gc.set_threshold(LOADING_OBJECTS)
    with ExitStack() as stack:
        stack.enter_context(DirectoryLock(settings.run_dir))
        if mode == "ebpf":
            # Mounted first: the lock must lie on what every agent will find there.
            _mount_bpffs(settings.ebpf.bpffs)
            stack.enter_context(DirectoryLock(settings.ebpf.bpffs))
        write_atomically(settings.run_dir / SETTINGS, settings.model_dump_json() + "\n")
        log.info("agent.starting", version=__version__, node=node, mode=mode)
        store = Store(node)
        dataplane = make_dataplane(mode, settings)
        planner = Planner(PlanOptions.from_settings(settings))
        addresses, files = AddressWatch(store), FileSource(settings, store)
        recorder = EventRecorder()
        monitoring = Monitoring(settings, dataplane, recorder)
        loop = SyncLoop(
            store,
            planner,
            dataplane,
            settings,
            on_ready=settle_memory,
            observers=monitoring.observers,
        )
        _watch_threads(loop)
        if not settings.kubernetes.service_proxy_name:  # else it serves beside kube-proxy
            threading.Thread(target=_notice_kube_proxy, name="kube-proxy", daemon=True).start()
        # Before the dataplane opens, which may take a compile: a liveness probe does not wait.
        stack.callback(monitoring.stop)
        monitoring.start(on_fatal=loop.abort)
        dataplane.open()
        stack.callback(dataplane.close)
        stack.callback(monitoring.stop)  # nobody may collect from a dataplane that closes
        recorder.note(ObjectRef("Node", "", node), "Starting", mode, action="StartKubeProxy")
        addresses.start()
        stack.callback(addresses.stop)
        files.start()
        stack.callback(files.stop)
        loop.run()
    log.info("agent.stopped")


def _notice_kube_proxy() -> None:
    """Look beside whom this agent starts; a node that has many rules takes a while."""
    from ebpf_svc.host import kubeproxy  # noqa: PLC0415  # needed once

    kubeproxy.notice()


def _mount_bpffs(path: Path) -> None:
    try:
        ensure_bpffs(path)
    except PermissionError:
        raise
    except OSError as exc:
        raise UnsupportedHost([f"{path}: {exc.strerror} (mount -t bpf bpf {path})"]) from exc


def settle_memory() -> None:
    """Keep what was loaded out of the garbage collector's way and give freed memory back."""
    gc.collect()
    gc.set_threshold(*USUAL_THRESHOLDS)
    gc.freeze()
    ctypes.CDLL(None).malloc_trim(0)


def _watch_threads(loop: SyncLoop) -> None:
    """Let signals and the death of any thread reach the loop."""

    def follow_signals() -> None:
        stopping = False
        while True:
            number = signal.sigwait(SIGNALS)
            log.info("agent.signal", signal=signal.Signals(number).name)
            if number == signal.SIGHUP:
                loop.request_resync()
            elif stopping:
                os._exit(128 + number)
            else:
                stopping = True
                loop.close()

    def on_thread_death(args: threading.ExceptHookArgs) -> None:
        loop.abort(args.exc_value or RuntimeError(f"thread {args.thread} ended"))

    threading.excepthook = on_thread_death
    threading.Thread(target=follow_signals, name="signals", daemon=True).start()
