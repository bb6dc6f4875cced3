"""What a node needs, and what it cannot do, where netfilter carries services."""

from __future__ import annotations

import json
from contextlib import suppress

from ebpf_svc.errors import CommandError
from ebpf_svc.testbed.host import Node

MODES = ("nftables", "ipvs", "iptables")


def suit(node: Node, mode: str) -> None:
    """Set up a node, pods included, as it is under a real CNI plugin; nothing for other modes.

    Packets between pods of one bridge meet netfilter only with br_netfilter. A bridge sends a frame
    back to the pod it came from only when told (`hairpinMode`). And a node
    answers a peer with one ICMP error a second; tests ask more often.
    """
    if mode not in MODES:
        return
    with suppress(CommandError):  # it is built in
        node.run(["modprobe", "--quiet", "br_netfilter"])
    for link in json.loads(node.run(["bridge", "-j", "link"])):
        if link.get("master") == "cni0":
            node.run(["bridge", "link", "set", "dev", link["ifname"], "hairpin", "on"])
    for name in ("net.ipv4.icmp_ratelimit", "net.ipv6.icmp.ratelimit"):
        node.run(["sysctl", "-qw", f"{name}=0"])
