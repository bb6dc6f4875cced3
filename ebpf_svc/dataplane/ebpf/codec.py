"""Bytes of the keys and values of one family's maps, by the layouts the compiler reported.

The names of the fields stand here; a C type that differs from them raises LayoutMismatch when the
codec is made, before anything is written.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Callable, Sequence
from functools import partial

from ebpf_svc.dataplane.ebpf.entries import FrontendValue
from ebpf_svc.dataplane.ebpf.layout import wire_port
from ebpf_svc.dataplane.ebpf.tables import FamilyTables
from ebpf_svc.dataplane.inspect import Traffic
from ebpf_svc.errors import LayoutMismatch
from ebpf_svc.model.desired import Backend, FrontendKey
from ebpf_svc.model.net import Family, Protocol

_AT = ("addr", "port", "proto")
_BACKEND = ("at_addr", "at_port", "at_proto", "service", "next", "flags")
_RANGE = ("prefix_bits", "ranges", "addr")
_SET_BITS = 32
"""A range key's prefix length counts the word that names the set."""


class _Ends(dict[tuple[int, int], bytes]):
    """What follows the address in an `l4_addr`, by port and protocol; made when first asked for."""

    def __init__(self, pack: Callable[..., bytes], no_address: bytes) -> None:
        super().__init__()
        self._pack, self._no_address = pack, no_address

    def __missing__(self, port_and_protocol: tuple[int, int]) -> bytes:
        port, protocol = port_and_protocol
        end = self._pack(self._no_address, wire_port(port), protocol)[len(self._no_address) :]
        self[port_and_protocol] = end
        return end


class Codec:
    """Packs and unpacks for one family."""

    def __init__(self, family: Family, tables: FamilyTables) -> None:
        """Bind to the layouts; raises LayoutMismatch."""
        self._af = socket.AF_INET if family is Family.V4 else socket.AF_INET6
        self.pton = partial(socket.inet_pton, self._af)
        at, backend = tables.frontends.key, tables.backends.value
        self.at_raw, self._at_layout = at.packer(*_AT), at
        """Packs an `l4_addr` of what a struct holds: address in bytes, port in wire order."""
        tables.backend_index.key.require(*_AT)
        tables.service_counters.value.require(*Traffic._fields)
        self._backend, self._backend_layout = backend.packer(*_BACKEND), backend
        self._frontend = tables.frontends.value.packer(*FrontendValue._fields)
        self._frontend_layout = tables.frontends.value
        self._range_layout = tables.source_ranges.key
        self._range = self._range_layout.packer(*_RANGE)
        self._word = tables.backend_index.value.packer("value")
        self.at_size = at.size
        self.next_offset = backend.offset("next")
        self.flags_offset = backend.offset("flags")
        self._no_address = self.pton("0.0.0.0" if family is Family.V4 else "::")
        self._ends = _Ends(self.at_raw, self._no_address)
        probe = self.at_raw(self._no_address, 1, 2)
        if self._backend(self._no_address, 1, 2, 3, 4, 5) != probe + self.tail(3, 4, 5):
            raise LayoutMismatch(backend.name, kernel=backend.fields, python="its l4_addr first")

    def at(self, address: str, port: int, protocol: int) -> bytes:
        """An `l4_addr`: the key of a frontend, and of a backend in the index."""
        return self.at_raw(self.pton(address), wire_port(port), protocol)

    def ats(self, backends: Sequence[Backend], protocol: int) -> list[bytes]:
        """`at` of each endpoint of a service port."""
        pton, ends = self.pton, self._ends
        return [pton(each.address) + ends[each.port, protocol] for each in backends]

    def tail(self, service: int, following: int, flags: int) -> bytes:
        """What follows `at` in a `backend_value`; `following` is the next backend of its chain."""
        whole = self._backend(self._no_address, 0, 0, service, following, flags)
        return whole[self.at_size :]

    def key(self, frontend: FrontendKey) -> bytes:
        return self.at(frontend.address, frontend.port, frontend.protocol.number)

    def protocol(self, at: bytes) -> int:
        """The protocol number in an `l4_addr`."""
        return int(self._at_layout.unpack_raw(at)[2])

    def frontend_key(self, at: bytes | memoryview) -> FrontendKey:
        """Read an `l4_addr`; raises KeyError for a protocol that is none of the model's."""
        addr, port, protocol = self._at_layout.unpack_raw(at)
        return FrontendKey(
            socket.inet_ntop(self._af, addr), wire_port(port), Protocol.from_number(protocol)
        )

    def readable(self, at: bytes) -> str:
        """An `l4_addr` for people, also one nobody of ours wrote."""
        try:
            return str(self.frontend_key(at))
        except KeyError:
            address, port = self.endpoint(at)
            return f"{address} port {port} protocol {self.protocol(at)}"

    def frontend(self, value: FrontendValue) -> bytes:
        return self._frontend(*value)

    def frontend_value(self, data: bytes) -> FrontendValue:
        return FrontendValue._make(self._frontend_layout.unpack_raw(data))

    def endpoint(self, data: bytes | memoryview, offset: int = 0) -> tuple[str, int]:
        """Address and port of a `backend_value` or an `l4_addr`."""
        addr, port, _ = self._at_layout.unpack_raw(data, offset)
        return socket.inet_ntop(self._af, addr), wire_port(port)

    def backend_words(self, data: bytes | memoryview, offset: int = 0) -> tuple[int, int, int]:
        """Service, next backend and flags of a `backend_value`."""
        _, _, _, service, next_id, flags = self._backend_layout.unpack_raw(data, offset)
        return service, next_id, flags

    def range_key(self, set_id: int, prefix: str) -> bytes:
        """A key of the source range trie; `prefix` as `ADDRESS/LENGTH`."""
        address, _, length = prefix.partition("/")
        return self._range(_SET_BITS + int(length), set_id, self.pton(address))

    def prefix(self, key: bytes) -> tuple[int, str]:
        """Set and prefix of a key of the source range trie."""
        bits, set_id, addr = self._range_layout.unpack_raw(key)
        return set_id, f"{ipaddress.ip_address(addr)}/{bits - _SET_BITS}"

    def word(self, number: int) -> bytes:
        """A map value that is one number."""
        return self._word(number)


def number(data: bytes) -> int:
    """Read a map value that is one number."""
    return int(struct.unpack("=I", data)[0])
