"""What DST may be."""

from __future__ import annotations

import pytest

from ebpf_svc.errors import ConfigError
from ebpf_svc.explain.target import parse
from ebpf_svc.model.desired import FrontendKey, FrontendKind
from ebpf_svc.model.net import Protocol
from ebpf_svc.status import NamedFrontend

TCP, UDP, SCTP = Protocol.TCP, Protocol.UDP, Protocol.SCTP


def _named(port: str, kind: FrontendKind = FrontendKind.CLUSTER_IP) -> NamedFrontend:
    return NamedFrontend("shop", "web", port, kind)


NAMES = {
    FrontendKey("fd00::1", 80, TCP): _named("http"),
    FrontendKey("10.96.0.1", 80, TCP): _named("http"),
    FrontendKey("10.96.0.1", 53, UDP): _named("dns"),
    FrontendKey("172.18.0.2", 30080, TCP): _named("http", FrontendKind.NODE_PORT),
}


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("10.96.0.1:80",), FrontendKey("10.96.0.1", 80, TCP)),
        (("010.096.0.1:80/udp",), FrontendKey("10.96.0.1", 80, UDP)),
        (("[FD00::01]:53/SCTP",), FrontendKey("fd00::1", 53, SCTP)),
        (("svc", "shop/web"), FrontendKey("10.96.0.1", 53, UDP)),
        (("svc", "shop/web:http"), FrontendKey("10.96.0.1", 80, TCP)),
        (("svc", "shop/web:80"), FrontendKey("10.96.0.1", 80, TCP)),
        (("svc", "shop/web:dns/udp"), FrontendKey("10.96.0.1", 53, UDP)),
    ],
)
def test_target_is_read(words: tuple[str, ...], key: FrontendKey) -> None:
    """Addresses as sloppily as the API takes them, Services by name; IPv4 first."""
    assert parse(words, NAMES) == key


@pytest.mark.parametrize(
    "words",
    [
        ("10.96.0.1",),
        ("10.96.0.1:0",),
        ("10.96.0.1:70000",),
        ("10.96.0.300:80",),
        ("fd00::1:80",),
        ("shop/web",),
        ("svc", "web"),
        ("svc", "shop/web:https"),
        ("svc", "shop/other"),
        ("svc", "shop/web:http/udp"),
        ("a", "b", "c"),
    ],
)
def test_nonsense_is_refused_with_what_is_expected(words: tuple[str, ...]) -> None:
    """Not taken for something else."""
    with pytest.raises(ConfigError, match="expected"):
        parse(words, NAMES)


def test_ports_of_a_service_are_offered() -> None:
    """Who misspells a port is told which there are."""
    with pytest.raises(ConfigError, match="dns/UDP, http/TCP"):
        parse(("svc", "shop/web:https"), NAMES)
