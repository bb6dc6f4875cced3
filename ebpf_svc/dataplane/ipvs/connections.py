"""How many connections service ports have, as looks at the kernel's real servers tell."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from ebpf_svc.dataplane.inspect import FlowCounts
from ebpf_svc.dataplane.ipvs import readback
from ebpf_svc.host.ipvs import RealServer, ServerKey
from ebpf_svc.model.desired import PlanKey, ServicePlan

SLOW_LOOK_S = 1.0
"""A look at all real servers that takes longer is left to the read-backs, and who asks how many
connections there are is told what the last one saw: the kernel begins its list anew for each page,
so that ten times the services take a hundred times as long.
"""


@dataclass(slots=True)
class Connections:
    """What is remembered of the last look."""

    of_slow_look: FlowCounts | None = None
    """None = looking is quick: nobody need be told what is past."""

    def note(
        self,
        plans: Mapping[PlanKey, ServicePlan],
        reals: Mapping[ServerKey, list[RealServer]],
        began_s: float,
    ) -> FlowCounts:
        """Count by service port.

        Args:
            plans: what is served.
            reals: what was seen.
            began_s: when the look began, by `time.monotonic`.
        """
        is_slow = time.monotonic() - began_s > SLOW_LOOK_S
        counts = readback.flow_counts(plans.values(), reals)
        self.of_slow_look = counts if is_slow else None
        return counts
