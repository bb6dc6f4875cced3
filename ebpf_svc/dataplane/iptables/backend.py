"""Where rules of ours stand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ebpf_svc.dataplane.iptables.chains import NAT, NODE_PORTS
from ebpf_svc.dataplane.netfilter import tools
from ebpf_svc.host import iptables
from ebpf_svc.host.iptables import Variant
from ebpf_svc.host.kubeproxy import MARKER
from ebpf_svc.model.net import Family


def written_by_us(families: Sequence[Family]) -> Iterator[Variant]:
    """Where our agent wrote in this mode: the ipvs mode has the same sign, and no such chain."""
    for variant in iptables.variants(families):
        if tools.has_chain(variant, NAT, (MARKER,)) and tools.has_chain(
            variant, NAT, (NODE_PORTS,)
        ):
            yield variant
