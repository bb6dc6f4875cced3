"""Read and write kernel settings below /proc/sys.

The kernel answers for the network namespace of the calling thread.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/proc/sys")


def read(name: str) -> str | None:
    """The value of a setting like `net/ipv4/ip_forward`; None when this kernel does not have it."""
    try:
        return (ROOT / name).read_text().strip()
    except FileNotFoundError:
        return None


def write(name: str, value: str) -> bool:
    """Set a setting unless it has that value already.

    Returns:
        Whether it had to be changed.

    Raises:
        OSError: the kernel does not have it or refuses the value.
    """
    path = ROOT / name
    if path.read_text().strip() == value:
        return False
    path.write_text(value)
    return True
