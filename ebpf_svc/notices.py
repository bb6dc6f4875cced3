"""What an operator must know of beside metrics: observers of the sync loop that speak up.

`NodeCheck` holds the settings against the Node, `Notices` turns what is wrong with objects and
tables into Events, `say_who_else` tells of a kube-proxy beside us.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from ebpf_svc.config import DetectLocalMode, Settings
from ebpf_svc.config.sanity import check_node
from ebpf_svc.dataplane.base import Dataplane
from ebpf_svc.dataplane.inspect import ShowsFill
from ebpf_svc.errors import DataplaneError, EbpfSvcError
from ebpf_svc.events import EventRecorder, ObjectRef
from ebpf_svc.log import get_logger
from ebpf_svc.model.net import Family, family_of
from ebpf_svc.model.snapshot import Problem, Snapshot
from ebpf_svc.sync import Synced

NEARLY_FULL = 0.9
FILL_S = 10.0
"""Tables are looked at with a sync, at most so often."""

log = get_logger(__name__)


class NodeCheck:
    """Ends the agent when the node is one its settings do not fit (A6, N4)."""

    def __init__(self, settings: Settings, pod_cidrs: tuple[str, ...]) -> None:
        """Take the settings in force, and the Node's prefixes they were made with."""
        self._settings, self._pod_cidrs = settings, pod_cidrs
        self._families: frozenset[Family] | None = None

    def started(self) -> None:
        """Nothing is known yet."""

    def queued(self, snapshot: Snapshot) -> None:
        """Look at the node.

        Raises:
            ConfigError: every cluster CIDR is of the family this node does not have.
            EbpfSvcError: the Node's pod prefixes are others than those compiled in.
        """
        node = snapshot.node
        if not self._families:
            families = frozenset(map(family_of, node.addresses))
            if families != self._families:
                for sentence in check_node(self._settings, families):
                    log.warning("config.doubtful", reason=sentence)
            self._families = families
        if self._settings.detect_local.mode is not DetectLocalMode.NODE_CIDR:
            return
        # A Node that is gone says nothing (N4).
        if node.pod_cidrs and node.pod_cidrs != self._pod_cidrs:
            raise EbpfSvcError(
                f"spec.podCIDRs of Node {node.name}: now {', '.join(node.pod_cidrs)}, "
                f"were {', '.join(self._pod_cidrs)}: to be started anew"
            )

    def applied(self, synced: Synced) -> None:
        """Nothing to say."""

    def failed(self, error: DataplaneError) -> None:
        """Nothing to say."""


class Notices:
    """Events about objects that are wrong, and about tables that fill up."""

    def __init__(
        self,
        recorder: EventRecorder,
        dataplane: Callable[[], Dataplane],
        node: str,
        *,
        tells_problems: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Bind the parts.

        Args:
            recorder: for the Events.
            dataplane: gives the one that serves, whose tables are looked at.
            node: this node's name.
            tells_problems: objects have a place for Events; else whoever read them has logged it.
            clock: seconds that only grow.
        """
        self._recorder, self._dataplane, self._clock = recorder, dataplane, clock
        self._node, self._tells_problems = ObjectRef("Node", "", node), tells_problems
        self._of_objects: tuple[Problem, ...] = ()
        self._known: frozenset[Problem] = frozenset()
        self._look_at = clock()

    def started(self) -> None:
        """Nothing is known yet."""

    def queued(self, snapshot: Snapshot) -> None:
        """Remember what is wrong with objects."""
        self._of_objects = snapshot.problems

    def applied(self, synced: Synced) -> None:
        """Tell what is new."""
        if self._tells_problems:
            self._tell_problems(frozenset((*self._of_objects, *synced.desired.problems)))
        if self._clock() >= self._look_at:
            self._look_at = self._clock() + FILL_S
            self._tell_fill()

    def failed(self, error: DataplaneError) -> None:
        """A table may be full: that is the moment to say so."""
        self._tell_fill()

    def _tell_problems(self, problems: frozenset[Problem]) -> None:
        for problem in sorted(problems - self._known, key=str):
            kind, _, rest = problem.object_ref.partition(" ")
            namespace, _, name = rest.rpartition("/")
            if name:
                note = f"{problem.field}: {problem.message}" if problem.field else problem.message
                about = ObjectRef(kind, namespace, name)
                self._recorder.warn(about, f"Invalid{kind}", note, action="Serve")
        self._known = problems

    def _tell_fill(self) -> None:
        dataplane = self._dataplane()
        if not isinstance(dataplane, ShowsFill):
            return
        try:
            fill = list(dataplane.fill())
        except (OSError, DataplaneError) as error:
            log.warning("notices.fill", error=str(error))
            return
        # Those that evict are meant to be full.
        full = [
            f"{each.name} {each.entries} of {each.capacity}"
            for each in fill
            if not each.evicts and each.entries >= NEARLY_FULL * each.capacity
        ]
        if full:
            note = f"tables nearly full: {', '.join(full)}; new Services may not fit"
            self._recorder.warn(self._node, "TableNearlyFull", note, action="Serve")


def say_who_else(settings: Settings, recorder: EventRecorder) -> None:
    """Say so when a kube-proxy runs here, or left rules that act beside ours."""
    from ebpf_svc.host import kubeproxy  # noqa: PLC0415  # not before there is time for it

    try:
        signs = kubeproxy.running(os.getpid())
        left = kubeproxy.leftovers(settings.families)
    except (OSError, DataplaneError, ValueError) as error:
        log.warning("kube-proxy.unknown", error=str(error))
        return
    if not signs and not left:
        return
    what = "a kube-proxy runs here" if signs else "a kube-proxy has run here; its rules still act"
    found = [*(f"{sign.what}: {sign.detail}" for sign in signs), *left]
    if settings.kubernetes.service_proxy_name:
        # Each has Services of its own.
        log.info("kube-proxy.beside", reason=what, details=found)
        return
    log.warning("kube-proxy.beside", reason=what, details=found, command="ebpf-svc migrate")
    note = f"{what} ({'; '.join(found)}): `ebpf-svc migrate` takes its place"
    node = ObjectRef("Node", "", settings.node_name)
    recorder.warn(node, "KubeProxyFound", note, action="StartKubeProxy")
