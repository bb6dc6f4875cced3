"""What a write of the steering did."""

from __future__ import annotations

from dataclasses import dataclass

from ebpf_svc.dataplane.base import Reconciled


@dataclass(frozen=True, slots=True)
class Written:
    """What a write did."""

    writes: int = 0
    reconciled: tuple[Reconciled, ...] = ()
