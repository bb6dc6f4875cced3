"""Tables of probes: every way to reach a service, asked by everyone at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.testbed.host import Host, Node
from ebpf_svc.testbed.podnet import PodNetwork
from ebpf_svc.testbed.traffic import Answer, Probe, Target, ask_all
from tests.lib import netfilter
from tests.lib.manifests import PROTOCOLS, Web
from tests.lib.world import World

every_pod_network = pytest.mark.parametrize(
    "pod_network", list(PodNetwork), indirect=True, scope="session"
)

CLUSTER_IP, EXTERNAL_IP, BALANCER, LOCALHOST = (
    "clusterIP",
    "externalIP",
    "loadBalancer",
    "localhost",
)
NODE_PORT_1, NODE_PORT_2 = "nodePort node1", "nodePort node2"
EXTERNAL_KINDS = (NODE_PORT_1, NODE_PORT_2, EXTERNAL_IP, BALANCER)
KINDS = (CLUSTER_IP, *EXTERNAL_KINDS)


@dataclass(frozen=True)
class Row:
    """One way to reach a service, and how its requests ended; prints as a line of a table."""

    asker: Host
    kind: str
    family: Family
    target: Target
    answers: Sequence[Answer] = ()

    def __repr__(self) -> str:
        ends = ", ".join(
            f"{one.server} as {one.client}" if one.ok else f"{one.outcome.value} {one.detail}"
            for one in self.answers
        )
        target = f"{self.target.address} {self.target.port}/{self.target.protocol.value}"
        return f"{self.asker.name} -> {self.kind} {target}: {ends}"

    @property
    def ok(self) -> bool:
        """Every request was answered, by the address that was asked as far as the client knows."""
        return all(one.ok and one.peer == self.target.address for one in self.answers)

    @property
    def refused(self) -> bool:
        """Every request got an answer that nothing is there.

        A node's own datagrams netfilter refuses where they are sent (EPERM).
        """
        return all(one.outcome.value == "refused" or self._is_stopped(one) for one in self.answers)

    @property
    def dropped(self) -> bool:
        """No request got an answer."""
        return all(one.outcome.value == "timeout" or self._is_stopped(one) for one in self.answers)

    def _is_stopped(self, answer: Answer) -> bool:
        return (
            isinstance(self.asker, Node)
            and self.target.protocol is Protocol.UDP
            and answer.detail == "EPERM"
        )

    @property
    def servers(self) -> set[str]:
        return {one.server for one in self.answers if one.ok}

    @property
    def clients(self) -> set[str]:
        """Source addresses the servers saw."""
        return {one.client for one in self.answers if one.ok}


def targets(
    world: World, web: Web, kind: str, protocols: Iterable[Protocol] = PROTOCOLS, **options: Any
) -> Iterator[tuple[Family, Target]]:
    """The targets of one kind of frontend, both families."""
    node1, node2 = world.cluster.nodes
    make: dict[str, Callable[[Family, Protocol], Target]] = {
        CLUSTER_IP: lambda f, p: web.at_cluster_ip(f, p, **options),
        EXTERNAL_IP: lambda f, p: web.at_external_ip(f, p, **options),
        BALANCER: lambda f, p: web.at_balancer(f, p, **options),
        LOCALHOST: lambda f, p: web.at_localhost(f, p, **options),
        NODE_PORT_1: lambda f, p: web.at_node(node1, f, p, **options),
        NODE_PORT_2: lambda f, p: web.at_node(node2, f, p, **options),
    }
    for family in Family:
        for protocol in protocols:
            yield family, make[kind](family, protocol)


def table(
    world: World, web: Web, *, askers: Iterable[Host], kinds: Iterable[str] = KINDS,
    count: int = 1, every: bool = False, **options: Any,
) -> list[Row]:  # fmt: skip
    """Everyone asks every kind of frontend of a service, all at the same time.

    In ipvs mode each request has a port of its own: flows of one port that meet at a pod are one
    there, which tests of their own are about, and some of so many would have the same by chance.

    Unless `every`, what the mode has a gap for is left out: node ports on ::1, from where the
    kernel lets no packet leave the node, and in ipvs mode on 127.0.0.1 as well (V7).
    """
    options = {"own_port": world.mode == "ipvs", **options}
    rows = [
        Row(asker, kind, family, target)
        for kind in kinds
        for asker in askers
        if kind != LOCALHOST or isinstance(asker, Node)
        for family, target in targets(world, web, kind, **options)
        if every or not (kind == LOCALHOST and _is_closed(world, family))
    ]
    answered = ask_all([Probe(row.asker, row.target, count) for row in rows])
    return [
        Row(row.asker, row.kind, row.family, row.target, answers)
        for row, answers in zip(rows, answered, strict=True)
    ]


def _is_closed(world: World, family: Family) -> bool:
    return world.mode == "ipvs" or (family is Family.V6 and world.mode in netfilter.MODES)


def failed(rows: Iterable[Row], holds: Callable[[Row], bool] = lambda row: row.ok) -> list[Row]:
    """The rows that do not hold."""
    return [row for row in rows if not holds(row)]


def assert_held(rows: Iterable[Row], holds: Callable[[Row], bool] = lambda row: row.ok) -> None:
    """Assert that every row holds; a failure shows those that do not as a table."""
    __tracebackhide__ = True
    rows = list(rows)
    assert rows, "nothing was asked"
    assert_none(failed(rows, holds), len(rows))


def assert_none(broken: Sequence[Row], of: int) -> None:
    """Assert that no row is broken."""
    __tracebackhide__ = True
    if broken:
        lines = "\n".join(f"  {row!r}" for row in broken)
        pytest.fail(f"{len(broken)} of {of} rows do not hold:\n{lines}", pytrace=False)


def asked_from_outside(client: Host, node: Node, web: Web) -> set[str]:
    """Who answers at a node port and an external IP over TCP; what failed is named by how."""
    probes = [
        Probe(client, target)
        for family in Family
        for target in (
            web.at_node(node, family, Protocol.TCP, timeout_s=0.2),
            web.at_external_ip(family, Protocol.TCP, timeout_s=0.2),
        )
    ]
    return {each.server or each.outcome for answers in ask_all(probes) for each in answers}


def sent_by_driver(node: Node, *devices: str) -> int:
    """Packets that programs of these NICs (default: eth0) have sent, back out of them or on."""
    told = "".join(node.run(["ethtool", "-S", device]) for device in devices or ("eth0",))
    words = re.findall(r"xdp_(?:tx|redirect): (\d+)", told)
    return sum(map(int, words))
