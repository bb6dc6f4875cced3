"""Walking a ring: records of any length, some thrown away, one still being written."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from ebpf_svc.host.ringbuf import RingBuffer

PAGE, SIZE = mmap.PAGESIZE, 4 * mmap.PAGESIZE
BUSY, DISCARDED = 1 << 31, 1 << 30


@dataclass
class Ring:
    """A file laid out as a ring map is: the consumer's page, the producer's, the data."""

    fd: int
    produced: int = 0

    def write(self, data: bytes, flags: int = 0) -> None:
        """What the kernel does for a program."""
        record = struct.pack("=II", len(data) | flags, 0) + data
        os.pwrite(self.fd, record, 2 * PAGE + self.produced)
        self.produced += (len(record) + 7) & ~7
        os.pwrite(self.fd, struct.pack("=Q", self.produced), PAGE)

    def finish(self, at: int, data: bytes) -> None:
        """The program is done with its record."""
        os.pwrite(self.fd, struct.pack("=II", len(data), 0) + data, 2 * PAGE + at)

    @property
    def consumed(self) -> int:
        return int(struct.unpack("=Q", os.pread(self.fd, 8, 0))[0])


@pytest.fixture
def ring() -> Iterator[Ring]:
    fd = os.memfd_create("ring")
    os.truncate(fd, 2 * PAGE + 2 * SIZE)
    yield Ring(fd)
    os.close(fd)


def test_records_of_any_length_are_read_in_order(ring: Ring) -> None:
    """Each begins at a multiple of eight; what was read is given back."""
    reader = RingBuffer(ring.fd, SIZE)
    sent = [bytes([number]) * number for number in (1, 7, 8, 9, 30)]
    for data in sent:
        ring.write(data)
    assert list(reader.read()) == sent
    assert ring.consumed == ring.produced
    assert list(reader.read()) == []
    reader.close()


def test_discarded_records_are_passed_over(ring: Ring) -> None:
    """A program that changed its mind."""
    reader = RingBuffer(ring.fd, SIZE)
    for data, flags in ((b"one", 0), (b"never", DISCARDED), (b"two", 0)):
        ring.write(data, flags)
    assert list(reader.read()) == [b"one", b"two"]
    reader.close()


def test_record_being_written_is_waited_for(ring: Ring) -> None:
    """And those behind it: the order is that of their beginning."""
    reader = RingBuffer(ring.fd, SIZE)
    ring.write(b"one")
    at = ring.produced
    ring.write(b"slow", BUSY)
    ring.write(b"three")
    assert list(reader.read()) == [b"one"]
    assert ring.consumed == at
    ring.finish(at, b"slow")
    assert list(reader.read()) == [b"slow", b"three"]
    reader.close()


def test_skipping_counts_what_it_throws_away(ring: Ring) -> None:
    """For a new listener, who is not told of before."""
    reader = RingBuffer(ring.fd, SIZE)
    for data in (b"a", b"b", b"c"):
        ring.write(data)
    assert reader.skip() == 3
    assert list(reader.read()) == []
    reader.close()
