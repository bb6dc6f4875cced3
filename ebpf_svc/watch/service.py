"""A Service's manifest: the API server's rules and defaults that need nothing but the manifest.

What depends on other Services (free addresses, free ports, immutable fields) is in `allocate`;
what the fields then do (rules F1-F18) is the plan's.
"""

from __future__ import annotations

from collections.abc import Sequence

from ebpf_svc.model.net import Protocol, family_of
from ebpf_svc.model.service import ServiceName, ServiceType, TrafficPolicy
from ebpf_svc.watch import raw
from ebpf_svc.watch.declared import (
    FAMILY_POLICIES,
    POLICIES,
    PROTOCOLS,
    SERVICE_TYPES,
    DeclaredPort,
    DeclaredService,
    Distribution,
    FamilyPolicy,
    ObjectRef,
)
from ebpf_svc.watch.faults import Faults, family_named

FOREIGN_PROXY_LABEL = "service.kubernetes.io/service-proxy-name"
DEFAULT_AFFINITY_S = 10800
MAX_AFFINITY_S = 86400

_DISTRIBUTIONS = {
    "PreferClose": Distribution.SAME_ZONE,
    "PreferSameZone": Distribution.SAME_ZONE,
    "PreferSameNode": Distribution.SAME_NODE,
}


def declare_service(ref: ObjectRef, service: raw.Service, faults: Faults) -> DeclaredService | None:
    """Validate and default a Service; None when `faults` says why it cannot be used."""
    meta = service.get("metadata") or {}
    spec = service.get("spec") or {}
    faults.dns_1035("metadata.name", ref.name)
    kind = spec.get("type") or "ClusterIP"
    if not faults.supported("spec.type", kind, SERVICE_TYPES):
        return None
    service_type = ServiceType(kind)
    asked = _cluster_ips(spec, service_type, faults)
    headless = asked == ("None",)
    policy = spec.get("ipFamilyPolicy") or _default_policy(spec, headless)
    ports = _ports(spec, service_type, headless, faults)
    if service_type is ServiceType.EXTERNAL_NAME:
        _external_name(spec, faults)
    selector = {} if service_type is ServiceType.EXTERNAL_NAME else spec.get("selector") or {}
    faults.labels("spec.selector", selector)
    families = _families(spec, policy, () if headless else asked, faults)
    external_ips = tuple(
        faults.endpoint_address(f"spec.externalIPs[{i}]", address)
        for i, address in enumerate(spec.get("externalIPs") or ())
    )
    source_ranges = _source_ranges(spec, service_type, faults)
    external_policy, health_check = _external_policy(spec, service_type, faults)
    internal_policy = spec.get("internalTrafficPolicy") or "Cluster"
    faults.supported("spec.internalTrafficPolicy", internal_policy, POLICIES)
    distribution = spec.get("trafficDistribution") or ""
    if distribution:
        faults.supported("spec.trafficDistribution", distribution, _DISTRIBUTIONS)
    _only_for_load_balancers(spec, service_type, faults)
    affinity_s = _affinity(spec, faults)
    load_balancer_ips = _load_balancer_ips(service, faults)
    if faults:
        return None
    return DeclaredService(
        ref=ref,
        name=ServiceName(ref.namespace, ref.name),
        type=service_type,
        ports=ports,
        headless=headless,
        foreign=FOREIGN_PROXY_LABEL in (meta.get("labels") or ()),
        selector=tuple(sorted(selector.items())),
        cluster_ips=() if headless else asked,
        families=tuple(family_named(family) for family in families),
        family_policy=FamilyPolicy(policy),
        external_ips=external_ips,
        load_balancer_ips=load_balancer_ips,
        source_ranges=source_ranges,
        affinity_s=affinity_s,
        internal_policy=TrafficPolicy(internal_policy),
        external_policy=external_policy,
        node_ports=service_type is ServiceType.NODE_PORT
        or (
            service_type is ServiceType.LOAD_BALANCER
            and spec.get("allocateLoadBalancerNodePorts") is not False
        ),
        health_check=health_check,
        health_check_node_port=spec.get("healthCheckNodePort") or 0,
        publish_not_ready=bool(spec.get("publishNotReadyAddresses")),
        distribution=_DISTRIBUTIONS.get(distribution, Distribution.NONE),
    )


