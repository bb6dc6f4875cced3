"""Cluster IPs and node ports of standalone mode: who has which, across edits and restarts.

What a Service holds it keeps until its manifest goes. Of those that hold nothing yet, explicit
requests come first, then the others, each in the order of their names: the order of files and
events decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from ebpf_svc.errors import ConfigError
from ebpf_svc.model.net import Family, family_of
from ebpf_svc.model.service import ServiceName
from ebpf_svc.watch.declared import DeclaredPort, DeclaredService, FamilyPolicy
from ebpf_svc.watch.faults import Faults
from ebpf_svc.watch.ranges import AddressRange, PortRange

_TAKEN = "provided port is already allocated"
_SET = "may not change once set"


class Holding(NamedTuple):
    """What one Service holds."""

    cluster_ips: tuple[str, ...] = ()
    """Primary first."""
    node_ports: tuple[tuple[str, int], ...] = ()
    """Port key (`name/PROTOCOL`) and number, in the order of `spec.ports`."""
    health_check_node_port: int = 0


NOTHING = Holding()


class Allocation(NamedTuple):
    """The outcome for all Services: what each holds, or what is wrong with it."""

    holdings: Mapping[ServiceName, Holding]
    refused: Mapping[ServiceName, Faults]


class _Claim:
    """One Service on its way to its holding: what it keeps, then what it adds."""

    def __init__(self, service: DeclaredService, families: tuple[Family, ...]) -> None:
        self.service, self.families = service, families
        self.faults = Faults()
        self.addresses: dict[Family, str] = {}
        self.ports: dict[str, int] = {}
        self.health_check_port = 0

    @property
    def holding(self) -> Holding:
        keys = map(port_key, self.service.ports)
        return Holding(
            tuple(self.addresses[family] for family in self.families if family in self.addresses),
            tuple((key, self.ports[key]) for key in keys if key in self.ports),
            self.health_check_port,
        )


class Allocator:
    """Gives out addresses and ports; owns the only record of them."""

    def __init__(self, cidrs: Collection[str], node_ports: tuple[int, int]) -> None:
        """Prepare the ranges.

        Args:
            cidrs: one prefix a family; the first one's family is the default.
            node_ports: first and last.

        Raises:
            ConfigError: a prefix or the port range makes no sense.
        """
        ranges = [AddressRange(cidr) for cidr in cidrs]
        self._ranges = {each.family: each for each in ranges}
        if not ranges or len(self._ranges) < len(ranges):
            raise ConfigError("service_cidrs", got=[*cidrs], expected="one prefix a family")
        self._ports = PortRange(node_ports)
        self.holdings: Mapping[ServiceName, Holding] = {}
        """What is held, by Services whose manifest is broken too; may be set before first use."""
        self._settled: dict[ServiceName, DeclaredService] = {}
        self._question: tuple[object, ...] = ()
        self._answer: Allocation | None = None
        self._taken_ips: set[str] = set()
        self._taken_ports: dict[int, ServiceName] = {}

    def assign(
        self,
        services: Mapping[ServiceName, DeclaredService],
        reserved: Collection[ServiceName] = (),
        *,
        release: bool = True,
    ) -> Allocation:
        """Bring the record in line with what is declared.

        Args:
            services: the valid Services; a mapping that is not changed afterwards.
            reserved: Services whose manifest is there but broken: they keep what they hold.
            release: take back what others hold; False while not all manifests can be read.
        """
        # Most edits are of endpoints; and dictionaries of the same objects compare fast.
        question = (services, frozenset(reserved), release)
        if self._answer is not None and question == self._question:
            return self._answer
        self._question = question
        held = dict(self.holdings)
        if release:
            for name in held.keys() - services.keys() - set(reserved):
                del held[name]
        claims = {}
        for name, service in sorted(services.items()):
            # Most Services did not change since the last time.
            if self._settled.get(name) is not service or name not in held:
                claims[name] = claim = self._keep(service, held.get(name, NOTHING))
                if not claim.faults:
                    held[name] = claim.holding
        # Only now is it known what is kept: what one edit gives up is free in the same edit.
        self._taken_ips = {address for each in held.values() for address in each.cluster_ips}
        self._taken_ports = {
            port: name
            for name, each in held.items()
            for port in (*(port for _, port in each.node_ports), each.health_check_node_port)
            if port
        }
        passes: tuple[Callable[[_Claim], None], ...] = (self._claim_explicit, self._claim_rest)
        for run in passes:
            for name, claim in claims.items():
                if not claim.faults:
                    run(claim)
                if not claim.faults:
                    held[name] = claim.holding
        refused = {name: claim.faults for name, claim in claims.items() if claim.faults}
        self.holdings = held
        self._settled = {name: each for name, each in services.items() if name not in refused}
        self._answer = Allocation({name: held[name] for name in self._settled}, refused)
        return self._answer

    def _keep(self, service: DeclaredService, old: Holding) -> _Claim:
        """Start a claim with what the Service may keep of what it holds."""
        families = self._families(service, old)
        claim = _Claim(service, families)
        self._check_families(claim, old)
        for address in old.cluster_ips:
            family = family_of(address)
            within = self._ranges.get(family)
            if within and family in families and address in within:
                claim.addresses[family] = address
        for i, asked in enumerate(service.cluster_ips):
            if claim.addresses.get(family_of(asked), asked) != asked:
                claim.faults.invalid(f"spec.clusterIPs[{i}]", list(service.cluster_ips), _SET)
        old_ports = dict(old.node_ports)
        for port in service.ports:
            key = port_key(port)
            number = old_ports.get(key, 0)
            keeps = port.node_port == number if port.node_port else service.node_ports
            if keeps and number in self._ports:
                claim.ports[key] = number
        if service.health_check and old.health_check_node_port in self._ports:
            claim.health_check_port = old.health_check_node_port
            if service.health_check_node_port not in (0, claim.health_check_port):
                claim.faults.forbidden("spec.healthCheckNodePort", "field is immutable")
        return claim

    def _families(self, service: DeclaredService, old: Holding) -> tuple[Family, ...]:
        """Complete what was asked for; a Service that says nothing keeps its primary family."""
        if not service.has_cluster_ips:
            return ()
        families = list(service.families)
        if not families:
            before = [family_of(address) for address in old.cluster_ips]
            families = [f for f in (*before, *self._ranges) if f in self._ranges][:1]
        if service.family_policy is not FamilyPolicy.SINGLE_STACK:
            families += [family for family in self._ranges if family not in families]
        return tuple(families)

    def _check_families(self, claim: _Claim, old: Holding) -> None:
        service, faults = claim.service, claim.faults
        if service.headless and old.cluster_ips:
            faults.invalid("spec.clusterIPs[0]", ["None"], _SET)
        if not service.has_cluster_ips:
            return
        policy = service.family_policy
        if policy is FamilyPolicy.REQUIRE_DUAL_STACK and len(self._ranges) < 2:
            said = "this cluster is not configured for dual-stack services"
            faults.invalid("spec.ipFamilyPolicy", policy, said)
        for i, family in enumerate(service.families):
            if family not in self._ranges:
                said = "not configured on this cluster"
                faults.invalid(f"spec.ipFamilies[{i}]", family.label, said)
        if service.families and old.cluster_ips:
            primary = family_of(old.cluster_ips[0])
            if primary in self._ranges and service.families[0] is not primary:
                labels = [family.label for family in service.families]
                faults.invalid("spec.ipFamilies[0]", labels, _SET)

    def _claim_explicit(self, claim: _Claim) -> None:
        """Claim what the manifest asks for by number, all of it or nothing."""
        service, faults = claim.service, claim.faults
        for address in service.cluster_ips:
            family = family_of(address)
            if claim.addresses.get(family) != address:
                said = self._refusal(address, self._ranges[family])
                if said:
                    asked = list(service.cluster_ips)
                    said = f"failed to allocate IP {address}: {said}"
                    faults.invalid("spec.clusterIPs", asked, said)
                claim.addresses[family] = address
        for i, port in enumerate(service.ports):
            key = port_key(port)
            if port.node_port and key not in claim.ports:
                self._check_port(claim, f"spec.ports[{i}].nodePort", port.node_port)
                if port.node_port == claim.health_check_port:
                    faults.invalid(f"spec.ports[{i}].nodePort", port.node_port, _TAKEN)
                claim.ports[key] = port.node_port
        wanted = service.health_check_node_port
        if wanted and not claim.health_check_port:
            self._check_port(claim, "spec.healthCheckNodePort", wanted)
            if wanted in claim.ports.values():
                faults.invalid("spec.healthCheckNodePort", wanted, _TAKEN)
            claim.health_check_port = wanted
        self._take(claim)

    def _refusal(self, address: str, within: AddressRange) -> str:
        if address not in within:
            return (
                f"the provided IP ({address}) is not in the valid range."
                f" The range of valid IPs is {within}"
            )
        return "provided IP is already allocated" if address in self._taken_ips else ""

    def _check_port(self, claim: _Claim, field: str, port: int) -> None:
        if port not in self._ports:
            said = "provided port is not in the valid range. The range of valid ports is"
            claim.faults.invalid(field, port, f"{said} {self._ports}")
        elif self._taken_ports.get(port, claim.service.name) != claim.service.name:
            claim.faults.invalid(field, port, _TAKEN)

    def _claim_rest(self, claim: _Claim) -> None:
        """Choose what was left to the control plane."""
        service, faults = claim.service, claim.faults
        for family in claim.families:
            if family not in claim.addresses:
                address = self._ranges[family].choose(str(service.name), self._taken_ips)
                claim.addresses[family] = address
                if not address:
                    said = "failed to allocate a serviceIP: range is full"
                    faults.add("spec.clusterIPs", f"Internal error: {said}")
        # TCP and UDP of one number share their node port, as a DNS server's do.
        by_number = {
            p.port: claim.ports[k] for p in service.ports if (k := port_key(p)) in claim.ports
        }
        for i, port in enumerate(service.ports):
            if service.node_ports and port_key(port) not in claim.ports:
                if port.port not in by_number:
                    choice = self._choose_port(claim, f"{service.name}:{port.port}")
                    by_number[port.port] = choice
                    if not choice:
                        self._no_port(faults, f"spec.ports[{i}].nodePort")
                claim.ports[port_key(port)] = by_number[port.port]
        if service.health_check and not claim.health_check_port:
            claim.health_check_port = self._choose_port(claim, f"{service.name}#health")
            if not claim.health_check_port:
                self._no_port(faults, "spec.healthCheckNodePort")
        self._take(claim)

    def _choose_port(self, claim: _Claim, name: str) -> int:
        port = self._ports.choose(name, self._taken_ports)
        # Taken at once, so that the Service's next port gets another.
        if port:
            self._taken_ports[port] = claim.service.name
        return port

    def _no_port(self, faults: Faults, field: str) -> None:
        faults.add(field, "Internal error: failed to allocate a nodePort: range is full")

    def _take(self, claim: _Claim) -> None:
        if claim.faults:
            return
        self._taken_ips.update(claim.addresses.values())
        ports = (*claim.ports.values(), claim.health_check_port)
        self._taken_ports.update(dict.fromkeys((p for p in ports if p), claim.service.name))


def port_key(port: DeclaredPort) -> str:
    """What a node port belongs to."""
    return f"{port.name}/{port.protocol}"
