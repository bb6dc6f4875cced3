"""Where Services come from: a folder of manifests, or an API server."""

from __future__ import annotations

from typing import Protocol

from ebpf_svc.config import Settings
from ebpf_svc.errors import ConfigError
from ebpf_svc.events import EventSink
from ebpf_svc.watch.store import Store


class Source(Protocol):
    """Keeps a store up to date."""

    def start(self) -> None:
        """Begin to follow."""

    def stop(self) -> None:
        """Stop following; the store keeps what it has."""


def make_source(settings: Settings, store: Store) -> tuple[Source, EventSink | None]:
    """The source the settings name, and where Events go besides the log.

    Manifests come before an API server: who names a folder wants that one.

    Raises:
        ConfigError: neither is named, and this is no pod with credentials of its own.
    """
    if settings.manifests is not None:
        from ebpf_svc.watch.files import FileSource  # noqa: PLC0415  # one of the two is needed

        return FileSource(settings, store), None
    from ebpf_svc.watch.kubernetes import KubernetesSource  # noqa: PLC0415  # half a second

    try:
        source = KubernetesSource(settings.kubernetes, store)
    except ConfigError as error:
        if settings.kubernetes.kubeconfig is None:
            error.add_note("--manifests DIR serves a folder, --kubeconfig FILE a cluster")
        raise
    return source, source.events
