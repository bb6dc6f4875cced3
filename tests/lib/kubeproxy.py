"""What kube-proxy writes for one service, by hand: iptables' rules and nftables' tables.

Shaped after §2.1 and §2.3: the chains, the mark, the order. Beside them stand chains that are not
kube-proxy's, which nobody may touch.
"""

from __future__ import annotations

from collections.abc import Sequence

from ebpf_svc.model.net import Family, Protocol
from ebpf_svc.testbed.host import Node, Pod
from tests.lib.manifests import PORT, PROTOCOLS, Web

TOOLS = {Family.V4: "iptables", Family.V6: "ip6tables"}
FOREIGN = (
    "KUBE-FIREWALL", "KUBE-KUBELET-CANARY", "KUBE-ROUTER-INPUT", "CNI-HOSTPORT-DNAT", "MY-CHAIN",
)  # fmt: skip
"""Chains that are kubelet's, a CNI's or the administrator's."""


def _names(protocol: Protocol, pod: int) -> tuple[str, str, str]:
    """Service, external and endpoint chain; 16 characters of base32 stand for the hash."""
    word = {Protocol.TCP: "TCP", Protocol.UDP: "UDP"}[protocol]
    return (
        f"KUBE-SVC-{word}AAAAAAAAAAAAA", f"KUBE-EXT-{word}AAAAAAAAAAAAA",
        f"KUBE-SEP-{word}AAAAAAAAAAAA{'ABCDEFG'[pod]}",
    )  # fmt: skip


def iptables_rules(web: Web, pods: Sequence[Pod], family: Family) -> str:
    """Input for iptables-restore."""
    nat, filters = _nat(web, pods, family), _filter(family)
    return f"{filters}{nat}{_mangle()}"


def _mangle() -> str:
    return "*mangle\n:KUBE-PROXY-CANARY - [0:0]\n:KUBE-KUBELET-CANARY - [0:0]\nCOMMIT\n"


def _filter(family: Family) -> str:
    loopback = "127.0.0.0/8" if family is Family.V4 else "::1/128"
    return f"""*filter
:KUBE-SERVICES - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-FIREWALL - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-ROUTER-INPUT - [0:0]
:MY-CHAIN - [0:0]
-A INPUT -j KUBE-ROUTER-INPUT
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment "kubernetes health check service ports" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A INPUT -j KUBE-FIREWALL
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -j KUBE-FIREWALL
-A KUBE-FIREWALL ! -s {loopback} -d {loopback} -m comment --comment "block incoming localnet connections" -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A MY-CHAIN -m comment --comment "never -j KUBE-SERVICES" -j RETURN
COMMIT
"""  # noqa: E501


def _nat(web: Web, pods: Sequence[Pod], family: Family) -> str:
    chains = [
        *("KUBE-SERVICES", "KUBE-NODEPORTS", "KUBE-MARK-MASQ", "KUBE-POSTROUTING"),
        *("KUBE-PROXY-CANARY", "KUBE-KUBELET-CANARY", "CNI-HOSTPORT-DNAT"),
    ]
    rules = [
        '-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
        "-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT",
        '-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES',
        '-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING',
        "-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000",
        "-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN",
        "-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0",
        "-A KUBE-POSTROUTING -j MASQUERADE --random-fully",
    ]
    for protocol in PROTOCOLS:
        low = protocol.value.lower()
        service, external, _ = _names(protocol, 0)
        chains += [service, external]
        rules += [
            f'-A KUBE-SERVICES -d {web.cluster.of(family)} -p {low} -m comment --comment '
            f'"tests/{web.name}:{low} cluster IP" -m {low} --dport {PORT} -j {service}',
            f'-A KUBE-NODEPORTS -p {low} -m comment --comment "tests/{web.name}:{low}" '
            f"-m {low} --dport {web.node_port} -j {external}",
            *(
                f"-A KUBE-SERVICES -d {vip.of(family)} -p {low} -m comment --comment "
                f'"tests/{web.name}:{low} {kind} IP" -m {low} --dport {PORT} -j {external}'
                for kind, vip in (("external", web.external), ("loadbalancer", web.balancer))
            ),
            f"-A {external} -j KUBE-MARK-MASQ",
            f"-A {external} -j {service}",
        ]  # fmt: skip
        for number, pod in enumerate(pods):
            endpoint = _names(protocol, number)[2]
            share = 1 / (len(pods) - number)
            chance = f"-m statistic --mode random --probability {share:.10f} " if share < 1 else ""
            at = pod.address(family)
            to = f"{at}:{web.target_port}" if family is Family.V4 else f"[{at}]:{web.target_port}"
            chains.append(endpoint)
            rules += [
                f"-A {service} {chance}-j {endpoint}",
                f"-A {endpoint} -s {at} -j KUBE-MARK-MASQ",
                f"-A {endpoint} -p {low} -m {low} -j DNAT --to-destination {to}",
            ]
    rules.append("-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS")
    lines = ["*nat", *(f":{chain} - [0:0]" for chain in chains), *rules, "COMMIT", ""]
    return "\n".join(lines)


