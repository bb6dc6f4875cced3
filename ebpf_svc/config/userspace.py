"""Settings of the userspace dataplane."""

from __future__ import annotations

from pydantic import Field, field_validator

from ebpf_svc.config.values import Seconds, Section, wrong


class UserspaceSettings(Section):
    """The userspace dataplane on this node."""

    port_range: tuple[int, int] = (0, 0)
    """Ports the relay listens on, both ends included (U1); 0, 0 = any the kernel gives."""
    udp_idle_s: Seconds = Field(default=30.0, gt=0)
    """How long the way of a client's datagrams is kept without any (U6). kube-proxy had 0.25 s,
    which moved slow clients from endpoint to endpoint.
    """

    @field_validator("port_range")
    @classmethod
    def _range(cls, ports: tuple[int, int]) -> tuple[int, int]:
        if ports != (0, 0) and not 1 <= ports[0] <= ports[1] <= 65535:
            raise wrong("two ports, the lower first, or [0, 0] for any")
        return ports
