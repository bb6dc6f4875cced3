"""Socket hooks: programs on a cgroup, beside whatever else is attached there.

Recognised by name, so nothing needs remembering from run to run.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ebpf_svc.config import EbpfSettings
from ebpf_svc.dataplane.ebpf.programs import NAME_PREFIX, SOCKET_PROGRAMS, LoadedProgram
from ebpf_svc.errors import DataplaneError, UnsupportedHost
from ebpf_svc.host import bpf_prog, cgroup

_ATTACH_TYPES = sorted(
    {kind for spec in SOCKET_PROGRAMS.values() for kind in spec.attach_types.values()}
)
_OURS = tuple(f"{NAME_PREFIX}{family}_" for family in (4, 6))


def cgroup_of(settings: EbpfSettings) -> Path:
    """The cgroup whose processes the hooks act on; UnsupportedHost when there is no cgroup2."""
    path = settings.cgroup_root or cgroup.find_root()
    if path is None:
        raise UnsupportedHost([f"cgroup2: not mounted ({cgroup.MEND})"])
    return path


def put(path: Path, programs: Iterable[LoadedProgram]) -> list[str]:
    """Make the cgroup carry exactly these programs of ours, each swapped in one step.

    Args:
        path: the cgroup.
        programs: socket programs; empty takes ours away.

    Returns:
        a sentence for each program that had to be attached anew.

    Raises:
        DataplaneError: the cgroup is not there or takes no programs.
    """
    wanted: dict[int, list[LoadedProgram]] = {kind: [] for kind in _ATTACH_TYPES}
    for program in programs:
        wanted[program.attach_type].append(program)
    added: list[str] = []
    with _opened(path) as fd:
        for kind, here in wanted.items():
            added += [f"{path}: {name} attached" for name in _put_kind(fd, kind, here)]
    return added


def _put_kind(cgroup_fd: int, kind: int, wanted: list[LoadedProgram]) -> list[str]:
    present = _ours(cgroup_fd, kind)
    added = []
    for program in wanted:
        if present.pop(program.id, None) is not None:
            continue
        old = next((i for i, name in present.items() if name == program.kernel_name), None)
        if old is None or not _replace(cgroup_fd, kind, program, old):
            bpf_prog.cgroup_attach(cgroup_fd, program.fd, kind)
            added.append(program.kernel_name)
        if old is not None:
            present.pop(old)
    for stale in present:
        _detach(cgroup_fd, kind, stale)
    return added


def _replace(cgroup_fd: int, kind: int, program: LoadedProgram, old_id: int) -> bool:
    """Swap the program in one step; False when the old one has gone meanwhile."""
    try:
        old_fd = bpf_prog.by_id(old_id)
    except FileNotFoundError:
        return False
    try:
        bpf_prog.cgroup_attach(cgroup_fd, program.fd, kind, replace_fd=old_fd)
    except FileNotFoundError:
        return False
    finally:
        os.close(old_fd)
    return True


def _detach(cgroup_fd: int, kind: int, program_id: int) -> None:
    try:
        program_fd = bpf_prog.by_id(program_id)
    except FileNotFoundError:
        return
    try:
        bpf_prog.cgroup_detach(cgroup_fd, program_fd, kind)
    except FileNotFoundError:
        pass  # somebody else was faster
    finally:
        os.close(program_fd)


def _ours(cgroup_fd: int, kind: int) -> dict[int, str]:
    """Programs of ours attached here: id -> kernel name."""
    found = {}
    for program_id in bpf_prog.cgroup_query(cgroup_fd, kind):
        try:
            fd = bpf_prog.by_id(program_id)
        except FileNotFoundError:
            continue
        try:
            name = bpf_prog.facts(fd).name
        finally:
            os.close(fd)
        if name.startswith(_OURS):
            found[program_id] = name
    return found


def remove(path: Path) -> int:
    """Take every program of ours off the cgroup; how many there were, 0 when it is gone."""
    if not path.is_dir():
        return 0
    count = 0
    with _opened(path) as fd:
        for kind in _ATTACH_TYPES:
            ours = _ours_or_none(fd, kind)
            for program_id in ours:
                _detach(fd, kind, program_id)
            count += len(ours)
    return count


def _ours_or_none(cgroup_fd: int, kind: int) -> dict[int, str]:
    try:
        return _ours(cgroup_fd, kind)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EBADF):  # no such hook here, or no cgroup2
            return {}
        raise


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise DataplaneError(f"cgroup {path}: {error.strerror}") from error
    try:
        yield fd
    except OSError as error:
        raise DataplaneError(f"cgroup {path}: {error}") from error
    finally:
        os.close(fd)
