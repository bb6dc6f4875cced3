"""Maglev tables by machine code: the same tables, and Python's where there is no compiler."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ebpf_svc.dataplane.ebpf import maglev_native
from ebpf_svc.dataplane.ebpf.maglev import SIZES, fill_in_python, table
from ebpf_svc.dataplane.ebpf.maglev_native import WORTH_IT_SLOTS, NativeFill

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler (gcc)")
BIG = next(size for size in SIZES if size >= WORTH_IT_SLOTS)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> NativeFill:
    fill = NativeFill(tmp_path_factory.mktemp("cache"))
    table(["a"], BIG, "", fill=fill)  # from now on small tables take this way too
    return fill


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(st.text(max_size=20), min_size=1, max_size=40, unique=True),
    size=st.sampled_from((41, 251, 1_021, BIG)),
    seed=st.text(max_size=80),
)
def test_table_is_the_same_slot_by_slot(
    native: NativeFill, names: list[str], size: int, seed: str
) -> None:
    """A node with a compiler and one without send a client to the same backend."""
    assert table(names, size, seed, fill=native) == table(names, size, seed, fill=fill_in_python)


def test_full_table_has_one_slot_for_each(native: NativeFill) -> None:
    """As many backends as slots: the last turn takes the last slot."""
    names = [str(n) for n in range(251)]
    assert sorted(table(names, 251, "s", fill=native)) == list(range(251))


def test_code_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart finds it in the cache, without a compiler."""
    table(["a", "b"], BIG, "", fill=NativeFill(tmp_path))
    (built,) = tmp_path.iterdir()
    assert built.name == maglev_native.file_name()
    monkeypatch.setattr(maglev_native, "COMPILERS", ())
    monkeypatch.setattr(maglev_native, "fill_in_python", None)
    assert len(table(["a", "b"], BIG, "", fill=NativeFill(tmp_path))) == BIG


def test_small_tables_start_no_compiler(tmp_path: Path) -> None:
    """Most clusters never need one."""
    table(["a", "b"], 251, "", fill=NativeFill(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("compilers", [(), ("false",)])
def test_without_a_compiler_python_fills_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compilers: tuple[str, ...]
) -> None:
    """None at all, or one that fails."""
    monkeypatch.setattr(maglev_native, "COMPILERS", compilers)
    filled = table(["a", "b"], BIG, "", fill=NativeFill(tmp_path))
    assert filled == table(["a", "b"], BIG, "")


def test_code_that_others_can_write_is_not_loaded(tmp_path: Path) -> None:
    """What lies in a folder open to everybody may be anybody's."""
    bad = tmp_path / maglev_native.file_name()
    bad.write_bytes(b"not an object file")
    bad.chmod(0o666)
    assert table(["a", "b"], BIG, "", fill=NativeFill(tmp_path)) == table(["a", "b"], BIG, "")
    assert not bad.stat().st_mode & 0o022  # compiled anew


def test_broken_code_in_the_cache_is_no_failure(tmp_path: Path) -> None:
    """A file cut short by a full disk: Python fills the table."""
    bad = tmp_path / maglev_native.file_name()
    bad.write_bytes(b"")
    assert table(["a", "b"], BIG, "", fill=NativeFill(tmp_path)) == table(["a", "b"], BIG, "")
