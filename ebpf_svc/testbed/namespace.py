"""One network namespace: entering it, its netlink socket, its sysctls, processes in it."""

from __future__ import annotations

import ipaddress
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute

from ebpf_svc.errors import EbpfSvcError
from ebpf_svc.testbed import kernel
from ebpf_svc.testbed.patience import PATIENCE

IFA_F_TENTATIVE = 0x40
SETTLED_S = 60.0
POLL_S = 0.005
# No duplicate address detection, no router discovery: nobody is asked about an address.
_QUIET_IPV6 = {
    f"net/ipv6/conf/{scope}/{name}": value
    for scope in ("all", "default")
    for name, value in (("accept_dad", 0), ("accept_ra", 0), ("router_solicitations", 0))
}
# The kernel tells a client at most six times in a burst, then once a second, that nobody listens at
# a port; tests ask more often than that.
_TALKATIVE = {"net/ipv4/icmp_ratemask": 0, "net/ipv6/icmp/ratelimit": 0}

# A shell joins the cgroup before the program exists: sockets belong to the cgroup they open in.
_JOIN_CGROUP = ("/bin/sh", "-c", 'echo $$ > "$0/cgroup.procs" && exec "$@"')


class TentativeAddress(EbpfSvcError):
    """The kernel does not let an address be used."""


class Namespace:
    """A named network namespace; `ip netns exec NAME` sees it too."""

    def __init__(self, name: str) -> None:
        kernel.create_netns(name)
        self.name = name
        self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        with self.netlink() as ip:
            ip.link("set", index=1, state="up")
        self.sysctl({**_QUIET_IPV6, **_TALKATIVE})

    @property
    def path(self) -> Path:
        return kernel.NETNS_DIR / self.name

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Let the calling thread live in the namespace; processes it starts inherit that."""
        with kernel.entered(self.fd):
            yield

    @contextmanager
    def netlink(self) -> Iterator[Any]:
        """A pyroute2 IPRoute of this namespace, for the calling thread."""
        with self.entered(), IPRoute() as ip:
            yield ip

    def sysctl(self, values: Mapping[str, int | str]) -> None:
        """Write sysctls given by path below /proc/sys, e.g. `net/ipv4/ip_forward`."""
        with self.entered():
            for name, value in values.items():
                Path("/proc/sys", name).write_text(str(value))

    def settle(self) -> None:
        """Wait until every address may be used.

        The kernel sees to a new IPv6 address in a work queue, one that is its device's own, too:
        half a minute later when it has a lot to tidy up. Until then nothing is sent from it, not
        even a neighbour solicitation.

        Raises:
            TentativeAddress: one may not, for longer than that.
        """
        ends_s = time.monotonic() + SETTLED_S * PATIENCE
        with self.entered():
            while waiting := _tentative():
                if time.monotonic() > ends_s:
                    raise TentativeAddress(f"{self.name}: not usable yet: {', '.join(waiting)}")
                time.sleep(POLL_S)

    def popen(self, argv: Sequence[str], *, cgroup: Path, **options: Any) -> subprocess.Popen[str]:
        """Start a process in the namespace and cgroup; options as for Popen, streams are text."""
        with self.entered():
            return subprocess.Popen([*_JOIN_CGROUP, str(cgroup), *argv], text=True, **options)

    def close(self) -> None:
        """Give the namespace up; the kernel frees it once no process lives in it."""
        os.close(self.fd)
        kernel.remove_netns(self.name)


def _tentative() -> list[str]:
    """Addresses of the calling thread's namespace that may not be used yet, with their devices."""
    lines = Path("/proc/thread-self/net/if_inet6").read_text().splitlines()
    return [
        f"{ipaddress.IPv6Address(bytes.fromhex(address))} on {device}"
        for address, _, _, _, flags, device in map(str.split, lines)
        if int(flags, 16) & IFA_F_TENTATIVE
    ]


def python_argv(module: str, *, site_packages: bool = True) -> list[str]:
    """How to run a module of this package with this interpreter, wherever the process stands."""
    if site_packages:
        return [sys.executable, "-m", module]
    # Without site-packages the interpreter starts in half the time.
    root = Path(__file__).resolve().parents[2]
    start = (
        f"import sys, runpy; sys.path.insert(0, {str(root)!r}); "
        f"runpy.run_module({module!r}, run_name='__main__')"
    )
    return [sys.executable, "-E", "-S", "-c", start]
