"""Processes of the node without socket hooks, translated where their packets leave: in words."""

from __future__ import annotations

from ebpf_svc.explain.explain import Explanation

UNTOUCHED = {
    "no_route": "not sent: no route leads there",
    "no_program": "not translated: no program of ours sees the packet",
}
"""Why a packet meets no program -> what becomes of it."""


def hook(told: Explanation) -> str:
    """Where its packets are translated, or why they are not."""
    device, address = told.device, told.call.frontend.address
    if device is None:
        source = f" from {told.client.address}" if told.client.address else ""
        return f"none: no route leads{source} to {address}, so the kernel sends nothing."
    if device.role is None:
        return (
            f"none: the route to {address} leaves by {device.name}, which carries no program of "
            "ours: see ebpf.nodeDevices."
        )
    return f"tc, egress of {device.name}, program {told.program}: socketLB is off."


def source(told: Explanation) -> str:
    """What the endpoint sees of it."""
    seen = told.taken
    if seen is None:
        return "the node's own."
    how = "the process's own address"
    if seen[0] != told.call.client[0]:
        how = f"{seen[0]}, as nobody there would answer {told.call.client[0]}"
    if told.has_port:
        return f"{how}, and with a port that its own netfilter might give to another there."
    return (
        f"{how}, in this trial with port {seen[1]}: its own netfilter might give to another there."
    )
