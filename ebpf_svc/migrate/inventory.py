"""Everything of kube-proxy's on this node, looked at once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ebpf_svc.host import ipvs, kubeproxy
from ebpf_svc.host.iptables import Variant, variants
from ebpf_svc.host.ipvs import VirtualServer
from ebpf_svc.migrate.rules import Removal, Served, drops_by_default, plan_removal, services_in
from ebpf_svc.model.net import Family

_HASH = re.compile(r"-[A-Z2-7]{16}$")


@dataclass(frozen=True, slots=True)
class Part:
    """A line of the report: some things of one kind at one place."""

    kind: str
    """`chains`, `nft table`, `device`, `virtual servers` or `ipsets`."""
    where: str
    names: str
    count: int
    kept: str = ""
    """Why it stays; empty for what goes."""


@dataclass(frozen=True, slots=True)
class IptablesFound:
    """What one set of tools shows."""

    variant: Variant
    removals: tuple[Removal, ...]
    served: frozenset[Served]
    forward_drops: bool
    """FORWARD's policy is DROP, and the rule that let service traffic pass is among what goes."""


@dataclass(frozen=True, slots=True)
class Inventory:
    """What there is; each field is empty for a node kube-proxy never touched."""

    iptables: tuple[IptablesFound, ...] = ()
    nft: Mapping[str, frozenset[Served]] | None = None
    """Table -> what it serves."""
    link: tuple[str, ...] | None = None
    """Addresses of kube-ipvs0; None = no such device."""
    virtual_servers: tuple[VirtualServer, ...] = ()
    """kube-proxy's."""
    foreign_servers: tuple[VirtualServer, ...] = ()
    ipsets: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Nothing is left that could go."""
        return all(part.kept for part in self.parts())

    @property
    def served(self) -> frozenset[Served]:
        """What kube-proxy's rules serve, whichever mode wrote them."""
        found = set[Served]()
        found.update(*(each.served for each in self.iptables), *(self.nft or {}).values())
        return frozenset(
            found | {(s.address, s.port, s.protocol.value) for s in self.virtual_servers}
        )

    @property
    def active_count(self) -> int:
        """Connections that IPVS carries."""
        return sum(server.active_count for server in self.virtual_servers)

    def parts(self) -> Iterator[Part]:
        """All of it for people, what stays for good included."""
        for each in self.iptables:
            for removal in each.removals:
                where = f"{each.variant} {removal.table}"
                if removal.chains:
                    yield Part("chains", where, _names(removal.chains), len(removal.chains))
                for kept in removal.kept:
                    yield Part("chains", where, kept.chain, 1, kept.why)
        for table in self.nft or ():
            yield Part("nft table", "nftables", table, 1)
        if self.virtual_servers:
            yield Part("virtual servers", "IPVS", "", len(self.virtual_servers))
        if self.foreign_servers:
            why = "neither on kube-ipvs0 nor a Service of ours"
            yield Part("virtual servers", "IPVS", "", len(self.foreign_servers), why)
        if self.link is not None:
            yield Part("device", "links", kubeproxy.LINK, 1)
        if self.ipsets:
            yield Part("ipsets", "ipset", ", ".join(self.ipsets), len(self.ipsets))


def look(families: Sequence[Family], ours: frozenset[Served] = frozenset()) -> Inventory:
    """Look at this network namespace; changes nothing.

    Args:
        families: which iptables to read.
        ours: what our agent serves; tells kube-proxy's virtual servers from others'.

    Raises:
        CommandError: a tool of the host failed.
    """
    is_ours = kubeproxy.is_our_ipvs(families)
    link = None if is_ours else kubeproxy.link_addresses()
    servers = () if is_ours else ipvs.virtual_servers()
    mine = tuple(
        server
        for server in servers
        if server.address in (link or ())
        or (server.address, server.port, server.protocol.value) in ours
        or ("", server.port, server.protocol.value) in ours
    )
    return Inventory(
        iptables=tuple(found for found in map(_look_at, variants(families)) if found.removals),
        nft={table: frozenset(kubeproxy.nft_services(table)) for table in kubeproxy.nft_tables()},
        link=link,
        virtual_servers=mine,
        foreign_servers=tuple(server for server in servers if server not in mine) if link else (),
        ipsets=() if is_ours else kubeproxy.ipsets(),
    )


def _look_at(variant: Variant) -> IptablesFound:
    if kubeproxy.is_ours(variant):
        return IptablesFound(variant, (), frozenset(), forward_drops=False)
    tables = variant.save()
    removals = {name: plan_removal(table) for name, table in tables.items()}
    return IptablesFound(
        variant,
        tuple(removal for removal in removals.values() if removal.chains or removal.kept),
        services_in(tables),
        any(drops_by_default(tables[name], removal) for name, removal in removals.items()),
    )


def _names(chains: Sequence[str]) -> str:
    """Names with those made of a hash counted: `KUBE-SERVICES, KUBE-SEP-… (12)`."""
    counts = Counter(_HASH.sub("-…", chain) for chain in chains)
    return ", ".join(name if count == 1 else f"{name} ({count})" for name, count in counts.items())
