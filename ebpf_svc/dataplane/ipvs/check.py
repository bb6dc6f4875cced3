"""Whether this host can run ipvs mode (V1): tried where trying leaves nothing behind."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from ebpf_svc.config import Settings
from ebpf_svc.dataplane.base import Check
from ebpf_svc.dataplane.ipvs import rules, ruleset, sets
from ebpf_svc.dataplane.netfilter import tools
from ebpf_svc.errors import CommandError
from ebpf_svc.host import dummy, ipset, ipvs, sysctl
from ebpf_svc.host.command import TIMED_OUT, run
from ebpf_svc.host.iptables import TOOLS
from ebpf_svc.host.kubeproxy import LINK
from ebpf_svc.model.net import Family

_BRIDGES = "net/bridge/bridge-nf-call-iptables"


def checks(settings: Settings) -> Iterator[Check]:
    """Each requirement, looked at."""
    yield _servers(settings.ipvs.scheduler)
    yield _device()
    has_sets = ipset.is_there()
    yield Check(
        "ipset",
        has_sets,
        "the kernel has sets" if has_sets else "the kernel has no ipsets",
        "" if has_sets else "modprobe ip_set (CONFIG_IP_SET)",
    )
    yield _bridges()
    chosen = tools.choose(settings.families)
    usable = {
        family: tools.why_unusable(family) or ("" if family in chosen else "is not installed")
        for family in settings.families
    }
    for family, why in usable.items():
        yield _tool(settings, family, why, others=any(not each for each in usable.values()))


def served_families(settings: Settings) -> tuple[Family, ...]:
    """Those the host can serve."""
    chosen = tools.choose(settings.families)
    return tuple(
        family
        for family in settings.families
        if family in chosen and not tools.why_unusable(family)
    )


def _servers(scheduler: str) -> Check:
    """Virtual servers with that scheduler; modules that can be loaded are not loaded for it."""
    wanted = ("ip_vs", f"ip_vs_{scheduler}")
    if not ipvs.is_loaded() and all(map(_loadable, wanted)):
        return Check("IPVS", True, f"modules {' and '.join(wanted)} can be loaded")
    why = ipvs.try_scheduler(scheduler)
    if not why:
        return Check("IPVS", True, f"virtual servers with scheduler {scheduler}")
    return Check(
        "IPVS",
        False,
        f"no virtual server with scheduler {scheduler}: {why}",
        f"modprobe -a {' '.join(wanted)}; a kernel without them cannot run this mode",
    )


def _device() -> Check:
    if dummy.index_of(LINK) or _loadable("dummy"):
        return Check("dummy", True, f"{LINK} holds addresses")
    try:
        run(["unshare", "--net", "ip", "link", "add", LINK, "type", "dummy"])
    except CommandError as error:
        detail = f"no dummy devices: {error.stderr.strip()}"
        return Check("dummy", False, detail, "modprobe dummy (CONFIG_DUMMY)")
    return Check("dummy", True, f"{LINK} can be made")


def _bridges() -> Check:
    """Answers between pods of one bridge must come by IPVS, which gave the call another address."""
    is_seen = sysctl.read(_BRIDGES) == "1"
    return Check(
        "br_netfilter",
        is_seen,
        "packets between pods of one bridge meet netfilter"
        if is_seen
        else "services fail between pods of one bridge, if this node's pods are behind one",
        "" if is_seen else f"modprobe br_netfilter; sysctl -w {_BRIDGES.replace('/', '.')}=1",
        required=False,
    )


def _tool(settings: Settings, family: Family, why: str, *, others: bool) -> Check:
    name = TOOLS[family]
    required = family is settings.families[0] or not others
    if why:
        mend = "apt-get install iptables" if "installed" in why else "--family 4"
        return Check(name, False, why, mend, required)
    refused = _refused(settings, family)
    if refused:
        return Check(name, False, f"our rules are refused: {refused}", "modprobe xt_set", required)
    return Check(name, True, f"{tools.choose([family])[family]} writes rules that look at sets")


def _refused(settings: Settings, family: Family) -> str:
    """Why rules like ours are refused; tried in a network namespace that is thrown away."""
    if not shutil.which("ipset"):
        return ""  # without the tool no sets can be made there
    options = rules.RuleOptions.from_settings(settings, family)
    made = "\n".join(
        f"create {spec.name} {spec.type} "
        + (
            "range 0-65535"
            if spec.type == "bitmap:port"
            else f"family {'inet6' if family is Family.V6 else 'inet'}"
        )
        for spec in sets.specs_of(family)
    )
    text = ruleset.difference(options, {}).text
    variant = tools.choose([family])[family]
    script = f"ipset restore <<'END'\n{made}\nEND\n{variant}-restore <<'END'\n{text}END\n"
    try:
        run(["unshare", "--net", "sh", "-ec", script])
    except CommandError as error:
        if error.code == TIMED_OUT or "unshare" in error.stderr:
            return ""  # it could not be tried
        return error.stderr.strip().splitlines()[0] if error.stderr.strip() else str(error)
    return ""


def _loadable(module: str) -> bool:
    """Whether a module is there to be loaded, or is built in; False where that cannot be told."""
    try:
        run(["modprobe", "--dry-run", "--quiet", module])
    except CommandError:
        return False
    return True
