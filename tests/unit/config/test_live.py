"""What a running agent takes on, and printing settings."""

from __future__ import annotations

from pathlib import Path

from ebpf_svc.config import DetectLocal, EbpfSettings, LogSettings, Settings
from ebpf_svc.config.given import leaves
from ebpf_svc.config.live import LIVE_FIELDS, changes, take_live
from ebpf_svc.config.reference import fill
from ebpf_svc.config.write import as_yaml, docstrings
from tests.unit.config.kube import load_text

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_live_fields_exist() -> None:
    """A renamed field must not fall silently out of the list."""
    assert set(leaves()) >= LIVE_FIELDS


def test_changes_are_parted_into_live_and_restart() -> None:
    """An operator is told which of the edits waits for a restart."""
    old = Settings()
    new = Settings(
        node_port_addresses=("primary",),
        log=LogSettings(level="debug"),
        oom_score_adj=0,
        ebpf=EbpfSettings(maglev=False),
    )
    assert changes(old, new) == (
        ("node_port_addresses", "log.level"),
        ("oom_score_adj", "ebpf.maglev"),
    )
    assert changes(old, old) == ((), ())


def test_live_changes_are_taken_and_the_rest_stays() -> None:
    """What is in force afterwards differs from the new file in just what needs a restart."""
    old = Settings()
    new = Settings(masquerade_all=True, log=LogSettings(level="debug"), run_dir=Path("/x"))
    taken = take_live(old, new)
    assert changes(old, taken).restart_needed == ()
    assert changes(taken, new) == ((), ("run_dir",))


def test_written_settings_are_read_back(tmp_path: Path) -> None:
    """`--write-config-to`, with and without comments."""
    settings = Settings(
        cluster_cidrs=("10.244.0.0/16", "fd00::/56"),
        min_sync_period_s=0.0015,
        node_name="no",
        kubernetes={"kubeconfig": "/etc/a: b", "node_wait_s": 90},
        detect_local=DetectLocal(interface_name_prefix="pod"),
        metrics_bind_address="",
        allow_external_ips=("203.0.113.0/24",),
        ebpf=EbpfSettings(cgroup_root=Path("/c"), socket_lb="hostOnly"),
    )
    assert load_text(tmp_path, as_yaml(settings)).settings == settings
    assert load_text(tmp_path, as_yaml(settings, comments=True)).settings == settings


def test_every_setting_says_what_it_is() -> None:
    """Unit, default and why stand in its docstring."""
    settings = Settings()
    for path in leaves():
        *sections, name = path.split(".")
        section = getattr(settings, sections[0]) if sections else settings
        assert docstrings(type(section)).get(name), path


def test_page_is_up_to_date() -> None:
    """python -m ebpf_svc.config.reference docs/configuration.md writes it."""
    page = PAGE.read_text()
    assert fill(page) == page
    assert "clientConnection.kubeconfig" in page
    assert "ebpf.socketLB" in page
