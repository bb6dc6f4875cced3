"""Pieces of rules in the very words of iptables-save, so that what is read equals what was written.

Pure. A rule is text that starts with its chain, as in `host.iptables.Rule`. The order of matches is
part of the wording: source, destination, interfaces and protocol come first.
"""

from __future__ import annotations

import re
from functools import lru_cache

from ebpf_svc.dataplane.netfilter.pods import PodMatch
from ebpf_svc.model.desired import FrontendKey
from ebpf_svc.model.net import Family, Protocol, family_of

HOST_BITS = {Family.V4: 32, Family.V6: 128}
LOOPBACK = {Family.V4: "127.0.0.0/8", Family.V6: "::1/128"}
_FULL_MASK = {Family.V4: "255.255.255.255", Family.V6: ":".join(["ffff"] * 8)}
_REFUSAL = {Family.V4: "icmp-port-unreachable", Family.V6: "icmp6-port-unreachable"}
_STEPS = 0x80000000
"""The kernel holds a probability as a fraction of this."""

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\S+')
_SILENT = ("-m", "--comment")
"""Options that change nothing: the matches they load have options of their own."""


def comment(text: str) -> str:
    """What tools and people look for (I18); an apostrophe or quote must not be in it."""
    return f'-m comment --comment "{text}"'


def host_prefix(address: str) -> str:
    """An address as iptables prints it."""
    return f"{address}/{HOST_BITS[family_of(address)]}"


def to_address(key: FrontendKey) -> str:
    """Its destination is the frontend."""
    return f"-d {host_prefix(key.address)}"


def of_protocol(protocol: Protocol) -> str:
    """Its transport protocol."""
    return f"-p {protocol.value.lower()}"


def to_port(protocol: Protocol, port: int) -> str:
    """Its destination port."""
    return f"-m {protocol.value.lower()} --dport {port}"


@lru_cache(maxsize=4096)
def with_probability(count: int) -> str:
    """One of `count`, as the kernel rounds it (I13)."""
    return f"-m statistic --mode random --probability {round(_STEPS / count) / _STEPS:.11f}"


def source_is_pod(pods: PodMatch, *, negate: bool = False) -> tuple[str, str]:
    """What a pod's packet matches: by its source, and by its interface; one is empty (D1)."""
    sign = "! " if negate else ""
    if pods.prefix:
        return f"{sign}-s {pods.prefix} ", ""
    device = pods.device or f"{pods.device_prefix}+"
    return "", f"{sign}-i {device} "


def remembered(family: Family, name: str, seconds: int) -> str:
    """The source came to that endpoint not long ago (I12)."""
    return f"-m recent --rcheck --seconds {seconds} --reap {_list(family, name)}"


def remember(family: Family, name: str) -> str:
    """Note where the packet comes from, for that endpoint (I12)."""
    return f"-m recent --set {_list(family, name)}"


def _list(family: Family, name: str) -> str:
    return f"--name {name} --mask {_FULL_MASK[family]} --rsource"


def refuse(family: Family, protocol: Protocol) -> str:
    """Answer like a host on which nothing listens (P2).

    TCP gets a reset, not kube-proxy's ICMP error: those the kernel limits to one a second.
    """
    how = "tcp-reset" if protocol is Protocol.TCP else _REFUSAL[family]
    return f"-j REJECT --reject-with {how}"


def meaning(rule: str) -> tuple[str, ...]:
    """A rule without comments and the order of its matches: what two wordings have in common."""
    chain, _, rest = rule.partition(" ")
    options: list[str] = []
    negated = is_silent = False
    for token in _TOKEN.findall(rest):
        if token == "!":
            negated = True
        elif token.startswith("-") and not _is_number(token):
            is_silent = token in _SILENT
            if not is_silent:
                options.append(f"! {token}" if negated else token)
            negated = False
        elif not is_silent:
            options[-1] += f" {token}"
    return (chain, *sorted(options))


def _is_number(token: str) -> bool:
    return token[1:2].isdigit()
