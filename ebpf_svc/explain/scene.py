"""Everything an explanation looks at, once: settings, kernel, plan's sources, this node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ebpf_svc.config import Settings
from ebpf_svc.dataplane.base import Dataplane
from ebpf_svc.explain import known, surroundings
from ebpf_svc.explain.known import Known
from ebpf_svc.explain.surroundings import Surroundings
from ebpf_svc.model.desired import FrontendKey, FrontendView
from ebpf_svc.modes import make_dataplane
from ebpf_svc.status import STATUS, NamedFrontend, read_json, read_names

NOT_ASKED = Known(None, why_not="manifests and API server were not asked")


@dataclass(frozen=True, slots=True)
class Scene:
    """Everything that was looked at."""

    settings: Settings
    mode: str
    node: str
    dataplane: Dataplane
    names: Mapping[FrontendKey, NamedFrontend]
    views: Mapping[FrontendKey, FrontendView]
    known: Known
    around: Surroundings


def look(settings: Settings, *, pods: Iterable[str] = (), kernel_only: bool = False) -> Scene:
    """Look around, in the network namespace of this thread.

    Args:
        settings: those of the agent that serves or served here.
        pods: names an API server is to be asked for.
        kernel_only: ask neither manifests nor API server.

    Raises:
        DataplaneError, OSError: the kernel does not answer.
    """
    status = read_json(settings.run_dir / STATUS) or {}
    mode = status.get("mode", "ebpf")
    node = status.get("node") or settings.node_name
    dataplane = make_dataplane(mode, settings)
    return Scene(
        settings=settings,
        mode=mode,
        node=node,
        dataplane=dataplane,
        names=read_names(settings.run_dir),
        views=dataplane.read(),
        known=NOT_ASKED if kernel_only else known.look(settings, node, pod_names=pods),
        around=surroundings.look(settings),
    )
