"""Let other processes, such as `show`, see what the relay holds: a socket in the run directory.

The kernel knows frontends and doors only; backends and flows are the relay's. Whoever connects gets
one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ebpf_svc.dataplane.inspect import FlowView
from ebpf_svc.dataplane.userspace.doors import DoorId
from ebpf_svc.errors import DataplaneError
from ebpf_svc.model.desired import (
    Backend,
    Frontend,
    FrontendKey,
    FrontendKind,
    PlanKey,
    ServicePlan,
)
from ebpf_svc.model.net import Family, Protocol, Sources
from ebpf_svc.model.service import ServicePortName

FILE = "userspace.sock"
ANSWER_S = 10.0


@dataclass(frozen=True, slots=True)
class Sight:
    """What a relay holds."""

    plans: Mapping[PlanKey, ServicePlan]
    numbers: Mapping[DoorId, int]
    flows: tuple[FlowView, ...] = ()


NOTHING = Sight({}, {})


async def show(run_dir: Path, look: Callable[[], Sight]) -> asyncio.AbstractServer:
    """Answer whoever asks, for root only; raises OSError."""

    async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            writer.write(encode(look()).encode())
            await asyncio.wait_for(writer.drain(), ANSWER_S)
        writer.close()

    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / FILE).unlink(missing_ok=True)
    with _short(run_dir) as place:
        server = await asyncio.start_unix_server(answer, place)
    (run_dir / FILE).chmod(0o600)
    return server


def look(run_dir: Path) -> Sight:
    """What the relay of a running agent holds; nothing when none runs."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(ANSWER_S)
        try:
            with _short(run_dir) as place:
                asking.connect(place)
        except (FileNotFoundError, ConnectionRefusedError):
            return NOTHING
        except OSError as error:
            raise DataplaneError(f"{run_dir / FILE}: {error.strerror}") from error
        with asking.makefile() as answer:
            try:
                return decode(answer.read())
            except (OSError, ValueError) as error:
                raise DataplaneError(f"{run_dir / FILE}: {error}") from error


@contextmanager
def _short(run_dir: Path) -> Iterator[str]:
    """A path of the socket that fits its address, however deep the directory is."""
    try:
        fd = os.open(run_dir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield str(run_dir / FILE)
        return
    try:
        yield f"/proc/self/fd/{fd}/{FILE}"
    finally:
        os.close(fd)


def encode(sight: Sight) -> str:
    """As JSON."""
    return json.dumps(
        {
            "plans": [asdict(plan) for plan in sight.plans.values()],
            "numbers": [[*door, number] for door, number in sight.numbers.items()],
            "flows": [asdict(flow) for flow in sight.flows],
        }
    )


def decode(text: str) -> Sight:
    """The reverse; raises ValueError."""
    found = json.loads(text)
    plans = [_plan(each) for each in found["plans"]]
    return Sight(
        {plan.key: plan for plan in plans},
        {DoorId(_plan_key(key), name): number for key, name, number in found["numbers"]},
        tuple(_flow(each) for each in found["flows"]),
    )


def _plan_key(parts: Any) -> PlanKey:
    (namespace, name, port, protocol), family = parts
    return PlanKey(ServicePortName(namespace, name, port, Protocol(protocol)), Family(family))


def _frontend_key(parts: Iterable[Any]) -> FrontendKey:
    address, port, protocol = parts
    return FrontendKey(address, port, Protocol(protocol))


def _plan(fields: dict[str, Any]) -> ServicePlan:
    return ServicePlan(
        _plan_key(fields["key"]),
        tuple(_frontend(each) for each in fields["frontends"]),
        tuple(Backend(**each) for each in fields["backends"]),
        fields["has_endpoints"],
        fields["affinity_s"],
    )


def _frontend(fields: dict[str, Any]) -> Frontend:
    ranges = fields["source_ranges"]
    return Frontend(
        _frontend_key(fields["key"]),
        FrontendKind(fields["kind"]),
        Sources(fields["local_for"]),
        Sources(fields["masquerade_for"]),
        None if ranges is None else tuple(ranges),
    )


def _flow(fields: dict[str, Any]) -> FlowView:
    frontend = _frontend_key(fields.pop("frontend"))
    family = Family(fields.pop("family"))
    return FlowView(**fields, frontend=frontend, family=family)
