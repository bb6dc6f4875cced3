"""What needs all privileges before an agent may serve: BPF file system, connection tracking."""

from __future__ import annotations

from pathlib import Path

from ebpf_svc.config import Settings
from ebpf_svc.errors import UnsupportedHost
from ebpf_svc.log import get_logger

OOM_SCORE = Path("/proc/self/oom_score_adj")

log = get_logger(__name__)


def prepare(settings: Settings, *, strict: bool) -> None:
    """Make the machine ready; what is in order already is left as it is.

    Args:
        settings: where the BPF file system is to be, and what connection tracking gets (S1-S6).
        strict: whatever cannot be done is an error, as for `--init-only` (S10); else what another
            network namespace than the machine's own lacks is only logged.

    Raises:
        UnsupportedHost: something cannot be done, with what would mend it.
    """
    mount_bpffs(settings)
    set_up_conntrack(settings, strict=strict)


def mount_bpffs(settings: Settings) -> None:
    """Have a BPF file system where maps and programs are to be; raises UnsupportedHost."""
    from ebpf_svc.host.mounts import ensure_bpffs  # noqa: PLC0415  # not for other dataplanes

    path = settings.ebpf.bpffs
    try:
        ensure_bpffs(path)
    except PermissionError:
        raise
    except OSError as error:
        raise UnsupportedHost([f"{path}: {error.strerror} (mount -t bpf bpf {path})"]) from error


def set_up_conntrack(settings: Settings, *, strict: bool) -> None:
    """Give connection tracking what the settings say (S1-S6); as `prepare`."""
    from ebpf_svc.host import conntrack  # noqa: PLC0415  # not for dataplanes in memory

    failures = conntrack.set_up(settings.conntrack)
    fatal = [str(failure) for failure in failures if failure.fatal or strict]
    if fatal:
        raise UnsupportedHost(fatal)
    for failure in failures:
        log.warning("conntrack.refused", field=failure.setting, reason=failure.reason)


def set_oom_score(score: int) -> None:
    """Tell the kernel how soon to end this process when memory ends (S9)."""
    try:
        OOM_SCORE.write_text(str(score))
    except OSError as error:
        log.info("agent.oom-score", path=str(OOM_SCORE), error=error.strerror)
