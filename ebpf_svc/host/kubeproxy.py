"""Find a kube-proxy of this network namespace: one that runs, and what one left behind.

Names of its chains are in `migrate.rules`; here is what costs next to nothing to look for, so that
the agent can say at its start beside whom it starts, and what is not iptables.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ebpf_svc.errors import CommandError, DataplaneError
from ebpf_svc.host import iptables, nf_owner
from ebpf_svc.host.command import run
from ebpf_svc.model.net import Family

HEALTH_PORT, METRICS_PORT = 10256, 10249
MODES = ("iptables", "ipvs", "nftables")
"""What kube-proxy says at /proxyMode (HS7)."""
ANSWER_S = 1.0
NFT_TABLES = ("ip kube-proxy", "ip6 kube-proxy")
LINK = "kube-ipvs0"
CANARY = "KUBE-PROXY-CANARY"
IPVS_CHAIN = "KUBE-NODE-PORT"
"""A chain in table nat that only ipvs mode has."""
MARKER = "EBPF-SVC"
"""An empty chain in table nat: kube-proxy's chains beside it are written by our agent."""
_SETS = (
    *("LOOP-BACK", "CLUSTER-IP", "EXTERNAL-IP", "EXTERNAL-IP-LOCAL", "LOAD-BALANCER"),
    *("LOAD-BALANCER-LOCAL", "LOAD-BALANCER-FW", "LOAD-BALANCER-SOURCE-CIDR"),
    *("LOAD-BALANCER-SOURCE-IP", "NODE-PORT-TCP", "NODE-PORT-UDP", "NODE-PORT-LOCAL-TCP"),
    *("NODE-PORT-LOCAL-UDP", "NODE-PORT-SCTP-HASH", "NODE-PORT-LOCAL-SCTP-HASH"),
    *("HEALTH-CHECK-NODE-PORT", "IPVS-IPS"),
)
_SET_NAME_MAX = 31
IPSETS = tuple(
    f"{prefix}{name}"[:_SET_NAME_MAX] for prefix in ("KUBE-", "KUBE-6-") for name in _SETS
)
"""Sets of ipvs mode (V13)."""
STOP_IT = (
    "kubectl -n kube-system patch daemonset kube-proxy --type merge -p "
    """'{"spec":{"template":{"spec":{"nodeSelector":{"ebpf-svc.io/no-kube-proxy":"true"}}}}}'"""
)
"""Takes kube-proxy off every node and keeps its DaemonSet, for the way back."""

_OURS = re.compile(r"\bebpf[_-]svc\b.* run\b|\bebpf_svc\.cli\b")
"""Command lines of our agent."""
_LISTEN = "0A"
_SERVICE_ADDRESS = re.compile(r"([0-9a-f.:]+) \. (tcp|udp|sctp) \. (\d+)")
_SERVICE_NODE_PORT = re.compile(r"(tcp|udp|sctp) \. (\d+)")


@dataclass(frozen=True, slots=True)
class Sign:
    """Something by which a running kube-proxy is known."""

    what: str
    """`process` or `port 10256`."""
    detail: str
    pid: int | None = None


def running(own_pid: int | None = None) -> tuple[Sign, ...]:
    """Signs of a kube-proxy that runs in this network namespace; empty when there is none.

    Args:
        own_pid: our agent, which may hold kube-proxy's ports by now; None = none runs.
    """
    signs = [Sign("process", f"pid {pid} in this network namespace", pid) for pid in _processes()]
    if not answers(HEALTH_PORT):
        return tuple(signs)
    name = f"port {HEALTH_PORT}"
    holders = _listeners(HEALTH_PORT)
    for pid in sorted(holders):
        command = _command(pid)
        if pid != own_pid and not _OURS.search(command):
            signs.append(Sign(name, f"held by pid {pid}: {command}", pid))
    if not holders:
        # No process to be seen, as from a container of its own: ask for the mode. Ours may be
        # called by one of kube-proxy's words, but has metrics kube-proxy has not.
        mode = mode_of_running()
        if mode in MODES and "ebpf_svc_" not in _get(METRICS_PORT, "/metrics"):
            signs.append(Sign(name, f"answered by a kube-proxy in mode {mode}"))
        elif not mode and own_pid is None:
            signs.append(Sign(name, "answered as kube-proxy does"))
    return tuple(signs)


