"""What a compile leaves behind: instructions and the shape of every map, without the compiler.

A file is one digest line and one JSON document; a reader trusts it only if the digest fits.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
"""Raise it when the file's content changes meaning: older files are then compiled anew."""

LAYOUT_FIELDS = ("type", "flags", "key_size", "value_size", "key_desc", "value_desc")
"""What of a MapShape the digest covers; sizes in entries may differ from run to run."""

_LOAD_MAP_FD = (0x18, 1)  # BPF_LD | BPF_IMM | BPF_DW with src_reg = BPF_PSEUDO_MAP_FD


@dataclass(frozen=True, slots=True)
class MapShape:
    """A map as the C declares it; how large it is, is tables.py's to say."""

    type: int
    flags: int
    key_size: int
    value_size: int
    key_desc: str
    """BCC's JSON for the key's C type."""
    value_desc: str
    max_entries: int


@dataclass(frozen=True, slots=True)
class Program:
    """One program; `relocations` names the map whose descriptor belongs at an instruction."""

    instructions: bytes
    relocations: tuple[tuple[int, str], ...]

    def relocated(self, fds: Mapping[str, int]) -> bytes:
        """The instructions with map descriptors filled in; KeyError for a map without one."""
        code = bytearray(self.instructions)
        for index, name in self.relocations:
            struct.pack_into("=i", code, index * 8 + 4, fds[name])
        return bytes(code)


@dataclass(frozen=True, slots=True)
class Artifact:
    """Everything compiled from one unit."""

    programs: Mapping[str, Program]
    maps: Mapping[str, MapShape]

    def layout_digest(self) -> bytes:
        """32 bytes that change when any map's type, size or C layout does."""
        facts = sorted(
            [name, *(getattr(shape, field) for field in LAYOUT_FIELDS)]
            for name, shape in self.maps.items()
        )
        return hashlib.sha256(json.dumps(facts).encode()).digest()


def strip_descriptors(code: bytes, names: Mapping[int, str]) -> Program:
    """Replace the map descriptors of one process by names.

    Args:
        code: instructions as loaded by the process that owns the descriptors.
        names: descriptor -> map name in that process.
    """
    bare, relocations = bytearray(code), []
    index = 0
    while index < len(code) // 8:
        opcode, registers = code[index * 8], code[index * 8 + 1]
        if opcode == _LOAD_MAP_FD[0]:
            if registers >> 4 == _LOAD_MAP_FD[1]:
                fd = struct.unpack_from("=i", code, index * 8 + 4)[0]
                relocations.append((index, names[fd]))
                struct.pack_into("=i", bare, index * 8 + 4, 0)
            index += 1  # a 64-bit immediate takes two slots
        index += 1
    return Program(bytes(bare), tuple(relocations))


def source_key(text: str, defines: Mapping[str, str]) -> str:
    """What the output of a compile depends on besides the compiler, as hex."""
    sorted_defines = sorted(defines.items())
    return hashlib.sha256(json.dumps([FORMAT, text, sorted_defines]).encode()).hexdigest()


def write(artifact: Artifact, path: Path) -> None:
    """Store atomically: a reader sees the old file or the whole new one."""
    document = {
        "format": FORMAT,
        "programs": {
            name: [base64.b64encode(program.instructions).decode(), program.relocations]
            for name, program in artifact.programs.items()
        },
        "maps": {
            name: [getattr(shape, field) for field in MapShape.__slots__]
            for name, shape in artifact.maps.items()
        },
    }
    body = json.dumps(document).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".artifact-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read(path: Path) -> Artifact | None:
    """Load a file; None when it is missing, damaged or of another format."""
    try:
        digest, _, body = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    if hashlib.sha256(body).hexdigest().encode() != digest:
        return None
    try:
        document: dict[str, Any] = json.loads(body)
        if document["format"] != FORMAT:
            return None
        return Artifact(
            programs={
                name: Program(
                    base64.b64decode(code), tuple((int(i), str(of)) for i, of in relocations)
                )
                for name, (code, relocations) in document["programs"].items()
            },
            maps={name: MapShape(*fields) for name, fields in document["maps"].items()},
        )
    except (ValueError, KeyError, TypeError, binascii.Error):
        return None
