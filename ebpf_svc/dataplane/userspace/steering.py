"""Lead packets to the relay's doors: keep the table of netfilter as the plans say."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from typing import Protocol

from ebpf_svc.config import Settings
from ebpf_svc.dataplane.inspect import KernelPart
from ebpf_svc.dataplane.netfilter.pods import pod_match
from ebpf_svc.dataplane.userspace import probes, rules, stale
from ebpf_svc.dataplane.userspace.direct import DirectSteering
from ebpf_svc.dataplane.userspace.doors import DoorId, DoorPlan
from ebpf_svc.dataplane.userspace.rules import RELAY, TABLE, Element
from ebpf_svc.dataplane.userspace.written import Written
from ebpf_svc.errors import CommandError
from ebpf_svc.host import localroute
from ebpf_svc.host.command import run
from ebpf_svc.model.desired import Frontend, FrontendKey, PlanKey, ServicePlan

NFT_S = 120.0
"""A node of ten thousand services has a hundred thousand elements."""


class Steering(Protocol):
    """What leads packets to the doors, in the calling thread's network namespace."""

    def open(self) -> None:
        """Take over what an earlier run left; raises DataplaneError."""

    def doors(self, plan: ServicePlan) -> list[DoorPlan]:
        """The doors a plan needs."""

    def write(self, plans: Mapping[PlanKey, ServicePlan], numbers: Mapping[DoorId, int]) -> Written:
        """Make the kernel lead to doors that listen at these ports; raises DataplaneError."""

    def verify(self) -> tuple[str, ...]:
        """Read the kernel back; says in words what others changed, which the next write mends."""

    def held(
        self, plans: Mapping[PlanKey, ServicePlan], numbers: Mapping[DoorId, int]
    ) -> set[FrontendKey]:
        """The frontends of these plans that the kernel leads here, wholly and correctly."""

    def retire(self) -> None:
        """Lead no new connection here; those that are open need what stays."""

    def let_go(self) -> None:
        """Retired: hold on to no client any more."""

    def close(self) -> None:
        """Free what the process holds."""

    def parts(self) -> list[KernelPart]:
        """What is in the kernel."""

    def drops(self) -> dict[str, int]:
        """Packets dropped, by reason."""


def make_steering(settings: Settings) -> Steering:
    """The means this host has: netfilter, else the addresses of the services themselves."""
    if probes.netfilter_missing():
        return DirectSteering(settings)
    return NetfilterSteering(settings)


def is_led_by_netfilter() -> bool:
    """Whether our table is there, whoever left it; raises CommandError."""
    return bool(shutil.which("nft")) and _list() is not None


def remove_all() -> None:
    """Remove what any of them left, whoever ran; raises DataplaneError."""
    if is_led_by_netfilter():
        run(["nft", "delete", "table", *TABLE.split()])
    localroute.remove(localroute.present())


