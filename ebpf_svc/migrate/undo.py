"""From us back to kube-proxy, without a connection lost.

Order: kube-proxy's rules must be there, and cover what we serve; then our frontends take no new
connections, which pass to those rules, while our programs go on translating the connections they
have; when those have ended, everything of ours goes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from ebpf_svc.config import Settings, SocketLB
from ebpf_svc.dataplane.base import Dataplane
from ebpf_svc.dataplane.inspect import HandsOver, ShowsFlows
from ebpf_svc.host.kubeproxy import Sign, mode_of_running
from ebpf_svc.host.lock import DirectoryLock
from ebpf_svc.migrate.agent import is_running
from ebpf_svc.migrate.inventory import Inventory
from ebpf_svc.migrate.rules import Served
from ebpf_svc.migrate.takeover import Obstacle, Say, frontends_text
from ebpf_svc.model.desired import DesiredState
from ebpf_svc.model.net import Protocol
from ebpf_svc.modes import make_dataplane
from ebpf_svc.status import FILES, STATUS, read_json

POLL_S = 0.5
ENDED = ("closed", "reset")
"""States of flows that carry nothing any more; one that is closing may still."""
BRING_BACK = (
    "kubectl -n kube-system patch daemonset kube-proxy --type merge -p "
    """'{"spec":{"template":{"spec":{"nodeSelector":{"ebpf-svc.io/no-kube-proxy":null}}}}}'"""
)


def obstacles(
    settings: Settings, found: Inventory, signs: Sequence[Sign], ours: frozenset[Served]
) -> Iterator[Obstacle]:
    """What speaks against going back now.

    Args:
        ours: what our agent served when it ended.
    """
    if is_running(settings.run_dir):
        yield Obstacle(
            "our agent runs and would take every connection again",
            "stop it; what it wrote goes on forwarding (systemctl stop ebpf-svc, or delete its "
            "DaemonSet)",
            forcible=False,
        )
    if not signs:
        yield Obstacle(
            "kube-proxy does not run: nobody would keep its rules up to date",
            BRING_BACK,
            forcible=True,
        )
    if not found.served and _taken_in_place(settings):
        return
    if not found.served:
        yield Obstacle(
            "kube-proxy has written no rules yet: services would stop",
            "wait for its first sync",
            forcible=False,
        )
        return
    # Which addresses take node ports differs by mode and setting: their absence proves nothing.
    missing = sorted(each for each in ours - found.served if each[0])
    if missing:
        yield Obstacle(
            f"kube-proxy's rules do not serve: {frontends_text(missing)}",
            "wait for its sync; --force when those Services are gone",
            forcible=True,
        )


def give_back(settings: Settings, *, drain_s: float, force: bool, say: Say) -> int:
    """Let go of new connections, wait for ours to end, remove everything of ours.

    Args:
        drain_s: how long to wait, in seconds.
        force: then remove our programs whatever still passes through them.

    Returns:
        how many connections still pass through our programs, which therefore stay; 0 = all done.

    Raises:
        UnsupportedHost: an agent runs.
        DataplaneError: something could not be written or removed.
    """
    dataplane = make_dataplane(_mode_of_agent(settings), _without_hooks(settings))
    with DirectoryLock(settings.run_dir):
        if isinstance(dataplane, HandsOver) and _taken_in_place(settings):
            say("leaving our rules to kube-proxy, whose mode is the same")
            dataplane.hand_over()
            _forget(settings)
            return 0
        say("letting new connections pass to kube-proxy's rules")
        dataplane.open()
        try:
            dataplane.apply(DesiredState())
            left = _drain(dataplane, drain_s, say)
        finally:
            dataplane.close()
        if left and not force:
            return left
        say("removing our programs, maps and rules")
        dataplane.cleanup()
        _forget(settings)
    return 0


def _taken_in_place(settings: Settings) -> bool:
    """Whether the kube-proxy that runs has the mode our agent had, and so the same names.

    It corrects what stands there; were we to remove it, we should remove its own rules.
    """
    mode = _mode_of_agent(settings)
    return mode == mode_of_running() and isinstance(make_dataplane(mode, settings), HandsOver)


def _mode_of_agent(settings: Settings) -> str:
    return str((read_json(settings.run_dir / STATUS) or {}).get("mode", "ebpf"))


def _forget(settings: Settings) -> None:
    """Remove what the agent wrote about itself."""
    for name in FILES:
        (settings.run_dir / name).unlink(missing_ok=True)


def _without_hooks(settings: Settings) -> Settings:
    """Settings under which sockets are left alone.

    A connected socket needs our hooks no more. With them a sweep would end the UDP sockets of
    endpoints we no longer know, to make their programs ask anew: here the endpoints live on.
    """
    ebpf = settings.ebpf.model_copy(update={"socket_lb": SocketLB.OFF})
    return settings.model_copy(update={"ebpf": ebpf})


def _drain(dataplane: Dataplane, drain_s: float, say: Say) -> int:
    """Wait until no connection needs our programs; how many still do at the end."""
    deadline = time.monotonic() + drain_s
    told = 0
    while True:
        left = _connections(dataplane)
        if left == 0 or time.monotonic() >= deadline:
            return left
        if left != told:
            told = left
            say(f"waiting for {left} connections through our programs")
        time.sleep(POLL_S)


def _connections(dataplane: Dataplane) -> int:
    """TCP connections in the flow table; UDP has no end to wait for and moves over at once."""
    if not isinstance(dataplane, ShowsFlows):
        return 0
    return sum(
        flow.frontend.protocol is not Protocol.UDP and flow.state not in ENDED
        for flow in dataplane.flows()
    )
