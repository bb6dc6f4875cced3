"""What a guest has to do before the command, whichever machine it is."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
GUEST_OUT = "/mnt"
"""Where the guest has its `out` folder: outside the repository, which is hidden by its copy."""

SCRIPT = """\
#!/bin/bash
# Written by tests.vm: what the guest does first, then the command.
touch {out}/begun
exec >{out}/output 2>&1
set -e
{before}
mkdir -p {repository}
mount -t tmpfs -o size=50% tmpfs {repository}
tar -C {repository} -xf {out}/repository.tar
{after}
mkdir -p {venv}
mount --bind {kept_venv} {venv}
[ -e {repository}/.venv ] || ln -s {venv} {repository}/.venv
cp -r {artifacts} /tmp/artifacts
mkdir -p {out}/test-logs
ln -s {out}/test-logs {repository}/test-logs
mkdir -p /sys/fs/bpf
mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf
ip link set lo up
cd {repository}
set +e
env {environment} {command}
echo $? >{out}/status
{end}
"""


@dataclass(frozen=True, slots=True)
class Setup:
    """A machine's own part of it; lines of a shell."""

    before: Sequence[str]
    """File systems, modules."""
    venv: str
    """Where the environment is found, which the copy of the repository may hide."""
    after: Sequence[str] = ()
    """Once the repository is there."""
    environment: Mapping[str, str] = field(default_factory=dict)
    end: str = ""

    def script(self, command: Sequence[str], artifacts: Path) -> str:
        """All of it: compiled programs are in `artifacts`, then comes the command."""
        environment = {
            "EBPF_SVC_ARTIFACTS": "/tmp/artifacts",
            "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/tmp",
            "LC_ALL": "C.UTF-8",
            **self.environment,
        }
        return SCRIPT.format(
            out=GUEST_OUT,
            before="\n".join(self.before),
            after="\n".join(self.after),
            end=self.end,
            repository=shlex.quote(str(REPOSITORY)),
            artifacts=shlex.quote(str(artifacts)),
            venv=shlex.quote(str(Path(sys.prefix).resolve())),
            kept_venv=shlex.quote(self.venv),
            environment=shlex.join(f"{name}={value}" for name, value in environment.items()),
            command=shlex.join(command),
        )
