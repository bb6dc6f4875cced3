"""Sets of source ranges (P10): which there are in the kernel, and how many frontends name each."""

from __future__ import annotations

from collections import Counter

from ebpf_svc.dataplane.ebpf.ids import GRACE_S, IdPool


class RangeSets:
    """Sets of source ranges: a set never changes, frontends are pointed at another one."""

    def __init__(self, name: str, limit: int) -> None:
        self._ids = IdPool(name, limit, grace_s=GRACE_S)
        self._by_content: dict[tuple[str, ...], int] = {}
        self.content: dict[int, tuple[str, ...]] = {}
        self.users: Counter[int] = Counter()
        """How many frontends in the kernel name a set."""
        self.idle: dict[int, float | None] = {}
        """Sets no frontend names, and since when; None = since lately."""

    def find_or_take(self, prefixes: tuple[str, ...]) -> tuple[int, bool]:
        """The id of that set, and whether it is new and must be written."""
        set_id = self._by_content.get(prefixes)
        if set_id is not None:
            return set_id, False
        set_id = self._ids.take()
        self._by_content[prefixes] = set_id
        self.content[set_id] = prefixes
        self.idle[set_id] = None
        return set_id, True

    def adopt(self, set_id: int, prefixes: tuple[str, ...]) -> None:
        """Take over a set an earlier run wrote; of two with the same content one goes unused."""
        self._ids.adopt(set_id)
        self._by_content.setdefault(prefixes, set_id)
        self.content[set_id] = prefixes
        if not self.users[set_id]:
            self.idle[set_id] = None

    def use(self, set_id: int) -> None:
        """One more frontend names the set."""
        self.users[set_id] += 1
        self.idle.pop(set_id, None)

    def leave(self, set_id: int) -> None:
        """One frontend less names the set."""
        self.users[set_id] -= 1
        if not self.users[set_id]:
            self.idle[set_id] = None

    def forget(self, set_id: int) -> None:
        """The set is no longer in the kernel."""
        prefixes = self.content.pop(set_id)
        if self._by_content.get(prefixes) == set_id:
            del self._by_content[prefixes]
        self.idle.pop(set_id, None)
        self.users.pop(set_id, None)
        self._ids.release(set_id)

    def unused(self, now_s: float) -> list[int]:
        """Sets that nobody has named for the grace period; starts the clock for the others."""
        ripe = []
        for set_id, since_s in self.idle.items():
            if since_s is None:
                self.idle[set_id] = now_s
            elif now_s - since_s >= GRACE_S:
                ripe.append(set_id)
        return ripe

    def recycle(self, now_s: float) -> None:
        """Free ids that have rested."""
        self._ids.recycle(now_s)
