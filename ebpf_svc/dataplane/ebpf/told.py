"""What the programs are told of this node: some when they are compiled, the rest in a map."""

from __future__ import annotations

import hashlib

from ebpf_svc.config import EbpfSettings, Settings, SocketLB
from ebpf_svc.dataplane.ebpf import constants, hooks, options
from ebpf_svc.dataplane.ebpf.tables import Tables
from ebpf_svc.host import netns
from ebpf_svc.log import get_logger
from ebpf_svc.model.net import Family

log = get_logger(__name__)


def defines(settings: Settings, mark: int) -> dict[Family, dict[str, str]]:
    """What is compiled in, by family.

    Args:
        settings: all of them.
        mark: of packets that are to be masqueraded.
    """
    ebpf = settings.ebpf
    fast_path = options.uses_fast_path(ebpf)
    if ebpf.fast_path and not fast_path:
        log.warning("fast-path.ignored", reason=options.why_no_fast_path(ebpf))
    return {
        family: constants.node_defines(
            family,
            cluster_cidrs=settings.cluster_cidrs,
            translate_pods=options.hooks_see_pods(ebpf),
            kernel=options.kernel(),
            masquerade_mark=mark,
            fast_path=fast_path,
            xdp=settings.ebpf.xdp,
            host_packets=options.translates_host_packets(ebpf),
        )
        for family in settings.families
    }


def write(opened: Tables, settings: EbpfSettings) -> bool:
    """Write what only a run knows: the node's network namespace, the seed of hashes.

    Returns:
        whether the map said something else before.
    """
    uses_hooks = settings.socket_lb is not SocketLB.OFF
    host_netns = netns.cookie(hooks.cgroup_of(settings)) if uses_hooks else 0
    seed = hashlib.blake2b(settings.maglev_seed.encode(), digest_size=4).digest()
    table = opened.settings
    key = table.key.pack(value=0)
    value = table.value.pack(host_netns=host_netns, hash_seed=int.from_bytes(seed, "little"))
    if table.lookup(key) == value:
        return False
    table.update([(key, value)])
    return True
