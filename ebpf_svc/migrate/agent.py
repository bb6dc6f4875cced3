"""Our agent, seen from the command that switches: does it serve, and what."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ebpf_svc.config import Settings
from ebpf_svc.errors import ConfigError, UnsupportedHost
from ebpf_svc.host.kubeproxy import has_our_rules
from ebpf_svc.host.lock import lock_holder
from ebpf_svc.host.nft import masquerade_rules
from ebpf_svc.migrate.rules import Served
from ebpf_svc.model.desired import FrontendKind
from ebpf_svc.status import SETTINGS, STATUS, read_json, read_names

POLL_S = 0.2
START_IT = "ebpf-svc run …, or deploy its DaemonSet"


@dataclass(frozen=True, slots=True)
class AgentView:
    """What an agent that serves has written about itself."""

    pid: int
    served: frozenset[Served]
    failed: tuple[str, ...]
    """Service ports it could not write, with reasons."""


def is_running(run_dir: Path) -> bool:
    """Whether an agent holds that directory, one in another container included."""
    if lock_holder(run_dir) is not None:
        return True
    try:
        fd = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # The kernel's list of locks leaves out who is in another pid namespace: try instead.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def await_agent(settings: Settings, wait_s: float) -> AgentView:
    """Wait until an agent serves here.

    Raises:
        UnsupportedHost: none did within `wait_s` seconds; says what to run.
    """
    deadline = time.monotonic() + wait_s
    while True:
        status: Mapping[str, Any] = read_json(settings.run_dir / STATUS) or {}
        running = is_running(settings.run_dir)
        if running and status.get("ready"):
            return view_of(settings.run_dir, status)
        if time.monotonic() >= deadline:
            break
        time.sleep(POLL_S)
    if running:
        raise UnsupportedHost([f"the agent in {settings.run_dir} is not ready yet: try --wait 60"])
    raise UnsupportedHost([f"no agent runs in {settings.run_dir}: start it first ({START_IT})"])


def view_of(run_dir: Path, status: Mapping[str, Any]) -> AgentView:
    """Read what an agent serves, or did when it ended."""
    served = {
        ("" if name.kind is FrontendKind.NODE_PORT else key.address, key.port, key.protocol.value)
        for key, name in read_names(run_dir).items()
    }
    failed = tuple(f"{each['service']}: {each['reason']}" for each in status.get("failed", ()))
    return AgentView(int(status.get("pid", 0)), frozenset(served), failed)


def settings_of_agent(settings: Settings) -> Settings:
    """The settings of the agent that serves or served in that run directory; else those given.

    A command that is told only where the agent lives must still know the devices it attached to.

    Raises:
        ConfigError: another version wrote them, in a way this one does not read.
    """
    path = settings.run_dir / SETTINGS
    try:
        return Settings.model_validate_json(path.read_text())
    except FileNotFoundError:
        return settings
    except ValidationError as error:
        wrong = error.errors()[0]
        field = ".".join(map(str, wrong["loc"]))
        raise ConfigError(f"{path}: {field}", got=wrong["input"], expected=wrong["msg"]) from error


def keeps_nat(settings: Settings) -> bool:
    """Whether rules of ours with NAT are there; raises CommandError."""
    # Not for everybody who asks for an agent: it takes the relay along.
    from ebpf_svc.dataplane.userspace.steering import is_led_by_netfilter  # noqa: PLC0415

    return (
        has_our_rules(settings.families)
        or masquerade_rules(1 << settings.masquerade_bit).exists()
        or is_led_by_netfilter()
    )
