"""Compile here what guests will load: LLVM takes a hundred times as long under emulation."""

from __future__ import annotations

from pathlib import Path

from ebpf_svc.dataplane.ebpf import compiler
from ebpf_svc.model.net import Family
from tests.lib.option_sets import OPTION_SETS, defines
from tests.vm.kernels import CACHE, USER_MODE, Kernel


def prepare(kernel: Kernel) -> Path:
    """A cache with the programs of every option set for that kernel, compiled where missing."""
    folder = CACHE / "artifacts" / kernel.name.removesuffix(USER_MODE)
    for name in OPTION_SETS:
        compiler.obtain(tuple(Family), folder, extra_defines=defines(name, kernel.version))
    return folder
