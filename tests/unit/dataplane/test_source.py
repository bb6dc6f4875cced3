"""Joining C sources: every header once, order kept, errors naming the file they are in."""

from __future__ import annotations

from pathlib import Path

import pytest

from ebpf_svc.dataplane.ebpf import source


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_h", ".h").replace("_c", ".c")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def test_header_included_twice_appears_once(tmp_path):
    """`#pragma once` means the same when headers are joined."""
    write(
        tmp_path,
        a_c='#include "lib/x.h"\nint a;\n',
        b_c='#include "lib/x.h"\nint b;\n',
        lib__x_h="#pragma once\nint x;\n",
    )

    text = source.join([tmp_path / "a.c", tmp_path / "b.c"], tmp_path)

    assert text.count("int x;") == 1
    assert "#pragma" not in text
    assert text.index("int x;") < text.index("int a;") < text.index("int b;")


def test_every_line_keeps_file_and_number(tmp_path):
    """A compiler error names the header and line a person would open."""
    write(
        tmp_path,
        a_c='/* 1 */\n#include "lib/x.h"\nint line3;\n',
        lib__x_h='#include "y.h"\nint line2;\n',
        lib__y_h="int line1;\n",
    )

    where, position = {}, ("", 0)
    for line in source.join([tmp_path / "a.c"], tmp_path).splitlines():
        if line.startswith("#line"):
            _, number, name = line.split()
            position = (name.strip('"'), int(number))
            continue
        if line.startswith("int "):
            where[line] = position
        position = (position[0], position[1] + 1)

    assert where == {
        "int line1;": ("lib/y.h", 1),
        "int line2;": ("lib/x.h", 2),
        "int line3;": ("a.c", 3),
    }


def test_system_includes_come_first_and_once_unless_conditional(tmp_path):
    """Ours cannot disturb the kernel's headers; an include under #if stays under it."""
    write(
        tmp_path,
        a_c="#include <linux/in.h>\nint a;\n#if X\n#include <linux/ipv6.h>\n#endif\n",
        b_c="#include <linux/in.h>\nint b;\n",
    )

    lines = source.join([tmp_path / "a.c", tmp_path / "b.c"], tmp_path).splitlines()

    assert lines[0] == "#include <linux/in.h>"
    assert lines.count("#include <linux/in.h>") == 1
    assert lines[lines.index("#if X") + 1] == "#include <linux/ipv6.h>"


def test_missing_header_is_named_with_its_includer(tmp_path):
    """A typo in an include says where it stands."""
    write(tmp_path, a_c='int a;\n#include "lib/nowhere.h"\n')

    with pytest.raises(FileNotFoundError, match=r'a\.c:2: no file for #include "lib/nowhere\.h"'):
        source.join([tmp_path / "a.c"], tmp_path)


def test_our_sources_join_without_a_project_include_left():
    """The unit is one text: BCC rewrites map calls in the main file only."""
    text = source.unit_text()

    assert '#include "' not in text
    assert "int pod_ingress(" in text
    assert "int connect(" in text
