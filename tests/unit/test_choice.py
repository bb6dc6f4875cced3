"""Which dataplane serves, and what is said of those that cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from ebpf_svc import choice as module
from ebpf_svc.choice import Site, candidates
from ebpf_svc.config import Mode, Settings
from ebpf_svc.errors import DataplaneError, UnsupportedHost
from ebpf_svc.host.lock import DirectoryLock
from tests.lib.dataplanes import Machine

ALL = ("ebpf", "nftables", "ipvs", "iptables", "userspace")


@pytest.fixture(autouse=True)
def _touch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mount_bpffs", "set_oom_score"):
        monkeypatch.setattr(module, name, lambda argument: None)
    monkeypatch.setattr(module, "set_up_conntrack", lambda settings, strict: None)
    monkeypatch.setattr(module, "MODES", ALL)


@pytest.fixture
def machine() -> Machine:
    return Machine()


def site(machine: Machine, tmp_path: Path, **settings: object) -> Site:
    options = {"ebpf": {"bpffs": tmp_path / "bpf"}, "run_dir": tmp_path / "run", **settings}
    return Site(Settings.model_validate(options), machine.make)


@pytest.mark.parametrize(
    ("mode", "fallback", "tried"),
    [
        ("auto", False, ALL),
        ("ebpf", False, ("ebpf",)),
        ("ebpf", True, ALL),
        ("ipvs", True, ("ipvs", "iptables", "ebpf", "nftables", "userspace")),
        ("nftables", True, ("nftables", "ipvs", "iptables", "ebpf", "userspace")),
        ("userspace", True, ("userspace", "ebpf", "nftables", "ipvs", "iptables")),
        ("fake", True, ("fake",)),
    ],
)
def test_modes_are_tried_in_order_of_preference(
    mode: str, fallback: bool, tried: tuple[str, ...]
) -> None:
    """A named mode falls back to what is next to it, and to relaying only where nothing else is."""
    assert candidates(Settings(mode=Mode(mode), fallback=fallback), ALL) == tried


def test_first_that_opens_serves_and_the_others_are_not_touched(
    machine: Machine, tmp_path: Path
) -> None:
    """The usual start pays for no probe of another mode."""
    chosen = site(machine, tmp_path).open_first(ALL)
    assert (chosen.dataplane.name, chosen.refused) == ("ebpf", {})
    assert machine.log == ["ebpf open"]


def test_each_refusal_is_told_with_its_reason(machine: Machine, tmp_path: Path) -> None:
    """One warning a mode, so that an operator sees what would make a better one run."""
    machine.lacks = {"ebpf": "BTF: not there", "nftables": "nft: not installed"}
    with capture_logs() as lines:
        chosen = site(machine, tmp_path).open_first(ALL)
    assert chosen.dataplane.name == "ipvs"
    assert chosen.refused == machine.lacks
    assert [(line["log_level"], line["event"], line["mode"], line["reason"]) for line in lines] == [
        ("warning", "mode.refused", "ebpf", "BTF: not there"),
        ("warning", "mode.refused", "nftables", "nft: not installed"),
    ]


def test_named_mode_that_cannot_run_says_what_is_missing(machine: Machine, tmp_path: Path) -> None:
    """And nothing else is tried: whoever names a mode may have a reason."""
    machine.lacks = {"ipvs": "ip_vs: no such module (modprobe ip_vs)"}
    with pytest.raises(UnsupportedHost, match=r"^ip_vs: no such module"):
        site(machine, tmp_path).open_first(("ipvs",))
    assert machine.log == ["ipvs open"]


def test_no_mode_at_all_is_told_mode_by_mode(machine: Machine, tmp_path: Path) -> None:
    """Every reason at once: the operator mends the cheapest."""
    machine.lacks = {"nftables": "no nft", "iptables": "no iptables"}
    with pytest.raises(UnsupportedHost) as caught:
        site(machine, tmp_path).open_first(("nftables", "iptables"))
    assert caught.value.missing == ("mode nftables: no nft", "mode iptables: no iptables")


def test_machine_another_agent_uses_is_no_reason_to_fall_back(
    machine: Machine, tmp_path: Path
) -> None:
    """Two agents of two modes on one node would be worse than one."""
    (tmp_path / "bpf").mkdir()
    with DirectoryLock(tmp_path / "bpf"), pytest.raises(UnsupportedHost, match="another agent"):
        site(machine, tmp_path).prepare(ALL)


def test_mode_in_memory_touches_nothing(machine: Machine, tmp_path: Path) -> None:
    """Tests of the agent need no privileges."""
    site(machine, tmp_path).prepare(("fake",))
    assert not (tmp_path / "bpf").exists()


def test_leftovers_are_those_of_modes_that_hold_something(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what serves nor what left nothing; one that cannot tell is passed over (Z3)."""
    key = object()
    machine.held = {mode: {key: key} for mode in ("ebpf", "nftables", "iptables", "userspace")}  # type: ignore[dict-item]
    parts = module.holds_anything

    def holds(dataplane: object) -> bool:
        if dataplane.name == "userspace":  # type: ignore[attr-defined]
            raise DataplaneError("the kernel is silent")
        return parts(dataplane)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "holds_anything", holds)
    found = site(machine, tmp_path).leftovers(but=["nftables"])
    assert [dataplane.name for dataplane in found] == ["ebpf", "iptables"]
