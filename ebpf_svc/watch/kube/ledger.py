"""What is wrong with objects of the API server, gathered for the store and said once in the log."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

from ebpf_svc.log import get_logger
from ebpf_svc.model.snapshot import Problem
from ebpf_svc.watch.kube.decode import Key, Problems
from ebpf_svc.watch.store import Store

log = get_logger(__name__)


class Ledger:
    """The problems of all objects, by kind; thread-safe."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._kinds: dict[str, dict[Key, Problems]] = {}

    def replace(self, kind: str, problems: Mapping[Key, Problems]) -> None:
        """Set what is wrong with all objects of a kind; well ones are not named."""
        with self._lock:
            before = self._kinds.get(kind, {})
            if before != problems:
                self._kinds[kind] = dict(problems)
                known = {problem for found in before.values() for problem in found}
                every = (problem for found in problems.values() for problem in found)
                self._publish(problem for problem in every if problem not in known)

    def put(self, kind: str, key: Key, problems: Problems) -> None:
        """Set what is wrong with one object; nothing = it is well, or gone."""
        with self._lock:
            found = self._kinds.setdefault(kind, {})
            known = found.get(key, ())
            if known != problems:
                found[key] = problems
                if not problems:
                    del found[key]
                self._publish(problem for problem in problems if problem not in known)

    def _publish(self, new: Iterable[Problem]) -> None:
        every = [p for of_kind in self._kinds.values() for found in of_kind.values() for p in found]
        self._store.replace(problems=tuple(sorted(every, key=str)))
        for problem in new:
            log.warning(
                "watch.problem",
                object=problem.object_ref,
                field=problem.field,
                reason=problem.message,
            )
