"""Finding what a compile takes, on machines of several distributions built as folders."""

from __future__ import annotations

import platform
import tarfile
from pathlib import Path

import pytest

from ebpf_svc.host import toolchain


def tree(path: Path, *, generated: bool = True) -> Path:
    (path / "include/linux").mkdir(parents=True)
    if generated:
        (path / "include/generated").mkdir()
        (path / "include/generated/autoconf.h").touch()
    return path


def test_headers_of_the_running_kernel_come_first(tmp_path):
    """BCC finds those by itself: nothing is merged or named."""
    tree(tmp_path / "lib/modules/6.1.0-9/build")
    tree(tmp_path / "usr/src/linux-headers-7.0.0-1-amd64")

    found = toolchain.find_headers(tmp_path, "6.1.0-9")

    assert found is not None
    assert (found.trees, found.archive) == ((), None)
    assert toolchain.environment(found, tmp_path / "cache") == {}


@pytest.mark.parametrize(
    ("names", "merged"),
    [
        (("6.1.0-56-amd64", "6.1.0-56-common"), ("6.1.0-56-amd64", "6.1.0-56-common")),
        (("6.8.0-31-generic", "6.8.0-31"), ("6.8.0-31-generic", "6.8.0-31")),
        (("6.12.43+deb13-amd64", "6.12.43+deb13-common"),) * 2,
        (("5.10.0-9-amd64", "6.1.0-3-amd64", "6.1.0-21-amd64"), ("6.1.0-21-amd64",)),
        (("6.9.1-custom",), ("6.9.1-custom",)),
    ],
    ids=["debian", "ubuntu", "debian 13", "newest of three", "one whole tree"],
)
def test_newest_installed_headers_serve_another_kernel(tmp_path, names, merged):
    """Debian and Ubuntu split a tree in two; versions compare as numbers."""
    for name in names:
        is_common = name.endswith("-common") or name == "6.8.0-31"
        tree(tmp_path / "usr/src" / f"linux-headers-{name}", generated=not is_common)

    found = toolchain.find_headers(tmp_path, "0.0.0")

    assert found is not None
    assert [path.name for path in found.trees] == [f"linux-headers-{name}" for name in merged]


def test_headers_of_an_image_serve_where_the_node_has_none(tmp_path):
    """The node's own, mounted over the image's /usr/src, come first."""
    brought = tree(tmp_path / "usr/local/src/linux-headers-6.1.0-56-image")

    found = toolchain.find_headers(tmp_path, "0.0.0")
    installed = tree(tmp_path / "usr/src/linux-headers-5.10.0-9-amd64")
    found_later = toolchain.find_headers(tmp_path, "0.0.0")

    assert found is not None
    assert found_later is not None
    assert (found.trees, found_later.trees) == ((brought,), (installed,))


def test_broken_build_link_does_not_count_as_headers(tmp_path):
    """Removing the header package leaves the link of the kernel package dangling."""
    modules = tmp_path / "lib/modules/6.1.0-9"
    modules.mkdir(parents=True)
    (modules / "build").symlink_to("/usr/src/nowhere")

    assert toolchain.find_headers(tmp_path, "6.1.0-9") is None


def test_split_trees_are_merged_with_links_in_the_cache(tmp_path):
    """BCC takes one tree; files of both halves are seen in it, the first half's first."""
    arch = {"x86_64": "x86", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    built = tree(tmp_path / "usr/src/linux-headers-6.1.0-56-amd64")
    common = tree(tmp_path / "usr/src/linux-headers-6.1.0-56-common", generated=False)
    (common / "include/linux/bpf.h").write_text("common")
    (built / "include/linux/version.h").write_text("built")
    (common / f"arch/{arch}/include/asm").mkdir(parents=True)
    (common / f"arch/{arch}/include/asm/types.h").write_text("asm")
    found = toolchain.find_headers(tmp_path, "0.0.0")
    assert found is not None

    place = Path(toolchain.environment(found, tmp_path / "cache")["BCC_KERNEL_SOURCE"])

    assert (place / "include/linux/bpf.h").read_text() == "common"
    assert (place / "include/linux/version.h").read_text() == "built"
    assert (place / "include/generated/autoconf.h").is_file()
    assert (place / f"arch/{arch}/include/asm/types.h").read_text() == "asm"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [place.name]


def test_archive_of_the_kernel_itself_is_unpacked_once(tmp_path):
    """CONFIG_IKHEADERS: no package needed, nothing left in /tmp."""
    archive = tmp_path / "sys/kernel/kheaders.tar.xz"
    archive.parent.mkdir(parents=True)
    tree(tmp_path / "content")
    with tarfile.open(archive, "w:xz") as tar:
        tar.add(tmp_path / "content/include", "include")

    found = toolchain.find_headers(tmp_path, "0.0.0")
    assert found is not None
    first = toolchain.environment(found, tmp_path / "cache")
    archive.unlink()
    second = toolchain.environment(found, tmp_path / "cache")

    assert first == second
    assert Path(first["BCC_KERNEL_SOURCE"], "include/generated/autoconf.h").is_file()


def test_failed_unpacking_leaves_no_tree_to_trust(tmp_path):
    """A full disk half-way must not make every later compile fail strangely."""
    archive = tmp_path / "kheaders.tar.xz"
    archive.write_bytes(b"not an archive")

    with pytest.raises(tarfile.ReadError):
        toolchain.environment(toolchain.Headers(origin="test", archive=archive), tmp_path / "cache")

    assert list((tmp_path / "cache").iterdir()) == []
