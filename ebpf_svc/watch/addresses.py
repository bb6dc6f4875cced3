"""The addresses of this node's interfaces, followed as they change.

A netlink message only says *that* something changed; what is there now is asked for anew. So a
message that was lost, or two that came in the wrong order, do no harm.

What kube-ipvs0 has are services' addresses, not the node's: node ports do not answer there (V7),
and its thousands that come and go are no reason to ask.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import closing

from ebpf_svc.errors import WatchError
from ebpf_svc.host import dummy, rtnetlink
from ebpf_svc.host.kubeproxy import LINK
from ebpf_svc.host.netlink import messages
from ebpf_svc.log import get_logger
from ebpf_svc.watch.store import Store

log = get_logger(__name__)

QUIET_S = 0.01
"""A new pod brings several messages at once; they cost one look."""
PATIENCE_S = 0.1
"""No change waits longer than this for quiet."""
RETRY_S = 1.0
"""Pause before the kernel is asked again after it refused."""

_RTMGRP_IPV4_IFADDR = 0x10
_RTMGRP_IPV6_IFADDR = 0x100
_IFA_F_OPTIMISTIC = 0x04
_IFA_F_DADFAILED = 0x08
_IFA_F_TENTATIVE = 0x40
_IFADDRMSG = struct.Struct("=BBBBI")


class AddressWatch:
    """Keeps a Store's local addresses in line with the network namespace it is started in."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
        )
        self._stop_read, self._stop_write = os.pipe2(os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="addresses", daemon=True)

    def start(self) -> None:
        """Give the store what is there, then follow it.

        Raises:
            WatchError: the kernel does not say.
        """
        # Bound before the first look, so that nothing falls between the two.
        self._socket.bind((0, _RTMGRP_IPV4_IFADDR | _RTMGRP_IPV6_IFADDR))
        self._store.set_local_addresses(local_addresses())
        self._thread.start()

    def stop(self) -> None:
        """Stop following; the store keeps what it has."""
        os.write(self._stop_write, b"x")
        if self._thread.is_alive():
            self._thread.join()
        self._socket.close()
        os.close(self._stop_read)
        os.close(self._stop_write)

    def _run(self) -> None:
        retry_s: float | None = None
        while self._wait(retry_s):
            try:
                self._store.set_local_addresses(local_addresses())
                retry_s = None
            except WatchError as error:
                log.warning("addresses.unreadable", error=str(error), retry_s=RETRY_S)
                retry_s = RETRY_S

    def _wait(self, timeout_s: float | None) -> bool:
        """Wait for a change, and then for quiet; False = stop."""
        poll = select.poll()
        poll.register(self._stop_read, select.POLLIN)
        poll.register(self._socket, select.POLLIN)
        ends_s = 0.0
        while ready := dict(poll.poll(None if timeout_s is None else timeout_s * 1000)):
            if self._stop_read in ready:
                return False
            if not self._drain() and not ends_s:
                continue
            ends_s = ends_s or time.monotonic() + PATIENCE_S
            timeout_s = min(QUIET_S, ends_s - time.monotonic())
            if timeout_s <= 0:
                break
        return True

    def _drain(self) -> bool:
        """Read what came; whether any of it is about the node's own addresses."""
        services = dummy.index_of(LINK)
        is_ours = False
        while True:
            try:
                for _, _, _, body in messages(self._socket.recv(65536)):
                    is_ours |= _IFADDRMSG.unpack_from(body)[-1] != services
            except BlockingIOError:
                return is_ours
            except OSError as error:
                # ENOBUFS: messages were lost, which is just another change.
                log.debug("addresses.overrun", error=str(error))
                is_ours = True


def local_addresses() -> tuple[str, ...]:
    """Every usable address of this network namespace, sorted; link-local IPv6 left out.

    Raises:
        WatchError: the kernel does not say.
    """
    try:
        with closing(rtnetlink.Socket()) as link:
            return tuple(sorted(set(_usable(link))))
    except OSError as error:
        raise WatchError(f"addresses: {error}") from error


def _usable(link: rtnetlink.Socket) -> Iterator[str]:
    services = dummy.index_of(LINK)
    for address, index, flags in dummy.addresses(link):
        # Still asking the link whether somebody has it, or knowing that somebody does.
        undecided = flags & _IFA_F_TENTATIVE and not flags & _IFA_F_OPTIMISTIC
        if undecided or flags & _IFA_F_DADFAILED or index == services:
            continue
        if not address.startswith(("fe8", "fe9", "fea", "feb")):
            yield address