class NetfilterSteering:
    """The rules of the calling thread's network namespace."""

    def __init__(self, settings: Settings) -> None:
        self._pods = {family: pod_match(settings, family) for family in settings.families}
        self._skeleton = rules.skeleton(self._pods)
        self._held: dict[Element, str] = {}
        """What the table has, as far as we know."""
        self._around = ""
        """The rules as nft worded them when they were written."""
        self._rendered: dict[PlanKey, tuple[ServicePlan, dict[Element, str]]] = {}

    def open(self) -> None:
        """Write the rules; elements of an earlier run stay until the first plan says otherwise."""
        localroute.add(self._relay_addresses())
        self._write_skeleton()

    def doors(self, plan: ServicePlan) -> list[DoorPlan]:
        """The doors a plan needs: one for each list its clients get."""
        return [
            DoorPlan(
                DoorId(plan.key, name),
                RELAY[plan.key.family],
                0,
                partial(_always, name == rules.LOCAL),
                preferred=self._known_number(plan, name),
            )
            for name in rules.door_names(plan)
        ]

    def write(self, plans: Mapping[PlanKey, ServicePlan], numbers: Mapping[DoorId, int]) -> Written:
        """Make the table lead to these doors, in one transaction.

        Raises:
            CommandError: nft refused; nothing was changed.
        """
        wanted: dict[Element, str] = {}
        for key, plan in plans.items():
            wanted.update(self._elements(key, plan, numbers))
        if wanted == self._held:
            return Written()
        text, touched = rules.change(self._held, wanted)
        run(["nft", "-f", "-"], input=text, timeout_s=NFT_S)
        self._held = wanted
        for gone in [key for key in self._rendered if key not in plans]:
            del self._rendered[gone]
        return Written(len(touched), stale.delete_flows(touched, wanted))

    def verify(self) -> tuple[str, ...]:
        """Read the table back; what others changed is put right by the next write, or here."""
        repaired = []
        if localroute.add(self._relay_addresses()):
            repaired.append("routes to the relay were missing")
        listing = _list()
        around, held = rules.parse(listing) if listing is not None else ("", {})
        if around != self._around:
            repaired.append(f"table {TABLE} was {'changed' if listing else 'missing'}")
            self._write_skeleton()
        elif held != self._held:
            count = len(held.items() ^ self._held.items())
            repaired.append(f"{count} elements of table {TABLE} were changed")
            self._held = held
        return tuple(repaired)

    def held(
        self, plans: Mapping[PlanKey, ServicePlan], numbers: Mapping[DoorId, int]
    ) -> set[FrontendKey]:
        """The frontends of these plans that the kernel leads here, wholly and correctly."""
        listing = _list()
        if listing is None:
            return set()
        found = rules.parse(listing)[1].items()
        return {
            frontend.key
            for plan in plans.values()
            for frontend in plan.frontends
            if self._one(plan, frontend, numbers).items() <= found
        }

    def retire(self) -> None:
        """Take no more new connections; the chains stay, for without them translation ends."""
        if _list() is not None:
            names = rules.containers(self._pods)
            lines = [f"flush {text.split()[0]} {TABLE} {name}\n" for name, text in names.items()]
            run(["nft", "-f", "-"], input="".join(lines))
        self._held = {}

    def let_go(self) -> None:
        """Let datagrams of known clients go where the rules of others lead them now."""
        stale.delete_relayed(self._pods)

    def close(self) -> None:
        """Nothing is held."""

    def parts(self) -> list[KernelPart]:
        """Table and routes of ours that are there."""
        found = []
        listing = _list() if shutil.which("nft") else None
        if listing is not None:
            count = len(rules.parse(listing)[1])
            found.append(KernelPart("table", TABLE, "nftables", f"{count} elements"))
        return found

    def drops(self) -> dict[str, int]:
        """Packets dropped, by reason."""
        words = run(["nft", "list", "counters", "table", *TABLE.split()]).split()
        found = {}
        for at, word in enumerate(words):
            if word == "counter":
                found[words[at + 1]] = int(words[at + 4])
        return found

    def _relay_addresses(self) -> list[str]:
        return [RELAY[family] for family in self._pods]

    def _write_skeleton(self) -> None:
        try:
            run(["nft", "-f", "-"], input=self._skeleton)
        except CommandError:
            # Something of another shape has our names: start over, in one transaction.
            text = f"add table {TABLE}\ndelete table {TABLE}\n{self._skeleton}"
            run(["nft", "-f", "-"], input=text)
        self._around, self._held = rules.parse(_list() or "")

    def _known_number(self, plan: ServicePlan, name: str) -> int:
        """The port that an earlier agent's rules have for a door; 0 = they know none."""
        suffix = str(plan.key.family.value)
        for frontend in plan.frontends:
            for source, of in rules.CLASSES.items():
                if rules.door_name(frontend, source) == name:
                    found = self._held.get(Element(of + suffix, rules.frontend_text(frontend)))
                    if found and int(found) not in (rules.REFUSED, rules.SILENT):
                        return int(found)
        return 0

    def _elements(
        self, key: PlanKey, plan: ServicePlan, numbers: Mapping[DoorId, int]
    ) -> dict[Element, str]:
        known = self._rendered.get(key)
        if known is None or known[0] is not plan:
            known = plan, rules.elements(plan, _of_plan(plan, numbers))
            self._rendered[key] = known
        return known[1]

    @staticmethod
    def _one(
        plan: ServicePlan, frontend: Frontend, numbers: Mapping[DoorId, int]
    ) -> dict[Element, str]:
        return rules.elements(plan, _of_plan(plan, numbers), (frontend,))


def _of_plan(plan: ServicePlan, numbers: Mapping[DoorId, int]) -> dict[str, int]:
    return {name: numbers[DoorId(plan.key, name)] for name in rules.door_names(plan)}


def _always(answer: bool, _: str) -> bool:
    return answer


def _list() -> str | None:
    """The table as nft prints it, numerically and without counters; None when it is not there."""
    argv = ["nft", "-n", "-s", "list", "table", *TABLE.split()]
    try:
        return run(argv, timeout_s=NFT_S)
    except CommandError as exc:
        if "No such file" in exc.stderr:
            return None
        raise
