"""What the running agent tells others, in files of its run directory.

`status.json`: is it ready, what was applied last, what is wrong. Written after every sync.
`state.json`: the names behind the addresses, which the kernel does not know. Written when names or
frontends changed, which is rare, and assembled from text kept per service port, so that a change
costs what it touches.

`settings.json`: what it was told, written once at its start.

Each is replaced atomically: a reader sees the old or the new one, never half.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ebpf_svc import __version__
from ebpf_svc.errors import ApplyError
from ebpf_svc.model.desired import (
    DesiredState,
    FrontendKey,
    FrontendKind,
    PlanKey,
    ServicePlan,
)
from ebpf_svc.model.identity import differences
from ebpf_svc.model.net import Protocol
from ebpf_svc.model.snapshot import Problem

STATUS = "status.json"
STATE = "state.json"
SETTINGS = "settings.json"
"""The settings of the agent that served last, for the command that goes back to kube-proxy."""
CONTROL = "control.sock"
"""Where the running agent listens to other commands."""
FILES = (STATUS, STATE, SETTINGS, CONTROL)
"""All that an agent leaves in its run directory."""


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that readers see all of the old or all of the new text."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text)
    scratch.replace(path)


def read_json(path: Path) -> Any | None:
    """The content of a status file; None when there is none."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None


@dataclass(frozen=True, slots=True)
class _Entry:
    plan: ServicePlan
    text: str


class StatusWriter:
    """Keeps both files of one agent; used by its sync loop only."""

    def __init__(
        self, run_dir: Path, *, node: str, serving: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Write nothing yet.

        Args:
            run_dir: where the files go.
            node: this node's name.
            serving: asked with every write what serves: `mode`, and `refused` where others were
                preferred.
        """
        self._run_dir, self._serving = run_dir, serving
        self._who = {"pid": os.getpid(), "version": __version__, "node": node}
        self._plans: Mapping[PlanKey, ServicePlan] = {}
        self._entries: dict[PlanKey, _Entry] = {}
        self._frontend_count = self._backend_count = self._refusing_count = 0
        self._state_written = False

    def starting(self) -> None:
        """Say that an agent is there and not ready yet, over what an earlier one left."""
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._write_status(ready=False, revision=0, problems=[], failed=[])

    def synced(
        self,
        desired: DesiredState,
        *,
        problems: Iterable[Problem],
        failed: Iterable[ApplyError],
        took_ms: float,
    ) -> None:
        """Record what the kernel was told; `problems` are those of the objects, in any order."""
        if self._update(desired.plans) or not self._state_written:
            lines = ",\n".join(entry.text for entry in self._entries.values())
            text = f'{{"revision": {desired.revision}, "plans": [\n{lines}\n]}}\n'
            write_atomically(self._run_dir / STATE, text)
            self._state_written = True
        self._write_status(
            ready=True,
            revision=desired.revision,
            problems=[_problem(problem) for problem in (*problems, *desired.problems)],
            failed=[{"service": error.service, "reason": error.reason} for error in failed],
            took_ms=took_ms,
        )

    def refused(
        self, *, ready: bool, revision: int, reason: str, problems: Iterable[Problem]
    ) -> None:
        """Record a sync in which nothing could be told to the kernel."""
        self._write_status(
            ready=ready,
            revision=revision,
            problems=[_problem(problem) for problem in problems],
            failed=[{"service": "", "reason": reason}],
        )

    def _update(self, plans: Mapping[PlanKey, ServicePlan]) -> bool:
        """Follow the plans that are new objects; say whether a name or a frontend changed."""
        entries, changed = self._entries, False
        for key in differences(self._plans, plans):
            old, plan = entries.get(key), plans.get(key)
            if old is not None:
                self._count(old.plan, -1)
            if plan is None:
                del entries[key]
                changed = True
                continue
            text = old.text if old and old.plan.frontends == plan.frontends else _plan_line(plan)
            changed = changed or old is None or old.text is not text
            entries[key] = _Entry(plan, text)
            self._count(plan, 1)
        self._plans = plans
        return changed

    def _count(self, plan: ServicePlan, sign: int) -> None:
        self._frontend_count += sign * len(plan.frontends)
        self._backend_count += sign * len(plan.backends)
        self._refusing_count += sign * (not plan.has_endpoints)

    def _write_status(self, **fields: Any) -> None:
        services = {
            "ports": len(self._entries),
            "frontends": self._frontend_count,
            "backends": self._backend_count,
            "without_endpoints": self._refusing_count,
        }
        status = {
            **self._who,
            **self._serving(),
            **fields,
            "last_sync_s": time.time(),
            "services": services,
        }
        write_atomically(self._run_dir / STATUS, json.dumps(status) + "\n")


def _problem(problem: Problem) -> dict[str, str]:
    return {
        "source": problem.source,
        "object": problem.object_ref,
        "field": problem.field,
        "message": problem.message,
    }


def _plan_line(plan: ServicePlan) -> str:
    name = plan.key.port_name
    return json.dumps(
        {
            "namespace": name.namespace,
            "name": name.name,
            "port": name.port,
            "protocol": name.protocol.value,
            "family": int(plan.key.family),
            "frontends": [[f.key.address, f.key.port, int(f.kind)] for f in plan.frontends],
        }
    )


@dataclass(frozen=True, slots=True)
class NamedFrontend:
    """Which service port an address belongs to, as the agent last wrote it down."""

    namespace: str
    name: str
    port: str
    kind: FrontendKind


def read_names(run_dir: Path) -> dict[FrontendKey, NamedFrontend]:
    """The names of frontends an agent left in its run directory; empty when there are none."""
    state = read_json(run_dir / STATE) or {"plans": []}
    return {
        FrontendKey(address, port, Protocol(plan["protocol"])): NamedFrontend(
            plan["namespace"], plan["name"], plan["port"], FrontendKind(kind)
        )
        for plan in state["plans"]
        for address, port, kind in plan["frontends"]
    }
