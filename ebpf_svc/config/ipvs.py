"""Settings of the ipvs dataplane."""

from __future__ import annotations

from pydantic import Field

from ebpf_svc.config.values import Prefix, Seconds, Section


class IpvsSettings(Section):
    """The ipvs dataplane on this node."""

    scheduler: str = "rr"
    """How virtual servers choose: any scheduler the kernel has (rr, wrr, lc, wlc, sh, dh, sed, nq,
    mh …); V5.
    """
    exclude_cidrs: tuple[Prefix, ...] = ()
    """Virtual servers with an address inside are somebody else's and stay (V12)."""
    strict_arp: bool = False
    """Answer ARP only on the interface that has the address: needed by MetalLB and others that
    announce VIPs (V2).
    """
    tcp_timeout_s: Seconds = Field(default=0.0, ge=0)
    """How long an idle TCP connection is kept; 0 = leave the kernel's (V3)."""
    tcp_fin_timeout_s: Seconds = Field(default=0.0, ge=0)
    """How long a TCP connection is kept after a FIN; 0 = leave the kernel's."""
    udp_timeout_s: Seconds = Field(default=0.0, ge=0)
    """How long an idle UDP flow is kept; 0 = leave the kernel's."""