def nft_rules(web: Web, pods: Sequence[Pod], family: Family) -> str:
    """Input for nft: the table of a family (X2-X8), less the chains nothing here needs."""
    word, table = ("ip", "ip kube-proxy") if family is Family.V4 else ("ip6", "ip6 kube-proxy")
    kind = "ipv4_addr" if family is Family.V4 else "ipv6_addr"
    services, ips, ports = [], [], []
    for protocol in PROTOCOLS:
        low = protocol.value.lower()
        name = f"ULMVA6XW-tests/{web.name}/{low}/{low}"
        choice = ", ".join(
            f"{i} : {pod.address(family)} . {web.target_port}" for i, pod in enumerate(pods)
        )
        services.append(f"""
            chain service-{name} {{
                meta l4proto {low} dnat {word} to numgen random mod {len(pods)} map {{ {choice} }}
            }}
            chain external-{name} {{ jump mark-for-masquerade
                goto service-{name}
            }}""")
        ips.append(f"{web.cluster.of(family)} . {low} . {PORT} : goto service-{name}")
        for vip in (web.external, web.balancer):
            ips.append(f"{vip.of(family)} . {low} . {PORT} : goto external-{name}")
        ports.append(f"{low} . {web.node_port} : goto external-{name}")
    return f"""
        table {table} {{
            chain mark-for-masquerade {{ meta mark set meta mark or 0x4000; }}
            {"".join(services)}
            map service-ips {{
                type {kind} . inet_proto . inet_service : verdict
                elements = {{ {", ".join(ips)} }}
            }}
            map service-nodeports {{
                type inet_proto . inet_service : verdict
                elements = {{ {", ".join(ports)} }}
            }}
            chain services {{
                {word} daddr . meta l4proto . th dport vmap @service-ips
                fib daddr type local meta l4proto . th dport vmap @service-nodeports
            }}
            chain masquerading {{
                meta mark and 0x4000 == 0 return
                meta mark set meta mark xor 0x4000
                masquerade fully-random
            }}
            chain nat-prerouting {{ type nat hook prerouting priority dstnat; jump services; }}
            chain nat-output {{ type nat hook output priority -100; jump services; }}
            chain nat-postrouting {{
                type nat hook postrouting priority srcnat
                jump masquerading
            }}
        }}
    """


def write(node: Node, mode: str, web: Web, pods: Sequence[Pod]) -> None:
    """Do what a sync of kube-proxy's does; `mode` is legacy or nft (iptables), or nftables."""
    for family in Family:
        if mode == "nftables":
            table = "ip kube-proxy" if family is Family.V4 else "ip6 kube-proxy"
            text = f"add table {table}\ndelete table {table}\n{nft_rules(web, pods, family)}"
            node.run(["nft", "-f", "-"], stdin=text)
        else:
            argv = [f"{TOOLS[family]}-{mode}-restore", "--noflush", "-w", "5"]
            node.run(argv, stdin=iptables_rules(web, pods, family))


def chains(node: Node, mode: str) -> set[str]:
    """`table chain` of every iptables chain of both families that is not built in."""
    found = set()
    for tool in TOOLS.values():
        table = ""
        for line in node.run([f"{tool}-{mode}-save"]).splitlines():
            if line.startswith("*"):
                table = line[1:]
            elif line.startswith(":") and line.split()[1] == "-":
                found.add(f"{tool} {table} {line[1:].split()[0]}")
    return found
