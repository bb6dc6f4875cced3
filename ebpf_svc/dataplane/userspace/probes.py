"""Whether this host can run the relay, found out by trying."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable

from ebpf_svc.config import Settings
from ebpf_svc.dataplane.base import Check
from ebpf_svc.dataplane.userspace import relay, stream
from ebpf_svc.errors import CommandError
from ebpf_svc.host.command import run

TRIAL = "inet ebpf-svc-userspace-trial"


def probe_all(settings: Settings) -> tuple[Check, ...]:
    """Every requirement, what it is for, and what it is like here."""
    reason = netfilter_missing()
    lost = "backends see this node as their client, never a pod or an outside address (U7)"
    return (
        _probe("sockets", _listen, "a TCP and a UDP socket listen", "run as root"),
        Check(
            "netfilter",
            not reason,
            "an nftables table leads packets to the relay"
            if not reason
            else f"{reason}: addresses of services become this node's own, and their ports are"
            " taken from its programs",
            "" if not reason else "install nftables and load nf_tables, nft_nat and nf_conntrack",
            required=False,
        ),
        _probe("splice", _splice, "pages pass from socket to socket", "", required=False),
        Check("open files", True, f"{relay.raise_limit()} at most: two a connection"),
        Check("client addresses", True, lost),
        Check("life", True, "connections end with the agent; nothing serves while it is gone (Z2)"),
    )


def netfilter_missing() -> str:
    """Why nftables cannot be used; empty when it can."""
    if not shutil.which("nft"):
        return "nft is not installed"
    text = (
        f"add table {TRIAL}\n"
        f"add map {TRIAL} m {{ type ipv4_addr . inet_proto . inet_service : inet_service; }}\n"
        f"add chain {TRIAL} c {{ type nat hook output priority 0; }}\n"
        f"add rule {TRIAL} c ct state new meta l4proto {{ tcp, udp }} dnat ip to 127.0.0.1 :"
        " ip daddr . meta l4proto . th dport map @m\n"
        f"delete table {TRIAL}\n"
    )
    try:
        # One transaction: nobody ever sees the table.
        run(["nft", "-f", "-"], input=text)
    except CommandError as error:
        words = error.stderr.strip().splitlines()
        return words[0] if words else "nft refuses"
    return ""


def _probe(
    name: str, attempt: Callable[[], None], detail: str, mend: str, *, required: bool = True
) -> Check:
    try:
        attempt()
    except OSError as error:
        return Check(name, False, error.strerror or str(error), mend, required)
    return Check(name, True, detail, required=required)


def _listen() -> None:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET, kind) as sock:
            sock.bind(("127.0.0.1", 0))
            if kind == socket.SOCK_STREAM:
                sock.listen(1)


def _splice() -> None:
    near, far = socket.socketpair()
    pipe = stream.make_pipe()
    try:
        near.send(b"x")
        os.splice(far.fileno(), pipe[1], 1)
        os.splice(pipe[0], far.fileno(), 1)
    finally:
        near.close()
        far.close()
        for fd in pipe:
            os.close(fd)
