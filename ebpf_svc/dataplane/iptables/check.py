"""Whether this host can run the mode: tried in a network namespace that is thrown away (I26)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ebpf_svc.dataplane.base import Check
from ebpf_svc.dataplane.netfilter import tools
from ebpf_svc.errors import CommandError
from ebpf_svc.host.command import run
from ebpf_svc.host.iptables import TOOLS, Variant
from ebpf_svc.model.net import Family

_CHAIN = "EBPF-SVC-TRY"
_NEEDED = (
    ("comment", '-m comment --comment "a b"'),
    ("statistic", "-m statistic --mode random --probability 0.5"),
    ("addrtype", "-m addrtype --dst-type LOCAL"),
    ("mark", "-m mark --mark 0x1/0x1"),
    ("conntrack", "-m conntrack --ctstate NEW"),
    ("tcp", "-p tcp -m tcp --dport 1"),
    ("udp", "-p udp -m udp --dport 1"),
)
_TARGETS = {
    Family.V4: "-p tcp -j DNAT --to-destination 192.0.2.1:1",
    Family.V6: "-p tcp -j DNAT --to-destination [2001:db8::1]:1",
}
_RECENT = "-m recent --set --name EBPF-SVC-TRY --rsource"
_RANDOM = "-j MASQUERADE --random-fully"
_SCTP = "-p sctp -m sctp --dport 1"


@dataclass(frozen=True, slots=True)
class Found:
    """What one family of this host can do."""

    variant: Variant | None
    """None = it cannot be served; `why` says it."""
    why: str = ""
    missing: tuple[str, ...] = ()
    """Matches without which nothing can be served."""
    has_recent: bool = True
    has_random_fully: bool = True
    has_sctp: bool = True

    @property
    def ok(self) -> bool:
        return self.variant is not None and not self.missing


def probe(families: Sequence[Family]) -> Mapping[Family, Found]:
    """Try what rules need; leaves nothing behind."""
    chosen = tools.choose(families)
    found = {}
    for family in families:
        variant, why = chosen.get(family), tools.why_unusable(family)
        if why or variant is None:
            found[family] = Found(None, why or f"{TOOLS[family]} is not installed")
        else:
            found[family] = _probe(variant)
    return found


def _probe(variant: Variant) -> Found:
    try:
        variant.save("mangle")  # nat may be large, and is tried below
    except CommandError as error:
        return Found(None, error.stderr.strip() or str(error))
    needed = dict(_NEEDED) | {"DNAT": _TARGETS[variant.family]}
    wished = {"recent": _RECENT, "random": _RANDOM, "sctp": _SCTP}
    if not _refused(variant, [*needed.values(), *wished.values()]):
        return Found(variant)
    absent = {name for name, rule in (needed | wished).items() if _refused(variant, [rule])}
    return Found(
        variant,
        missing=tuple(sorted(absent & needed.keys())),
        has_recent="recent" not in absent,
        has_random_fully="random" not in absent,
        has_sctp="sctp" not in absent,
    )


def _refused(variant: Variant, rules: Sequence[str]) -> bool:
    """Whether the kernel refuses rules; False where a namespace cannot be had to try in."""
    lines = ["*nat", f":{_CHAIN} - [0:0]"]
    # Masquerading is only for what POSTROUTING leads to, translating for the other way.
    lines += (f"-A {'POSTROUTING' if rule == _RANDOM else _CHAIN} {rule}" for rule in rules)
    lines += (f"-A PREROUTING -j {_CHAIN}", "COMMIT", "")
    try:
        run(["unshare", "--net", f"{variant}-restore"], input="\n".join(lines))
    except CommandError as error:
        return not error.stderr.startswith("unshare:") and "unshare" not in error.stderr
    return False


def checks(found: Mapping[Family, Found]) -> Iterator[Check]:
    """The answers, a line for each family and each thing that is lost."""
    first = next(iter(found), None)
    for family, each in found.items():
        tool = TOOLS[family]
        if each.variant is None:
            # The other family serves without this one, as kube-proxy does.
            usable = any(other.ok for other in found.values())
            required = family is first or not usable
            yield Check(tool, False, each.why, _mend(family, each.why), required)
            continue
        if each.missing:
            detail = f"the kernel refuses rules with {', '.join(each.missing)}"
            modules = " ".join(f"xt_{name}" for name in each.missing)
            yield Check(tool, False, detail, f"modprobe -a {modules}")
            continue
        yield Check(tool, True, f"{each.variant} writes rules")
        if not each.has_recent:
            detail = "session affinity is not kept: the kernel has no xt_recent"
            yield Check(f"{tool} recent", False, detail, "modprobe xt_recent", False)
        if not each.has_sctp:
            detail = "SCTP services are not served: the kernel has no xt_sctp"
            yield Check(f"{tool} sctp", False, detail, "modprobe xt_sctp", False)
        if not each.has_random_fully:
            detail = "source ports of masqueraded connections may collide"
            yield Check(f"{tool} random-fully", False, detail, "iptables 1.6.2 or newer", False)


def _mend(family: Family, why: str) -> str:
    if "installed" in why:
        return "apt-get install iptables"
    if family is Family.V6:
        return "--family 4"
    return ""
