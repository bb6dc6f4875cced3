"""Try what this machine can do, leaving nothing behind.

Each probe does the thing itself in the small (load a program of three instructions, make a map of
one entry, add a filter in a network namespace of its own) rather than read a version.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import shutil
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ebpf_svc.errors import CommandError, VerifierError
from ebpf_svc.host import bpf, bpf_prog, cgroup, links, mounts, nft, rtnetlink, toolchain
from ebpf_svc.host.bpf import MapFlag, MapType
from ebpf_svc.host.bpf_prog import AttachType, ProgramType
from ebpf_svc.host.command import run

Result = TypeVar("Result")

OLDEST_KERNEL = (5, 10)
"""The oldest the programs are tried on (`make vm`). The getpeername hooks came with 5.8."""
_MEND_KERNEL = "boot a kernel of 5.10 or later, with CONFIG_BPF_SYSCALL, CONFIG_CGROUP_BPF"
_MEND_TC = (
    "modprobe sch_ingress cls_bpf, or a kernel with CONFIG_NET_SCH_INGRESS, CONFIG_NET_CLS_BPF"
)
_MEND_ROOT = "run as root, or with CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN and CAP_SYS_ADMIN"
_MEND_NFT = "apt-get install nftables"

_CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}
_CLONE_NEWNET = 0x40000000
_MARK = 0x4000

_EXIT = struct.pack("=BBhi", 0x95, 0, 0, 0)


def _set(register: int, value: int) -> bytes:
    return struct.pack("=BBhi", 0xB7, register, 0, value)


def _call(helper: int) -> bytes:
    return struct.pack("=BBhi", 0x85, 0, 0, helper)


_ALLOW = _set(0, 1) + _EXIT
_NEXT = _set(0, -1) + _EXIT
_NETNS_COOKIE, _COARSE_CLOCK, _SET_RETVAL = 122, 160, 187


@dataclass(frozen=True, slots=True)
class Probe:
    """One ability of this machine."""

    name: str
    ok: bool
    detail: str
    mend: str = ""
    required: bool = True


def probe_all(
    bpffs: Path, cgroup_root: Path | None = None, *, is_compiled: bool = False
) -> tuple[Probe, ...]:
    """Try everything the eBPF dataplane needs.

    Args:
        bpffs: where pins shall be.
        cgroup_root: whose processes the socket hooks shall act on; None = find the hierarchy.
        is_compiled: the programs are in the cache, so that compiling is not required.
    """
    compiling = [replace(probe, required=not is_compiled) for probe in (bcc(), kernel_headers())]
    probes = [capabilities(), kernel(), *compiling]
    if probes[0].ok:
        bpf.lift_memory_limit()
        probes += [bpf_file_system(bpffs), maps(), batch(), socket_storage()]
        probes += [tc_filter(), *socket_hooks(), helpers(), coarse_clock(), set_retval()]
        probes += [cgroup2(cgroup_root), masquerade()]
    probes.append(jit())
    return tuple(probes)


def capabilities() -> Probe:
    """Whether this process may load programs and change devices."""
    status = Path("/proc/self/status").read_text()
    effective = int(status.split("CapEff:")[1].split()[0], 16)
    lacking = [name for name, bit in _CAPABILITIES.items() if not effective >> bit & 1]
    detail = f"lacks {', '.join(lacking)}" if lacking else "all that is needed"
    return _probe("capabilities", not lacking, detail, _MEND_ROOT)


def kernel() -> Probe:
    """Whether the kernel is new enough for what no probe can try."""
    release = platform.release()
    numbers = tuple(int(part) for part in release.split("-")[0].split(".")[:2])
    return _probe("kernel", numbers >= OLDEST_KERNEL, f"Linux {release}", _MEND_KERNEL)


def bcc() -> Probe:
    """Whether BCC can be loaded by the interpreter a compile would use."""
    version = toolchain.bcc_version()
    if version is None:
        return _probe("bcc", False, "not installed", toolchain.MEND_BCC)
    python = toolchain.compiler_python()
    try:
        run([python, "-c", "import bcc"])
    except CommandError as error:
        last = error.stderr.strip().splitlines()[-1:] or [str(error)]
        return _probe("bcc", False, f"{python}: {last[0]}", toolchain.MEND_BCC)
    return _probe("bcc", True, f"{version} of {python}")


def kernel_headers() -> Probe:
    """Whether BCC has headers to compile against."""
    found = toolchain.find_headers()
    if found is None:
        return _probe("headers", False, "none found", toolchain.MEND_HEADERS)
    return _probe("headers", True, found.origin)


def bpf_file_system(path: Path) -> Probe:
    """Whether maps can be pinned at `path`, or it can be mounted by whoever opens the tables."""
    mend = f"mount -t bpf bpf {path}"
    if mounts.is_on_bpffs(path):
        return _probe("bpffs", True, f"{path} is a BPF file system")
    known = "bpf" in Path("/proc/filesystems").read_text().split()
    if known and (path.is_dir() or not path.is_relative_to("/sys")):
        return _probe("bpffs", True, f"{path} is not mounted yet: `run` mounts it")
    return _probe("bpffs", False, f"{path} is no BPF file system", mend)


def cgroup2(path: Path | None) -> Probe:
    """Whether there is a cgroup2 hierarchy, and `path` in it."""
    root = cgroup.find_root()
    if root is None:
        return _probe("cgroup2", False, "not mounted", cgroup.MEND)
    chosen = path or root
    is_there = chosen.is_dir() and (chosen == root or root in chosen.resolve().parents)
    detail = str(chosen) if is_there else f"{chosen} is no cgroup of {root}"
    return _probe("cgroup2", is_there, detail, f"mkdir -p {chosen}")


def maps() -> Probe:
    """Whether every kind of map can be made."""
    kinds = (
        ("hash", MapType.HASH, 0),
        ("LRU hash", MapType.LRU_HASH, 0),
        ("mappable array", MapType.ARRAY, MapFlag.MMAPABLE),
        ("per-CPU array", MapType.PERCPU_ARRAY, 0),
        ("LPM trie", MapType.LPM_TRIE, MapFlag.NO_PREALLOC),
    )
    lacking = []
    for name, kind, flags in kinds:
        size = 8 if kind is MapType.LPM_TRIE else 4
        try:
            os.close(bpf.map_create(kind, key_size=size, value_size=8, max_entries=1, flags=flags))
        except OSError as error:
            lacking.append(f"{name} ({error.strerror})")
    detail = f"cannot make: {', '.join(lacking)}" if lacking else "all kinds can be made"
    return _probe("maps", not lacking, detail, _MEND_KERNEL)


def batch() -> Probe:
    """Whether many map entries can be written in one call."""
    fd = bpf.map_create(MapType.HASH, key_size=4, value_size=4, max_entries=2)
    try:
        bpf.update_batch(fd, bytes(range(8)), bytes(8), 2)
    except OSError as error:
        detail = f"{error.strerror}: entries are written one by one, which takes longer"
        return _probe("map batches", False, detail, "boot a kernel of 5.6 or later", required=False)
    finally:
        os.close(fd)
    return _probe("map batches", True, "entries are written many at a time")


def socket_storage() -> Probe:
    """Whether a map can hang on sockets."""
    try:
        fd = bpf.map_create(
            MapType.SK_STORAGE,
            key_size=4,
            value_size=16,
            max_entries=0,
            flags=MapFlag.NO_PREALLOC,
        )
    except OSError as error:
        return _probe("socket storage", False, str(error.strerror), _MEND_KERNEL)
    os.close(fd)
    return _probe("socket storage", True, "available")


def tc_filter() -> Probe:
    """Whether a program can be put on a device, tried on the loopback of a namespace of its own."""
    try:
        with _program(_NEXT, ProgramType.SCHED_CLS) as fd:
            refusal = in_new_netns(lambda: _try_filter(fd))
    except (VerifierError, OSError) as error:
        return _probe("tc filters", False, str(error).splitlines()[0], _MEND_TC)
    if refusal is not None:
        return _probe("tc filters", False, refusal, _MEND_TC)
    return _probe("tc filters", True, "clsact and direct-action programs work")


def _try_filter(fd: int) -> str | None:
    netlink = rtnetlink.Socket()
    try:
        index = next(link.index for link in links.links(netlink) if link.name == "lo")
        wanted = [
            links.Filter(index, side, prio=1, protocol=0x0800, handle=1, name="p", program_fd=fd)
            for side in links.Side
        ]
        answers = links.add_clsacts(netlink, [index]) + links.replace_filters(netlink, wanted)
    finally:
        netlink.close()
    return next((answer.reason for answer in answers if answer is not None), None)


def socket_hooks() -> Iterator[Probe]:
    """Whether the kernel knows each hook, a probe a family."""
    hooks = {
        "IPv4": (
            *(AttachType.INET4_CONNECT, AttachType.UDP4_SENDMSG),
            *(AttachType.UDP4_RECVMSG, AttachType.INET4_GETPEERNAME),
        ),
        "IPv6": (
            *(AttachType.INET6_CONNECT, AttachType.UDP6_SENDMSG),
            *(AttachType.UDP6_RECVMSG, AttachType.INET6_GETPEERNAME),
        ),
    }
    for family, attach_types in hooks.items():
        lacking = [kind.name for kind in attach_types if not _loads(_ALLOW, attach_type=kind)]
        detail = f"no {', '.join(lacking)}" if lacking else "connect, sendmsg, recvmsg, getpeername"
        yield _probe(f"socket hooks {family}", not lacking, detail, _MEND_KERNEL)


def helpers() -> Probe:
    """Whether socket programs can tell network namespaces apart."""
    works = _loads(_call(_NETNS_COOKIE) + _ALLOW)
    return _probe("helpers", works, "netns cookie" if works else "no netns cookie", _MEND_KERNEL)


def coarse_clock() -> Probe:
    """Whether programs can read the clock that costs next to nothing."""
    works = _loads(_call(_COARSE_CLOCK) + _ALLOW)
    detail = (
        "coarse" if works else "no coarse clock: reading the exact one costs each packet a little"
    )
    return _probe("clock", works, detail, "boot a kernel of 5.11 or later", required=False)


def set_retval() -> Probe:
    """Whether a socket program can choose the error a refused connect gives."""
    works = _loads(_set(1, -errno.ECONNREFUSED) + _call(_SET_RETVAL) + _ALLOW)
    detail = (
        "a service without endpoints answers ECONNREFUSED"
        if works
        else "a service without endpoints answers EPERM instead of ECONNREFUSED"
    )
    return _probe("refusal", works, detail, "boot a kernel of 5.18 or later", required=False)


def masquerade() -> Probe:
    """Whether netfilter can masquerade by mark, tried in a namespace of its own."""
    tool = shutil.which("nft") or shutil.which("iptables")
    if tool is None:
        return _probe("masquerade", False, "neither nft nor iptables is installed", _MEND_NFT)
    try:
        in_new_netns(nft.masquerade_rules(_MARK).apply)
    except (CommandError, OSError) as error:
        words = error.stderr if isinstance(error, CommandError) else str(error)
        first = words.strip().splitlines()[:1] or [str(error)]
        return _probe("masquerade", False, first[0], "modprobe -a nft_chain_nat nft_masq")
    return _probe("masquerade", True, f"{tool} works")


def jit() -> Probe:
    """Whether programs run as machine code."""
    try:
        is_on = Path("/proc/sys/net/core/bpf_jit_enable").read_text().strip() != "0"
    except OSError:
        is_on = False
    detail = "on" if is_on else "off: programs are interpreted, several times slower"
    return _probe("JIT", is_on, detail, "sysctl -w net.core.bpf_jit_enable=1", required=False)


def in_new_netns(work: Callable[[], Result]) -> Result:
    """Run `work` in a thread with an empty network namespace, which ends with it.

    Programs `work` starts run there too.

    Raises:
        whatever `work` raises; OSError when no namespace can be made.
    """
    outcome: list[Result] = []
    failure: list[BaseException] = []

    def enter() -> None:
        try:
            if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), "unshare")
            outcome.append(work())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


@contextmanager
def _program(
    instructions: bytes, kind: ProgramType, attach_type: AttachType = AttachType.NONE
) -> Iterator[int]:
    fd = bpf_prog.load(instructions, program_type=kind, attach_type=attach_type, name="esvc_probe")
    try:
        yield fd
    finally:
        os.close(fd)


def _loads(instructions: bytes, *, attach_type: AttachType = AttachType.INET4_CONNECT) -> bool:
    try:
        with _program(instructions, ProgramType.CGROUP_SOCK_ADDR, attach_type):
            return True
    except VerifierError:
        return False


def _probe(name: str, ok: bool, detail: str, mend: str = "", *, required: bool = True) -> Probe:
    return Probe(name, ok, detail, "" if ok else mend, required)
