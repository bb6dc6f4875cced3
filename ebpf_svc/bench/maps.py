"""The real maps, as an agent makes them, without programs or devices; root."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ebpf_svc.config import EbpfSettings
from ebpf_svc.dataplane.ebpf import compiler, constants, tables
from ebpf_svc.dataplane.ebpf.artifact import Artifact
from ebpf_svc.dataplane.ebpf.forwarding import Forwarding
from ebpf_svc.dataplane.ebpf.tables import Tables
from ebpf_svc.model.net import Family


@contextmanager
def fresh_maps(artifacts: dict[Family, Artifact], folder: Path) -> Iterator[Forwarding]:
    """Fresh maps of an agent's default sizes, gone afterwards."""
    settings = EbpfSettings(bpffs=folder / "bpf")
    opened = Tables.open(settings, artifacts)
    try:
        forwarding = Forwarding(opened, settings)
        forwarding.adopt()
        yield forwarding
    finally:
        opened.close()
        tables.remove_pins(settings)


def artifacts_in(cache_dir: Path) -> dict[Family, Artifact]:
    """The compiled units that describe the maps, from that cache or compiled into it."""
    node = {
        family: constants.node_defines(family, cluster_cidrs=(), translate_pods=True, kernel=(6, 1))
        for family in Family
    }
    return compiler.obtain(tuple(Family), cache_dir, extra_defines=node)
