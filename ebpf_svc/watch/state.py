"""The file that remembers allocations across restarts.

Replaced atomically, so that a crash leaves the old or the new one. One line a Service: it is meant
to be read, compared and, with the agent stopped, edited by people too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ebpf_svc.errors import WatchError
from ebpf_svc.model.net import family_of
from ebpf_svc.model.service import ServiceName
from ebpf_svc.watch.allocate import Holding
from ebpf_svc.watch.faults import parse_address

FILE_NAME = "allocations.json"


class _Held(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    cluster_ips: list[str] = []
    node_ports: dict[str, int] = {}
    health_check_node_port: int = 0


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    version: Literal[1]
    services: dict[str, _Held]


def load(path: Path) -> dict[ServiceName, Holding]:
    """Read what was saved; nothing when there is no file.

    Raises:
        WatchError: the file is there but cannot be used.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise WatchError(f"{path}: {error.strerror}") from error
    try:
        return _usable(_File.model_validate_json(text))
    except (ValidationError, ValueError) as error:
        raise WatchError(f"{path} is damaged: {error}") from error


def _usable(file: _File) -> dict[ServiceName, Holding]:
    """Take the record over; what two Services hold at once stays with the first."""
    holdings: dict[ServiceName, Holding] = {}
    ips: set[str] = set()
    ports: dict[int, str] = {}
    for key, held in sorted(file.services.items()):
        namespace, slash, name = key.partition("/")
        if not slash:
            raise ValueError(f"{key} is not namespace/name")
        addresses = tuple(a for a in map(parse_address, held.cluster_ips) if a not in ips)
        by_family = {family_of(address): address for address in reversed(addresses)}
        ips.update(by_family.values())
        mine = {k: p for k, p in held.node_ports.items() if ports.setdefault(p, key) == key}
        health = held.health_check_node_port
        if health and ports.setdefault(health, f"{key}#health") != f"{key}#health":
            health = 0
        kept = tuple(address for address in addresses if address in by_family.values())
        holdings[ServiceName(namespace, name)] = Holding(kept, tuple(mine.items()), health)
    return holdings


def save(path: Path, holdings: Mapping[ServiceName, Holding]) -> None:
    """Replace the file; durable when this returns.

    Raises:
        WatchError: the disk refuses.
    """
    lines = []
    for name, held in sorted(holdings.items()):
        entry: dict[str, object] = {}
        if held.cluster_ips:
            entry["cluster_ips"] = held.cluster_ips
        if held.node_ports:
            entry["node_ports"] = dict(held.node_ports)
        if held.health_check_node_port:
            entry["health_check_node_port"] = held.health_check_node_port
        lines.append(f"  {json.dumps(str(name))}: {json.dumps(entry)}")
    text = '{"version": 1, "services": {\n' + ",\n".join(lines) + "\n}}\n"
    new = path.with_suffix(".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        raise WatchError(f"{path}: {error.strerror}") from error
