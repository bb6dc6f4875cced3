"""A service port in the maps of a `World`, changed the way an agent changes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ebpf_svc.dataplane.ebpf import maglev
from ebpf_svc.dataplane.ebpf.constants import MASQUERADE_SHIFT, BackendFlag, FrontendFlag
from ebpf_svc.model.net import Protocol, Sources
from tests.lib.packets import Address

if TYPE_CHECKING:
    from tests.lib.packet_world import World

PLAIN = FrontendFlag(0)


@dataclass(frozen=True, slots=True)
class Frontend:
    """One address of a service and what its flags say."""

    address: str
    port: int
    local_for: Sources
    masquerade_for: Sources
    flags: FrontendFlag
    ranges: int


class Service:
    """A service port in the maps; its methods do what an agent does when the plan changes."""

    def __init__(self, world: World, service_id: int, proto: Protocol, affinity_s: int) -> None:
        self._world, self.id, self.proto = world, service_id, proto
        self.affinity_s = affinity_s
        self.frontends: list[Frontend] = []
        self._ids: dict[Address, int] = {}
        self._lists: dict[BackendFlag, tuple[int, int]] = {}

    def set_backends(
        self,
        backends: Sequence[Address],
        *,
        local: Sequence[Address] = (),
        draining: Sequence[Address] = (),
        maglev_size: int = 0,
    ) -> None:
        """Put these endpoints in the Cluster and Local lists; any other it had is gone.

        Args:
            draining: still serving, in no list.
            maglev_size: lay the lists out as Maglev tables of that many slots.
        """
        for endpoint in [*backends, *local, *draining]:
            if endpoint not in self._ids:
                self._ids[endpoint] = self._world.add_backend(endpoint, self.proto, self.id)
        for endpoint, backend_id in self._ids.items():
            flags = BackendFlag(0)
            if endpoint in backends:
                flags |= BackendFlag.IN_CLUSTER | BackendFlag.SERVING
            if endpoint in local:
                flags |= BackendFlag.IN_LOCAL | BackendFlag.SERVING
            if endpoint in draining:
                flags |= BackendFlag.SERVING
            self._world.flag_backend(backend_id, flags)
        for flag, members in ((BackendFlag.IN_CLUSTER, backends), (BackendFlag.IN_LOCAL, local)):
            ids = [self._ids[endpoint] for endpoint in members]
            if maglev_size and ids:
                names = [f"{address}:{port}" for address, port in members]
                ids = [ids[i] for i in maglev.table(names, maglev_size, "seed")]
            self._lists[flag] = self._world.add_slots(ids)
        for frontend in self.frontends:
            self._put(frontend)

    def add_frontend(
        self,
        address: str,
        port: int,
        *,
        local_for: Sources = Sources.NONE,
        masquerade_for: Sources = Sources.NONE,
        flags: FrontendFlag = PLAIN,
        source_ranges: Sequence[str] | None = None,
    ) -> None:
        """Make it reachable at one more address."""
        ranges = 0
        if source_ranges is not None:
            flags |= FrontendFlag.SOURCE_RANGES
            ranges = self._world.add_ranges(source_ranges)
        frontend = Frontend(address, port, local_for, masquerade_for, flags, ranges)
        self.frontends.append(frontend)
        self._put(frontend)

    def drain(self) -> None:
        """The service was deleted; what is connected may go on."""
        self.set_backends([])
        for frontend in self.frontends:
            self._put(replace(frontend, flags=frontend.flags | FrontendFlag.DRAINING))

    def _put(self, frontend: Frontend) -> None:
        cluster = self._lists.get(BackendFlag.IN_CLUSTER, (0, 0))
        local = self._lists.get(BackendFlag.IN_LOCAL, (0, 0))
        self._world.put(
            "frontends",
            self._world.l4_addr((frontend.address, frontend.port), self.proto),
            {
                "service": self.id,
                "flags": int(frontend.local_for)
                | int(frontend.masquerade_for) << MASQUERADE_SHIFT
                | int(frontend.flags),
                "cluster_first": cluster[0],
                "cluster_count": cluster[1],
                "local_first": local[0],
                "local_count": local[1],
                "affinity_s": self.affinity_s,
                "ranges": frontend.ranges,
            },
        )
