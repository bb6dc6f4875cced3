"""Settings of the connection to the Kubernetes API."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from ebpf_svc.config.values import Seconds, Section


class KubernetesSettings(Section):
    """How the API server is reached and what is asked of it."""

    kubeconfig: Path | None = None
    """File with the API server's address and our credentials; none = those every pod is given,
    unless `master` is set.
    """
    context: str = ""
    """Context of the kubeconfig; empty = its current one."""
    master: str = ""
    """URL of the API server, instead of the kubeconfig's; alone, it is asked without
    credentials.
    """
    qps: float = 5.0
    """Requests a second on average: lists, Events, watches begun. Kube-proxy's 5 is plenty;
    negative = no limit.
    """
    burst: int = Field(default=10, ge=0)
    """Requests that may come at once before `qps` binds."""
    service_proxy_name: str = ""
    """Serve the Services whose label service.kubernetes.io/service-proxy-name says this; empty =
    those without the label (W1), as kube-proxy does.
    """
    page_size: int = Field(default=500, ge=1)
    """Objects in one answer to a list: an object of 10 endpoints is some 4 KB of JSON."""
    streaming_lists: bool = True
    """Ask for the first state as a stream of events, which spares the API server and this process
    memory; where it is refused, lists are paged.
    """
    silence_s: Seconds = Field(default=90.0, gt=0)
    """A watch that says nothing for so long is asked for anew: bookmarks come every minute."""
    retry_max_s: Seconds = Field(default=0.8, gt=0)
    """Longest pause before an API server that is away is tried again; the first is 0.1 s and each
    doubles. While it is away one request at a time tries, a bare TCP connection first.
    """
    node_wait_s: Seconds = Field(default=30.0, ge=0)
    """How long the first plan waits for the addresses of this node (N3)."""
