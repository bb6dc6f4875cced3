"""Delete UDP flows that conntrack still leads elsewhere than the rules do now (C1-C10).

Of a flow only the first packet asks the rules. One that began before its service was served, or
whose door has another port now, would never reach it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

from ebpf_svc.dataplane.base import Reconciled
from ebpf_svc.dataplane.userspace.rules import CLASSES, RELAY, Element, Elements
from ebpf_svc.errors import DataplaneError
from ebpf_svc.host import conntrack_table
from ebpf_svc.log import get_logger
from ebpf_svc.model.net import Family, Protocol

End = tuple[str, int]

log = get_logger(__name__)


def delete_flows(touched: Iterable[Element], wanted: Elements) -> tuple[Reconciled, ...]:
    """Delete the flows of frontends whose elements changed, unless they lead to one of its doors.

    A table that cannot be read is logged: old flows then end when their clients pause.
    """
    done = []
    for family, changed in _frontends(touched).items():
        begun = time.monotonic()
        served = {frontend: _doors(frontend, family, wanted) for frontend in changed}

        def is_stale(
            destination: End, answers_from: End, served: dict[End, set[End]] = served
        ) -> bool:
            doors = served.get(destination)
            return doors is not None and answers_from not in doors

        try:
            doomed = conntrack_table.entries(family, Protocol.UDP, is_stale)
            count = conntrack_table.delete(family, doomed)
        except DataplaneError as error:
            log.warning("conntrack.unread", family=family.label, error=str(error))
            continue
        done.append(Reconciled(family, count, time.monotonic() - begun))
    return tuple(done)


def delete_relayed(families: Iterable[Family]) -> None:
    """Delete every flow that leads to a door: another dataplane serves, and takes it from here."""
    for family in families:
        try:
            doomed = conntrack_table.entries(family, Protocol.UDP, _comes_from_a_door)
            conntrack_table.delete(family, doomed)
        except DataplaneError as error:
            log.warning("conntrack.unread", family=family.label, error=str(error))


def _comes_from_a_door(_: End, answers_from: End) -> bool:
    return answers_from[0] in RELAY.values()


def _frontends(touched: Iterable[Element]) -> dict[Family, set[End]]:
    """UDP frontends among elements of the maps, by family."""
    found: dict[Family, set[End]] = {}
    for element in touched:
        if element.container[:-1] not in CLASSES.values():
            continue
        address, protocol, port = element.key.split(" . ")
        if int(protocol) == Protocol.UDP.number:
            family = Family(int(element.container[-1]))
            found.setdefault(family, set()).add((address, int(port)))
    return found


def _doors(frontend: End, family: Family, wanted: Elements) -> set[End]:
    key = f"{frontend[0]} . {Protocol.UDP.number} . {frontend[1]}"
    numbers = (wanted.get(Element(f"{name}{family.value}", key)) for name in CLASSES.values())
    return {(RELAY[family], int(number)) for number in numbers if number}
