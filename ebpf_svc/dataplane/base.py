"""The seam every backend fits: six verbs and a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol as TypingProtocol

from ebpf_svc.errors import ApplyError
from ebpf_svc.model.desired import DesiredState, FrontendKey, FrontendView
from ebpf_svc.model.net import Family


@dataclass(frozen=True, slots=True)
class Check:
    """One requirement of a backend, looked at on this host."""

    name: str
    """Short, e.g. `bpffs`."""
    ok: bool
    detail: str
    """What was found."""
    mend: str = ""
    """The command or change that mends it; empty when fine."""
    required: bool = True
    """False: the backend runs without it, with `detail` saying what is lost."""


@dataclass(frozen=True, slots=True)
class Support:
    """Whether this host can run a backend."""

    backend: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks if check.required)

    @property
    def missing(self) -> tuple[str, ...]:
        """A sentence per missing requirement."""
        return tuple(
            f"{check.name}: {check.detail}" + (f" ({check.mend})" if check.mend else "")
            for check in self.checks
            if check.required and not check.ok
        )


@dataclass(frozen=True, slots=True)
class Reconciled:
    """One look for stale flows in the kernel's connection tracking (C1-C10)."""

    family: Family
    deleted: int
    took_s: float


@dataclass(frozen=True, slots=True)
class ApplyReport:
    """What one apply did."""

    writes: int = 0
    """Entries put or deleted in the kernel; 0 when the kernel already held the state."""
    changed: int = 0
    """Service ports touched."""
    failed: tuple[ApplyError, ...] = ()
    """Service ports that could not be written; the others were."""
    repaired: tuple[str, ...] = ()
    """What a resync found missing or foreign and put right, in words."""
    details: Mapping[str, int] = field(default_factory=dict)
    """Entries written by kind, for logs and counted tests."""
    reconciled: tuple[Reconciled, ...] = ()
    """Looks for stale flows that this apply made necessary; at most one a family."""


class Dataplane(TypingProtocol):
    """A backend.

    The law each passes for generated states: after `apply(d)`, `read() == view(d)`, and a second
    `apply(d)` reports zero writes; after `cleanup()` the host holds nothing of ours.
    """

    name: str
    """The mode that chooses it."""

    def check(self) -> Support:
        """Look at this host without changing it."""

    def open(self) -> None:
        """Take over what an earlier run left, or start empty; raises UnsupportedHost,
        DataplaneError.
        """

    def apply(self, desired: DesiredState, *, resync: bool = False) -> ApplyReport:
        """Make the kernel hold `desired`.

        Args:
            desired: the whole state; plans identical (`is`) to the last applied ones are skipped.
            resync: read the kernel back first and repair what others changed.
        """

    def view(self, desired: DesiredState) -> dict[FrontendKey, FrontendView]:
        """What `read()` must return once `desired` is applied: `desired.view()`, less what this
        kernel has no place for. Pure.
        """

    def read(self) -> dict[FrontendKey, FrontendView]:
        """What the kernel holds now, in the words of the model; needs no `open()`."""

    def retire(self) -> bool:
        """Let another dataplane serve: new connections are its, open ones go on through us.

        Called when the other one is live, then again every second or so until it returns True;
        `cleanup()` follows. Needs no `open()` before, takes over what an earlier run left, and is
        to return True at once where nothing depends on us any more.
        """

    def close(self) -> None:
        """Stop working; traffic goes on with what the kernel holds (Z2)."""

    def cleanup(self) -> None:
        """Remove everything that carries our mark, also after a crash; may be called without
        `open()`.
        """
