"""A machine with IPVS, ipsets and kube-ipvs0 in memory, as strict as the kernel, that counts what
it is told.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest

from ebpf_svc.config import Settings
from ebpf_svc.dataplane.ipvs import check, dataplane, kernel, tuning
from ebpf_svc.dataplane.ipvs.dataplane import IpvsDataplane
from ebpf_svc.host.dummy import Held as HeldAddress
from ebpf_svc.host.ipset import ERR_FIND_TYPE, Entry, Held, Spec
from ebpf_svc.host.ipvs import Dest, RealServer, ServerKey, Shape
from ebpf_svc.host.netlink import Failure
from ebpf_svc.model.net import Family

INDEX = 7
"""Of kube-ipvs0."""
ELSEWHERE = "192.0.2.1"
"""The machine's own address, on another device."""
Answers = list[Failure | None]


def refusal(code: int) -> Failure:
    return Failure(code, os.strerror(code))


class Machine:
    """The kernel's side; change it to be somebody else."""

    def __init__(self) -> None:
        self.shapes: dict[ServerKey, Shape] = {}
        self.dests: dict[ServerKey, dict[Dest, int]] = {}
        self.connections: dict[tuple[ServerKey, Dest], int] = {}
        self.sets: dict[str, Held] = {}
        self.addresses: dict[str, int] = {ELSEWHERE: 2}
        self.has_device = self.has_rules = False
        self.loading = 0
        """How many times a set's module is still being loaded for others."""
        self.asked: frozenset[str] | None = None
        """Sets that rules ask; None = rules are those of another mode."""
        self.served_before_rules: list[ServerKey] = []
        """Virtual servers that were there when our rules came first."""
        self.refuses: set[ServerKey] = set()
        """Virtual servers the kernel does not take."""
        self.forgotten: list[tuple[ServerKey, bool]] = []
        """Virtual servers whose UDP flows were let go, and whether they were still there."""
        self.removed: list[ServerKey] = []
        """Virtual servers in the order in which they went."""
        self.ended: set[str] = set()
        """Addresses the node's own connections from which were ended."""
        self.told: Counter[str] = Counter()
        """Messages by kind."""

    @property
    def empty(self) -> bool:
        held = (self.shapes, self.sets, self.has_device, self.has_rules)
        return not any(held) and self.addresses.keys() == {ELSEWHERE}


class MemoryIpvs:
    """Stands for `host.ipvs.Ipvs`."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def close(self) -> None: ...

    def add_servers(self, wanted: Iterable[tuple[ServerKey, Shape]]) -> Answers:
        return [self._add_server(key, shape) for key, shape in wanted]

    def _add_server(self, key: ServerKey, shape: Shape) -> Failure | None:
        self.machine.told["servers"] += 1
        if key in self.machine.refuses:
            return refusal(errno.ENOMEM)
        if key in self.machine.shapes:
            return refusal(errno.EEXIST)
        self.machine.shapes[key], self.machine.dests[key] = shape, {}
        return None

    def set_servers(self, wanted: Iterable[tuple[ServerKey, Shape]]) -> Answers:
        answers: Answers = []
        for key, shape in wanted:
            self.machine.told["servers"] += 1
            known = key in self.machine.shapes
            answers.append(None if known else refusal(errno.ESRCH))
            if known:
                self.machine.shapes[key] = shape
        return answers

    def remove_servers(self, keys: Iterable[ServerKey]) -> Answers:
        answers: Answers = []
        for key in keys:
            self.machine.told["servers"] += 1
            self.machine.shapes.pop(key, None)
            self.machine.dests.pop(key, None)
            self.machine.removed.append(key)
            answers.append(None)
        return answers

    def add_dests(self, wanted: Iterable[tuple[ServerKey, Dest, int]]) -> Answers:
        return [self._put_dest(*each, new=True) for each in wanted]

    def set_dests(self, wanted: Iterable[tuple[ServerKey, Dest, int]]) -> Answers:
        return [self._put_dest(*each, new=False) for each in wanted]

    def _put_dest(self, key: ServerKey, dest: Dest, weight: int, *, new: bool) -> Failure | None:
        self.machine.told["dests"] += 1
        held = self.machine.dests.get(key)
        if held is None:
            return refusal(errno.ESRCH)
        if (dest in held) == new:
            return refusal(errno.EEXIST if new else errno.ENOENT)
        held[dest] = weight
        return None

    def remove_dests(self, unwanted: Iterable[tuple[ServerKey, Dest]]) -> Answers:
        answers: Answers = []
        for key, dest in unwanted:
            self.machine.told["dests"] += 1
            self.machine.dests.get(key, {}).pop(dest, None)
            answers.append(None)
        return answers

    def shapes(self) -> dict[ServerKey, Shape]:
        self.machine.told["reads"] += 1
        return dict(self.machine.shapes)

    def real_servers(self, keys: Iterable[ServerKey]) -> dict[ServerKey, list[RealServer]]:
        return {
            key: [
                RealServer(dest, weight, self.machine.connections.get((key, dest), 0), 0)
                for dest, weight in dests.items()
            ]
            for key, dests in self.machine.dests.items()
        }

    def connection_counts(self, keys: Sequence[ServerKey]) -> Mapping[ServerKey, dict[Dest, int]]:
        self.machine.told["counts"] += len(keys)
        return {
            key: {
                dest: self.machine.connections.get((key, dest), 0)
                for dest in self.machine.dests.get(key, {})
            }
            for key in keys
        }


class MemorySets:
    """Stands for `host.ipset.Sets`."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def close(self) -> None: ...

    def create(self, specs: Iterable[Spec]) -> Answers:
        if self.machine.loading:
            self.machine.loading -= 1
            return [refusal(ERR_FIND_TYPE)]
        for spec in specs:
            self.machine.sets.setdefault(spec.name, Held(spec, set()))
        return [None]

    def destroy(self, names: Iterable[str]) -> Answers:
        return [None for name in names if self.machine.sets.pop(name, None) or True]

    def add(self, entries: Iterable[tuple[Spec, Entry]]) -> Answers:
        answers: Answers = []
        for spec, entry in entries:
            self.machine.told["entries"] += 1
            # Else it would be open for a moment.
            assert self.machine.asked is None or spec.name in self.machine.asked
            self.machine.sets[spec.name].entries.add(entry)
            answers.append(None)
        return answers

    def remove(self, entries: Iterable[tuple[Spec, Entry]]) -> Answers:
        answers: Answers = []
        for spec, entry in entries:
            self.machine.told["entries"] += 1
            self.machine.sets[spec.name].entries.discard(entry)
            answers.append(None)
        return answers

    def read(self, name: str) -> Held | None:
        held = self.machine.sets.get(name)
        return None if held is None else Held(held.spec, set(held.entries))