def answers(port: int) -> bool:
    """Whether that local port answers /healthz the way kube-proxy does (HS2)."""
    try:
        said = json.loads(_get(port, "/healthz"))
    except ValueError:
        return False
    return isinstance(said, dict) and {"lastUpdated", "currentTime"} <= said.keys()


def mode_of_running() -> str:
    """What the metrics port calls its mode (HS7); empty when nobody answers."""
    said = _get(METRICS_PORT, "/proxyMode").strip()
    return said if said.isidentifier() else ""


def _get(port: int, path: str) -> str:
    """The body of an answer, whatever its status; empty when nobody answers."""
    import http.client  # noqa: PLC0415  # half a megabyte, for one look

    for host in ("127.0.0.1", "::1"):
        connection = http.client.HTTPConnection(host, port, timeout=ANSWER_S)
        try:
            connection.request("GET", path)
            return connection.getresponse().read(1_048_576).decode(errors="replace")
        except (OSError, http.client.HTTPException):
            continue
        finally:
            connection.close()
    return ""


def _processes() -> Iterator[int]:
    """Processes called kube-proxy that share our network namespace: kind's nodes have others."""
    ours = Path("/proc/thread-self/ns/net").stat().st_ino
    for pid in _pids():
        folder = Path(f"/proc/{pid}")
        with suppress(OSError):  # it has ended
            if (folder / "comm").read_text().strip() != "kube-proxy":
                continue
            if (folder / "ns/net").stat().st_ino == ours:
                yield pid


