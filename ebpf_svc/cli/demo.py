"""`ebpf-svc demo`: the tour, in a cluster of network namespaces."""

from __future__ import annotations

import sys

import click


@click.command(name="demo")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the screen.")
@click.option("--keep", is_flag=True, help="Leave the cluster up and say how to enter it.")
def command(as_json: bool, keep: bool) -> None:
    """Build a small cluster on this machine and watch every kind of service work in it.

    Two nodes, pods, a router and an outside client, all in network namespaces, in IPv4 and IPv6;
    an agent on each node serves the manifests of examples/. Every address is asked from a pod, a
    node and outside, endpoints come and go under load, an agent is killed. Nothing is left behind.
    Exit code 0 only if all of it held.

    \b
    Example:
      sudo ebpf-svc demo
      sudo ebpf-svc demo --keep      then look around inside

    Next: `ebpf-svc run --manifests DIR` does the same for real.
    """
    from ebpf_svc.demo import run  # noqa: PLC0415

    sys.exit(run(as_json=as_json, keep=keep))
