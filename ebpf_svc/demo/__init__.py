"""The tour: a small cluster on this machine, and every kind of service at work in it."""

from __future__ import annotations


def run(*, as_json: bool = False, keep: bool = False) -> int:
    """Build the cluster, show what services do, remove everything.

    Args:
        as_json: print one JSON object instead of the screen.
        keep: leave the cluster up and say how to enter it.

    Returns:
        exit code: 0 only if everything held.

    Raises:
        UnsupportedHost: this machine cannot run the dataplane or the namespaces.
    """
    from ebpf_svc.demo.tour import tour  # noqa: PLC0415  # only the tour pays for what it needs

    return tour(as_json=as_json, keep=keep)
