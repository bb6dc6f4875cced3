"""Dataplanes in memory that share one kernel, and can be told to fail where a real one may."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ebpf_svc.config import Settings
from ebpf_svc.dataplane.base import ApplyReport
from ebpf_svc.dataplane.fake import FakeDataplane
from ebpf_svc.errors import ApplyError, DataplaneError, UnsupportedHost
from ebpf_svc.model.desired import DesiredState, FrontendKey, FrontendView


@dataclass
class Machine:
    """A machine's kernel: what each mode has put there, and what happens to those who try."""

    held: dict[str, dict[FrontendKey, FrontendView]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    """`mode verb`, in order; a verb stands once for several in a row."""
    lacks: dict[str, str] = field(default_factory=dict)
    """Mode -> what it misses, so that it does not open."""
    refuses: dict[str, Exception | ApplyError] = field(default_factory=dict)
    """Mode -> what an apply ends with; an ApplyError is a service port that cannot be written."""
    busy: set[str] = field(default_factory=set)
    """Modes whose connections have not ended."""
    clinging: set[str] = field(default_factory=set)
    """Modes that fail to retire."""
    stuck: set[str] = field(default_factory=set)
    """Modes whose cleanup fails."""

    def make(self, mode: str, settings: Settings) -> MachineDataplane:
        return MachineDataplane(self, mode)

    def note(self, mode: str, verb: str) -> None:
        if not self.log or self.log[-1] != f"{mode} {verb}":
            self.log.append(f"{mode} {verb}")

    def modes(self) -> set[str]:
        """Modes that have something in the kernel."""
        return {mode for mode, held in self.held.items() if held}


class MachineDataplane(FakeDataplane):
    """The dataplane of one mode of a machine."""

    def __init__(self, machine: Machine, mode: str) -> None:
        super().__init__(machine.held.setdefault(mode, {}))
        self.name, self._machine = mode, machine

    def open(self) -> None:
        self._machine.note(self.name, "open")
        if self.name in self._machine.lacks:
            raise UnsupportedHost([self._machine.lacks[self.name]])
        super().open()

    def apply(self, desired: DesiredState, *, resync: bool = False) -> ApplyReport:
        self._machine.note(self.name, "apply")
        wrong = self._machine.refuses.get(self.name)
        if wrong is not None and not isinstance(wrong, ApplyError):
            raise wrong
        report = super().apply(desired, resync=resync)
        return ApplyReport(writes=report.writes, failed=(wrong,)) if wrong else report

    def retire(self) -> bool:
        self._machine.note(self.name, "retire")
        if self.name in self._machine.clinging:
            raise DataplaneError("cannot be opened")
        return self.name not in self._machine.busy

    def close(self) -> None:
        self._machine.note(self.name, "close")
        super().close()

    def cleanup(self) -> None:
        self._machine.note(self.name, "cleanup")
        if self.name in self._machine.stuck:
            raise DataplaneError("busy")
        super().cleanup()

    def parts(self) -> Iterable[FrontendKey]:
        return list(self.kernel)
