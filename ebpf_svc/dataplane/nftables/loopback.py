"""Node ports on 127.0.0.1: the kernel setting they need, and its way back (S7).

With route_localnet the kernel lets packets from 127.0.0.1 leave for an endpoint. It no longer drops
loopback addresses that come from elsewhere, either, so the tables do (`frame`), and the setting
goes when they go. That it was we who changed it is written into the table, as an empty chain.
"""

from __future__ import annotations

from collections.abc import Iterable

from ebpf_svc.dataplane.nftables.content import Chained
from ebpf_svc.dataplane.nftables.render import is_on_loopback
from ebpf_svc.errors import DataplaneError
from ebpf_svc.host import iptables, sysctl
from ebpf_svc.host.nf_tables import Chain
from ebpf_svc.log import get_logger
from ebpf_svc.model.desired import ServicePlan
from ebpf_svc.model.net import Family

SETTING = "net/ipv4/conf/all/route_localnet"
MARKER = "route-localnet-was-off"
_OTHER_GUARD = "KUBE-FIREWALL"
"""The chain by which kubelet, kube-proxy and our iptables mode guard it (I6)."""

log = get_logger(__name__)


def marker() -> Chained:
    """The chain that says that the setting is ours."""
    return Chained(Chain(MARKER, comment="ebpf-svc turned route_localnet on"), ())


def is_needed(plans: Iterable[ServicePlan | None]) -> bool:
    """Whether one of these service ports has a node port on 127.0.0.1."""
    return any(
        is_on_loopback(frontend)
        for plan in plans
        if plan is not None and plan.key.family is Family.V4
        for frontend in plan.frontends
    )


def turn_on() -> bool:
    """Returns whether it was off; to be called when the guard is there."""
    try:
        return sysctl.write(SETTING, "1")
    except OSError as error:
        log.warning("nftables.route-localnet", path=SETTING, error=error.strerror)
        return False


def turn_off() -> None:
    """Turn it off again, unless somebody else has taken over the guard."""
    try:
        if not _is_guarded_by_others():
            sysctl.write(SETTING, "0")
    except OSError as error:
        log.warning("nftables.route-localnet", path=SETTING, error=error.strerror)


def _is_guarded_by_others() -> bool:
    try:
        return any(
            _OTHER_GUARD in saved.chains
            for variant in iptables.variants((Family.V4,))
            if (saved := variant.save("filter").get("filter")) is not None
        )
    except DataplaneError:
        return False
