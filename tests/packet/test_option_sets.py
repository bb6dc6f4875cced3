"""Whatever a node's settings are, the programs they compile to pass this kernel's verifier."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ebpf_svc.config import EbpfSettings
from ebpf_svc.dataplane.ebpf import compiler, tables
from ebpf_svc.dataplane.ebpf.programs import Programs
from ebpf_svc.dataplane.ebpf.tables import Tables
from ebpf_svc.host import bpf_prog
from ebpf_svc.model.net import Family
from tests.lib.kernel import running_kernel
from tests.lib.option_sets import COVERING, OPTION_SETS, defines

pytestmark = pytest.mark.root


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in COVERING else pytest.mark.verifies)
        for name in OPTION_SETS
    ],
)
def test_programs_of_every_option_set_pass_the_verifier(
    name: str,
    artifact_cache: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """The kernel takes each program of both families; the results tell their sizes."""
    artifacts = compiler.obtain(
        tuple(Family), artifact_cache, extra_defines=defines(name, running_kernel())
    )
    settings = EbpfSettings(bpffs=tmp_path / "bpf", flow_entries=1024, affinity_entries=256)
    opened = Tables.open(settings, artifacts)
    try:
        programs = Programs.load(artifacts, {family: opened.fds(family) for family in artifacts})
        try:
            for program in programs:
                facts = bpf_prog.facts(program.fd)
                sizes = {"count": facts.instruction_count, "verified": facts.verified_count}
                record_property(f"program {program.kernel_name}", sizes)
        finally:
            programs.close()
    finally:
        opened.close()
        tables.remove_pins(settings)