def _listeners(port: int) -> set[int]:
    """Processes that listen on a TCP port; empty when they cannot be seen from here."""
    inodes = set()
    for name in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path("/proc/thread-self/net", name).read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == _LISTEN and int(words[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{words[9]}]")
    return {pid for pid in _pids() if inodes & _open_files(pid)}


def _open_files(pid: int) -> set[str]:
    found = set()
    with suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                found.add(str(link.readlink()))
    return found


def _pids() -> Iterator[int]:
    return (int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdigit())


def _command(pid: int) -> str:
    """The start of a process's command line."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return ""
    return " ".join(words).strip()[:80]


def nft_tables() -> tuple[str, ...]:
    """kube-proxy's tables of nftables mode (X2) that are there; not those our agent wrote."""
    return tuple(table for table in _nft_tables_of_anybody() if not _is_our_table(table))


def has_our_rules(families: Sequence[Family] = tuple(Family)) -> bool:
    """Whether our agent serves, or served, by rules under kube-proxy's names."""
    return any(map(is_ours, iptables.variants(families))) or any(
        map(_is_our_table, _nft_tables_of_anybody())
    )


def _nft_tables_of_anybody() -> tuple[str, ...]:
    if not shutil.which("nft"):
        return ()
    listed = run(["nft", "list", "tables"]).splitlines()
    return tuple(table for table in NFT_TABLES if f"table {table}" in listed)


def _is_our_table(table: str) -> bool:
    family = dict(zip(NFT_TABLES, Family, strict=True))[table]
    return family in nf_owner.own_tables()


def remove_nft_tables() -> None:
    """Remove its tables, not ours, in one transaction (Z7); raises CommandError."""
    lines = [f"{verb} table {table}\n" for table in nft_tables() for verb in ("add", "delete")]
    run(["nft", "-f", "-"], input="".join(lines))


def nft_services(table: str) -> set[tuple[str, int, str]]:
    """(address, port, protocol) a table serves or refuses (X6); node ports have no address."""
    found: set[tuple[str, int, str]] = set()
    for name in ("service-ips", "no-endpoint-services"):
        matches = _SERVICE_ADDRESS.finditer(_map(table, name))
        found |= {(match[1], int(match[3]), match[2].upper()) for match in matches}
    for name in ("service-nodeports", "no-endpoint-nodeports"):
        matches = _SERVICE_NODE_PORT.finditer(_map(table, name))
        found |= {("", int(match[2]), match[1].upper()) for match in matches}
    return found


def _map(table: str, name: str) -> str:
    """A map as nft prints it; empty when there is none, as before kube-proxy's first sync."""
    try:
        return run(["nft", "list", "map", *table.split(), name], timeout_s=iptables.TIMEOUT_S)
    except CommandError:
        return ""


def link_addresses() -> tuple[str, ...] | None:
    """Addresses on kube-ipvs0 (V4); None when there is no such device."""
    from pyroute2 import IPRoute  # noqa: PLC0415  # only who asks pays for it

    with IPRoute() as ip:
        found = ip.link_lookup(ifname=LINK)
        if not found:
            return None
        entries = ip.get_addr(index=found[0])
        return tuple(str(entry.get_attr("IFA_ADDRESS")) for entry in entries)


def remove_link() -> None:
    """Remove kube-ipvs0 with its addresses; fine when it is gone. Raises DataplaneError."""
    from pyroute2 import IPRoute  # noqa: PLC0415
    from pyroute2.netlink.exceptions import NetlinkError  # noqa: PLC0415

    with IPRoute() as ip:
        for index in ip.link_lookup(ifname=LINK):
            try:
                ip.link("del", index=index)
            except NetlinkError as error:
                raise DataplaneError(f"link {LINK}: {error}") from error


def ipsets() -> tuple[str, ...]:
    """kube-proxy's sets that are there; empty where the kernel has none at all."""
    from pyroute2.ipset import IPSet, IPSetError  # noqa: PLC0415

    found = []
    with suppress(OSError, IPSetError), IPSet() as sets:
        for name in IPSETS:
            with suppress(IPSetError):
                list(sets.headers(name))
                found.append(name)
    return tuple(found)


def remove_ipsets(names: Iterable[str]) -> None:
    """Remove sets; fine when they are gone.

    Raises:
        DataplaneError: some are used by somebody's rules; the others were removed.
    """
    from pyroute2.ipset import IPSet, IPSetError  # noqa: PLC0415

    stuck = []
    with IPSet() as sets:
        for name in names:
            try:
                sets.destroy(name)
            except IPSetError as error:
                if error.code != errno.ENOENT:
                    # Above the usual numbers are ipset's own: the set is in use.
                    why = os.strerror(error.code) if error.code < 4096 else "in use"
                    stuck.append(f"{name} ({why})")
    if stuck:
        raise DataplaneError(f"ipsets {', '.join(stuck)}")


def is_ours(variant: iptables.Variant) -> bool:
    """Whether our agent wrote kube-proxy's chains here; raises CommandError."""
    return _has_chain(variant, MARKER)


def is_our_ipvs(families: Sequence[Family] = tuple(Family)) -> bool:
    """Whether our agent serves in ipvs mode: then kube-ipvs0, virtual servers and sets are its own.

    Raises:
        CommandError: a tool of the host failed.
    """
    return any(
        _has_chain(variant, MARKER) and _has_chain(variant, IPVS_CHAIN)
        for variant in iptables.variants(families)
    )


def _has_chain(variant: iptables.Variant, chain: str) -> bool:
    try:
        variant.rules("nat", chain)
    except CommandError as error:
        if error.code == 1:
            return False
        raise
    return True


def leftovers(families: Sequence[Family] = tuple(Family)) -> tuple[str, ...]:
    """What betrays rules of a kube-proxy, in words; cheap, however many services it had.

    iptables rules are known by the canary chain (I24), which stands in the smallest table.
    """
    found = []
    with suppress(DataplaneError):
        found += [f"nft table {table}" for table in nft_tables()]
    with suppress(OSError, DataplaneError):
        socket.if_nametoindex(LINK)
        if not is_our_ipvs(families):
            found.append(f"device {LINK}")
    for variant in iptables.variants(families):
        with suppress(DataplaneError):
            mangle = variant.save("mangle").get("mangle")
            if mangle and CANARY in mangle.chains and not is_ours(variant):
                found.append(f"chain {CANARY} and others ({variant})")
    return tuple(found)
