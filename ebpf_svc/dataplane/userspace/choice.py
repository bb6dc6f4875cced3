"""Which backend a new flow of a service port gets (U4, P13). Pure.

In turn, over a list shuffled anew whenever it changes: a relay sees every connection, so it can do
better than chance (P12), and the shuffling keeps nodes that restarted together from marching in
step.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection

from ebpf_svc.dataplane.userspace.affinity import Affinity
from ebpf_svc.model.desired import Backend, PlanKey, ServicePlan

NODE = "node"


class _Turn:
    """One list of backends and whose turn it is."""

    def __init__(self) -> None:
        self._members: frozenset[Backend] = frozenset()
        self._order: list[Backend] = []
        self._next = 0

    def take(self, members: frozenset[Backend], rng: random.Random) -> None:
        if members == self._members:
            return
        self._members, self._next = members, 0
        self._order = sorted(members, key=lambda each: (each.address, each.port))
        rng.shuffle(self._order)

    def pick(self, avoid: Collection[Backend]) -> Backend | None:
        """The next one; one to avoid only where there is no other."""
        order = self._order
        for step in range(len(order)):
            at = (self._next + step) % len(order)
            if order[at] not in avoid:
                self._next = at + 1
                return order[at]
        if not order:
            return None
        self._next += 1
        return order[self._next % len(order)]

    def find(self, name: str) -> Backend | None:
        return next((each for each in self._order if backend_name(each) == name), None)


class Choice:
    """The backends of one service port."""

    def __init__(
        self,
        key: PlanKey,
        affinity: Affinity,
        rng: random.Random,
        is_own: Callable[[str], bool] = lambda _: False,
    ) -> None:
        """Bind to a service port.

        Args:
            key: the service port.
            affinity: what all service ports remember.
            rng: shuffles.
            is_own: whether an address is the node's: its processes are one client (P14), whatever
                source the route to a frontend gives them.
        """
        self._name, self._affinity, self._rng, self._is_own = str(key), affinity, rng, is_own
        self._turns = {False: _Turn(), True: _Turn()}
        self._affinity_s = 0

    def take(self, plan: ServicePlan) -> None:
        """Choose among the backends of this plan from now on."""
        self._affinity_s = plan.affinity_s
        backends = plan.backends
        cluster = frozenset(each for each in backends if each.in_cluster)
        self._turns[False].take(cluster, self._rng)
        self._turns[True].take(frozenset(each for each in backends if each.in_local), self._rng)

    def pick(self, client: str, *, local: bool, avoid: Collection[Backend] = ()) -> Backend | None:
        """Choose for a new flow; None when the list is empty.

        Args:
            client: its address; affinity knows no ports.
            local: from the Local list, else from the Cluster list.
            avoid: backends that have just failed this flow.
        """
        turn = self._turns[local]
        if not self._affinity_s:
            return turn.pick(avoid)
        client = self._client(client)
        name = self._affinity.get(self._name, client, self._affinity_s)
        kept = turn.find(name) if name is not None else None
        backend = kept if kept is not None and kept not in avoid else turn.pick(avoid)
        if backend is not None:
            self._affinity.put(self._name, client, backend_name(backend), self._affinity_s)
        return backend

    def remembers(self, backend: str, unused_s: float) -> bool:
        """Whether affinity to a backend, not used for that long, still counts."""
        return unused_s <= self._affinity_s and any(
            turn.find(backend) is not None for turn in self._turns.values()
        )

    def failed(self, client: str) -> None:
        """A client's backend did not answer: affinity to it is void (U5)."""
        if self._affinity_s:
            self._affinity.forget(self._name, self._client(client))

    def _client(self, address: str) -> str:
        return NODE if self._is_own(address) else address


def backend_name(backend: Backend) -> str:
    """What the file calls a backend."""
    return f"{backend.address} {backend.port}"