def _ports(
    spec: raw.ServiceSpec, service_type: ServiceType, headless: bool, faults: Faults
) -> tuple[DeclaredPort, ...]:
    entries = spec.get("ports") or []
    if not entries and not headless and service_type is not ServiceType.EXTERNAL_NAME:
        faults.required("spec.ports")
    names: set[str] = set()
    numbers: set[tuple[str, int]] = set()
    node_ports: set[tuple[str, int]] = set()
    ports = []
    for i, entry in enumerate(entries):
        path = f"spec.ports[{i}]"
        port = _port(entry, path, faults)
        _port_name(port.name, path, names, require=len(entries) > 1, faults=faults)
        if port.node_port:
            if service_type is ServiceType.CLUSTER_IP:
                said = "may not be used when `type` is 'ClusterIP'"
                faults.forbidden(f"{path}.nodePort", said)
            if (port.protocol, port.node_port) in node_ports:
                faults.duplicate(f"{path}.nodePort", port.node_port)
            node_ports.add((port.protocol, port.node_port))
        if (port.protocol, port.port) in numbers:
            faults.duplicate(path, {"port": port.port, "protocol": port.protocol})
        numbers.add((port.protocol, port.port))
        ports.append(port)
    return tuple(ports)


def _port(entry: raw.ServicePort, path: str, faults: Faults) -> DeclaredPort:
    number = entry.get("port") or 0
    faults.port(f"{path}.port", number)
    protocol = entry.get("protocol") or "TCP"
    target = entry.get("targetPort") or number
    if isinstance(target, str):
        faults.port_name(f"{path}.targetPort", target)
    elif target != number:
        faults.port(f"{path}.targetPort", target)
    known = faults.supported(f"{path}.protocol", protocol, PROTOCOLS)
    return DeclaredPort(
        name=entry.get("name") or "",
        protocol=Protocol(protocol) if known else Protocol.TCP,
        port=number,
        target=target,
        node_port=entry.get("nodePort") or 0,
    )


def _port_name(name: str, path: str, names: set[str], *, require: bool, faults: Faults) -> None:
    if not name:
        if require:
            faults.required(f"{path}.name")
        return
    faults.label(f"{path}.name", name)
    if name in names:
        faults.duplicate(f"{path}.name", name)
    names.add(name)


def _cluster_ips(
    spec: raw.ServiceSpec, service_type: ServiceType, faults: Faults
) -> tuple[str, ...]:
    """`spec.clusterIPs` as it would be stored, canonical; `("None",)` when headless."""
    first = spec.get("clusterIP") or ""
    given = spec.get("clusterIPs") or []
    if first and not given:
        given = [first]
    elif first and given[0] != first:
        faults.invalid("spec.clusterIPs", given, "first value must match `clusterIP`")
    elif given and not first:
        faults.invalid("spec.clusterIPs", given, "must be empty when `clusterIP` is not specified")
    if not given:
        return ()
    if given[0] == "None":
        if len(given) > 1:
            faults.invalid("spec.clusterIPs", given, "'None' must be the first and only value")
        if service_type in (ServiceType.LOAD_BALANCER, ServiceType.NODE_PORT):
            said = f"may not be set to 'None' for {service_type} services"
            faults.invalid("spec.clusterIPs[0]", "None", said)
    if service_type is ServiceType.EXTERNAL_NAME:
        faults.forbidden("spec.clusterIPs", "may not be set for ExternalName services")
    if given[0] == "None":
        return ("None",)
    if len(given) > 2:
        faults.invalid("spec.clusterIPs", given, "may only hold up to 2 values")
    addresses = [faults.address(f"spec.clusterIPs[{i}]", ip) for i, ip in enumerate(given)]
    families = [family_of(address) for address in addresses if address]
    if len(families) <= 2 and len(families) > len(set(families)):
        said = "may specify no more than one IP for each IP family"
        faults.invalid("spec.clusterIPs", given, said)
    return tuple(address for address in addresses if address)


def _default_policy(spec: raw.ServiceSpec, headless: bool) -> str:
    if headless and not spec.get("selector"):
        return FamilyPolicy.REQUIRE_DUAL_STACK
    return FamilyPolicy.SINGLE_STACK


def _families(
    spec: raw.ServiceSpec, policy: str, cluster_ips: Sequence[str], faults: Faults
) -> Sequence[str]:
    """Check policy, families and addresses against each other; what is known of the families."""
    families = list(spec.get("ipFamilies") or ())
    for i, family in enumerate(families):
        faults.supported(f"spec.ipFamilies[{i}]", family, ("IPv4", "IPv6"))
        if family in families[:i]:
            faults.duplicate(f"spec.ipFamilies[{i}]", family)
    faults.supported("spec.ipFamilyPolicy", policy, FAMILY_POLICIES)
    if spec.get("type") == ServiceType.EXTERNAL_NAME:
        for field in ("ipFamilies", "ipFamilyPolicy"):
            if spec.get(field):
                faults.forbidden(f"spec.{field}", "may not be set for ExternalName services")
        return ()
    if policy == FamilyPolicy.SINGLE_STACK:
        for count, what in ((len(cluster_ips), "cluster IPs"), (len(families), "IP families")):
            if count == 2:
                dual = "must be 'RequireDualStack' or 'PreferDualStack' when multiple"
                faults.invalid("spec.ipFamilyPolicy", policy, f"{dual} {what} are specified")
    for i, address in enumerate(cluster_ips):
        family = family_of(address).label
        if i >= len(families):
            families.append(family)
        elif families[i] != family:
            said = f"expected an {families[i]} value as indicated by `ipFamilies[{i}]`"
            faults.invalid(f"spec.clusterIPs[{i}]", address, said)
    return families