class MemoryAddresses:
    """Stands for the module `host.dummy`."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def index_of(self, name: str) -> int:
        return INDEX if self.machine.has_device else 0

    def create(self, link: object, name: str) -> int:
        self.machine.has_device = True
        return INDEX

    def remove(self, link: object, name: str) -> None:
        self.machine.has_device = False
        kept = {each: index for each, index in self.machine.addresses.items() if index != INDEX}
        self.machine.addresses = kept

    def add_addresses(self, link: object, index: int, addresses: Iterable[str]) -> Answers:
        answers: Answers = []
        for each in addresses:
            self.machine.told["addresses"] += 1
            self.machine.addresses.setdefault(each, index)
            answers.append(None)
        return answers

    def remove_addresses(self, link: object, index: int, addresses: Iterable[str]) -> Answers:
        answers: Answers = []
        for each in addresses:
            self.machine.told["addresses"] += 1
            del self.machine.addresses[each]
            answers.append(None)
        return answers

    def addresses(self, link: object) -> list[HeldAddress]:
        return [HeldAddress(each, index, 0) for each, index in self.machine.addresses.items()]


class MemoryFirewall:
    """Stands for `firewall.Firewall`: rules ask some sets, or are not there at all."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.failure_counts = dict.fromkeys(Family, 0)

    def apply(self, occupied: frozenset[str]) -> tuple[int, tuple[str, ...]]:
        found = () if self.machine.has_rules else ("rules were missing",)
        return self.follow(occupied) + len(found), found

    def follow(self, occupied: frozenset[str]) -> int:
        held = {name for name, each in self.machine.sets.items() if each.entries}
        assert held <= occupied  # else what is in the others would be treated like a stranger
        self.machine.has_rules = True
        if occupied == self.machine.asked:
            return 0
        if self.machine.asked is None:
            self.machine.served_before_rules = list(self.machine.shapes)
        self.machine.asked = occupied
        return 1


class _Variant:
    family = Family.V4


class _AllFamilies(_Variant):
    family = Family.V6


class _Link:
    def close(self) -> None: ...


class _NoFlows:
    def reconcile(self, desired: object) -> tuple[()]:
        return ()


def live_in(machine: Machine, patch: pytest.MonkeyPatch) -> None:
    """Let the ipvs dataplane find this machine instead of ours."""
    addresses = MemoryAddresses(machine)

    def ours() -> Iterator[tuple[Any, Mapping[str, Any]]]:
        if machine.has_rules:
            yield _Variant(), {}
            yield _AllFamilies(), {}

    def remove(variant: object, *, marker: bool) -> None:
        if marker:
            machine.has_rules = False

    def forget(servers: Iterable[ServerKey]) -> int:
        machine.forgotten += ((key, key in machine.shapes) for key in servers)
        return 0

    patch.setattr(kernel, "Ipvs", lambda: MemoryIpvs(machine))
    patch.setattr(kernel, "Sets", lambda: MemorySets(machine))
    patch.setattr(kernel, "dummy", addresses)
    patch.setattr(kernel.rtnetlink, "Socket", _Link)
    patch.setattr(dataplane, "dummy", addresses)
    patch.setattr(dataplane.ipvs, "try_scheduler", lambda scheduler: "")
    patch.setattr(dataplane, "run", lambda argv: "")
    patch.setattr(tuning.sysctl, "write", lambda name, value: False)
    patch.setattr(dataplane, "Firewall", lambda settings, families: MemoryFirewall(machine))
    patch.setattr(dataplane.flows, "forget", forget)
    patch.setattr(dataplane.flows, "end_sockets", machine.ended.update)
    patch.setattr(dataplane.firewall, "ours", ours)
    patch.setattr(dataplane.firewall, "remove", remove)
    patch.setattr(dataplane.firewall, "parts", lambda variant, tables: iter(()))
    patch.setattr(dataplane, "StaleFlows", lambda families: _NoFlows())
    patch.setattr(check, "served_families", lambda settings: settings.families)


def make(settings: Settings | None = None) -> IpvsDataplane:
    """An open dataplane."""
    made = IpvsDataplane(settings or Settings(cluster_cidrs=("10.244.0.0/16", "fd00:10:244::/48")))
    made.open()
    return made
