"""As much of an NFS server (RFC 1813, RFC 5531) as a kernel needs to mount it and to ask how large
it is. It says the size it was given, so a client can tell which server answered.

    python -m tests.lib.nfs_server PORT SIZE_MIB
"""

from __future__ import annotations

import socket
import socketserver
import struct
import sys
from collections.abc import Iterator

MOUNT, NFS = 100_005, 100_003
REPLY, ACCEPTED, SUCCESS = 1, 0, 0
PROCEDURE_UNAVAILABLE = 3
OK = struct.pack(">I", 0)
NO_ATTRIBUTES = struct.pack(">I", 0)
LAST_FRAGMENT = 1 << 31
AUTH_SYS, DIRECTORY = 1, 2
HANDLE = b"root"
TRANSFER_BYTES, LARGEST_BYTES = 32_768, 1 << 40


def _attributes() -> bytes:
    """fattr3 of the root directory."""
    plain = struct.pack(">IIIIIQQIIQQ", DIRECTORY, 0o755, 2, 0, 0, 4096, 4096, 0, 0, 1, 1)
    return plain + bytes(24)  # three times


def _answers(size_bytes: int) -> dict[tuple[int, int], bytes]:
    """(program, procedure) -> what it returns, whatever it is asked."""
    transfers = [TRANSFER_BYTES, TRANSFER_BYTES, 4096] * 2 + [TRANSFER_BYTES]
    return {
        (MOUNT, 0): b"",
        (MOUNT, 1): OK + struct.pack(">I4sII", len(HANDLE), HANDLE, 1, AUTH_SYS),
        (MOUNT, 3): b"",
        (NFS, 0): b"",
        (NFS, 1): OK + _attributes(),
        (NFS, 4): OK + NO_ATTRIBUTES + struct.pack(">I", 0x3F),
        (NFS, 18): OK + NO_ATTRIBUTES + struct.pack(">6QI", *[size_bytes] * 3, *[1000] * 3, 0),
        (NFS, 19): OK + NO_ATTRIBUTES + struct.pack(">7IQIII", *transfers, LARGEST_BYTES, 0, 1, 8),
        (NFS, 20): OK + NO_ATTRIBUTES + struct.pack(">6I", 1, 255, 1, 1, 0, 1),
    }


class Server(socketserver.ThreadingTCPServer):
    """Answers on a port, both families."""

    address_family = socket.AF_INET6
    allow_reuse_address = daemon_threads = True

    def __init__(self, port: int, size_bytes: int) -> None:
        self.answers = _answers(size_bytes)
        super().__init__(("::", port), _Calls)


class _Calls(socketserver.StreamRequestHandler):
    """The calls of one connection."""

    server: Server

    def handle(self) -> None:
        for call in self._records():
            xid, _, _, program, _, procedure = struct.unpack_from(">6I", call)
            found = self.server.answers.get((program, procedure))
            status = SUCCESS if found is not None else PROCEDURE_UNAVAILABLE
            # The verifier is none, of no bytes.
            reply = struct.pack(">6I", xid, REPLY, ACCEPTED, 0, 0, status) + (found or b"")
            self.wfile.write(struct.pack(">I", LAST_FRAGMENT | len(reply)) + reply)

    def _records(self) -> Iterator[bytes]:
        record = b""
        while len(head := self.rfile.read(4)) == 4:
            (mark,) = struct.unpack(">I", head)
            record += self.rfile.read(mark & ~LAST_FRAGMENT)
            if mark & LAST_FRAGMENT:
                yield record
                record = b""


if __name__ == "__main__":
    port, size_mib = map(int, sys.argv[1:])
    Server(port, size_mib << 20).serve_forever()