def _external_name(spec: raw.ServiceSpec, faults: Faults) -> None:
    # A trailing dot marks the name as fully qualified.
    name = (spec.get("externalName") or "").removesuffix(".")
    if name:
        faults.subdomain("spec.externalName", name)
    else:
        faults.required("spec.externalName")


def _source_ranges(
    spec: raw.ServiceSpec, service_type: ServiceType, faults: Faults
) -> tuple[str, ...]:
    ranges = spec.get("loadBalancerSourceRanges") or ()
    if ranges and service_type is not ServiceType.LOAD_BALANCER:
        said = "may only be used when `type` is 'LoadBalancer'"
        faults.forbidden("spec.loadBalancerSourceRanges", said)
    prefixes = (
        faults.prefix(f"spec.loadBalancerSourceRanges[{i}]", text.strip())
        for i, text in enumerate(ranges)
    )
    return tuple(dict.fromkeys(prefixes))


def _only_for_load_balancers(
    spec: raw.ServiceSpec, service_type: ServiceType, faults: Faults
) -> None:
    if service_type is ServiceType.LOAD_BALANCER:
        return
    for field in ("allocateLoadBalancerNodePorts", "loadBalancerClass"):
        if spec.get(field) is not None:
            faults.forbidden(f"spec.{field}", "may only be used when `type` is 'LoadBalancer'")


def _external_policy(
    spec: raw.ServiceSpec, service_type: ServiceType, faults: Faults
) -> tuple[TrafficPolicy, bool]:
    """The external policy, and whether a health-check node port belongs to it (F14, F15)."""
    policy = spec.get("externalTrafficPolicy") or ""
    accessible = service_type in (ServiceType.NODE_PORT, ServiceType.LOAD_BALANCER) or (
        service_type is ServiceType.CLUSTER_IP and bool(spec.get("externalIPs"))
    )
    if policy and not accessible:
        said = "may only be set for externally-accessible services"
        faults.invalid("spec.externalTrafficPolicy", policy, said)
        return TrafficPolicy.CLUSTER, False
    policy = policy or TrafficPolicy.CLUSTER
    if not faults.supported("spec.externalTrafficPolicy", policy, POLICIES):
        return TrafficPolicy.CLUSTER, False
    local = policy == TrafficPolicy.LOCAL
    needed = local and service_type is ServiceType.LOAD_BALANCER
    port = spec.get("healthCheckNodePort") or 0
    if port and not needed:
        said = (
            "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'"
        )
        faults.invalid("spec.healthCheckNodePort", port, said)
    return TrafficPolicy(policy), needed


def _affinity(spec: raw.ServiceSpec, faults: Faults) -> int:
    affinity = spec.get("sessionAffinity") or "None"
    if not faults.supported("spec.sessionAffinity", affinity, ("ClientIP", "None")):
        return 0
    config = spec.get("sessionAffinityConfig")
    if affinity == "None":
        if config is not None:
            said = "must not be set when session affinity is None"
            faults.forbidden("spec.sessionAffinityConfig", said)
        return 0
    timeout_s = ((config or {}).get("clientIP") or {}).get("timeoutSeconds")
    if timeout_s is None:
        return DEFAULT_AFFINITY_S
    if not 1 <= timeout_s <= MAX_AFFINITY_S:
        said = f"must be greater than 0 and less than {MAX_AFFINITY_S}"
        faults.invalid("spec.sessionAffinityConfig.clientIP.timeoutSeconds", timeout_s, said)
    return timeout_s


def _load_balancer_ips(service: raw.Service, faults: Faults) -> tuple[str, ...]:
    """Addresses a load balancer delivers unchanged (F9): ipMode VIP or unset."""
    status = (service.get("status") or {}).get("loadBalancer") or {}
    addresses = []
    for i, ingress in enumerate(status.get("ingress") or ()):
        path = f"status.loadBalancer.ingress[{i}]"
        if not (text := ingress.get("ip")):
            continue
        address = faults.address(f"{path}.ip", text)
        mode = ingress.get("ipMode") or "VIP"
        if faults.supported(f"{path}.ipMode", mode, ("Proxy", "VIP")) and mode == "VIP":
            addresses.append(address)
    return tuple(dict.fromkeys(addresses))
