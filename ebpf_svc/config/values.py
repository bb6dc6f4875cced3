"""Words and units of configuration files: Go's durations, host:port, prefixes, field names.

Owns how values are spelt; which of them a setting takes is `settings.py`'s.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainValidator,
    TypeAdapter,
)
from pydantic_core import PydanticCustomError

from ebpf_svc.model.net import canonical_address, canonical_prefix

_UNITS_NS = {
    "ns": 1,
    "us": 1_000,
    "µs": 1_000,
    "μs": 1_000,
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "m": 60 * 1_000_000_000,
    "h": 3600 * 1_000_000_000,
}
_PART = re.compile(r"(\d+\.?\d*|\.\d+)(ns|us|µs|μs|ms|s|m|h)")
_UPPER = {"cidr": "CIDR", "cidrs": "CIDRs", "ip": "IP", "ips": "IPs", "lb": "LB"} | {
    word: word.upper() for word in ("arp", "dsr")
}
NODE_PORT_WORDS = frozenset({"primary", "localhost", "all"})
"""Words `node_port_addresses` takes besides prefixes (A5, Q3)."""
_YES_OR_NO = TypeAdapter(bool)


class Section(BaseModel):
    """Settings that belong together; a field that is not known is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def file_name(field: str) -> str:
    """How a field is spelt in a file of kind: `cluster_cidrs` is clusterCIDRs.

    A unit at the end goes, since there durations carry their own: `resync_period_s` is
    resyncPeriod.
    """
    first, *others = field.removesuffix("_s").split("_")
    return first + "".join(_UPPER.get(word, word.capitalize()) for word in others)


def parse_duration(text: str) -> float:
    """Seconds of a Go duration such as `1h0m0s`, `250ms` or `-1.5s`; a bare 0 needs no unit.

    Raises:
        ValueError: it is none.
    """
    sign = -1 if text.startswith("-") else 1
    rest = text[1:] if text[:1] in ("+", "-") else text
    if rest == "0":
        return 0.0
    total_ns, end = 0.0, 0
    while match := _PART.match(rest, end):
        total_ns += float(match[1]) * _UNITS_NS[match[2]]
        end = match.end()
    if not rest or end != len(rest):
        raise ValueError(f"{text!r} is not a duration")
    return sign * total_ns / 1e9


def format_duration(seconds: float) -> str:
    """Print seconds as Go does: `1h0m0s`, `1.5s`, `250ms`, `0s`."""
    nanoseconds = round(abs(seconds) * 1e9)
    sign = "-" if seconds < 0 and nanoseconds else ""
    if nanoseconds == 0:
        return "0s"
    if nanoseconds < _UNITS_NS["s"]:
        unit = next(unit for unit in ("ms", "µs", "ns") if nanoseconds >= _UNITS_NS[unit])
        return f"{sign}{_decimal(nanoseconds, _UNITS_NS[unit])}{unit}"
    minutes, rest = divmod(nanoseconds, _UNITS_NS["m"])
    hours, minutes = divmod(minutes, 60)
    words = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{sign}{words}{_decimal(rest, _UNITS_NS['s'])}s"


def _decimal(value: int, unit: int) -> str:
    """Exactly value / unit, without trailing zeros."""
    whole, rest = divmod(value, unit)
    digits = f"{rest:0{len(str(unit)) - 1}d}".rstrip("0")
    return f"{whole}.{digits}" if digits else str(whole)


def split_host_port(text: str) -> tuple[str, int]:
    """The address and port of `10.0.0.1:80` or `[fd00::1]:80`.

    Raises:
        ValueError: it is neither, or the port is not 1..65535.
    """
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    address = host[1:-1] if bracketed else host
    if not colon or bracketed != (":" in address):
        raise ValueError(f"{text!r} is not IP:port")
    ipaddress.ip_address(address)
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise ValueError(f"{port!r} is not a port")
    return address, int(port)


def with_port(text: str, port: int) -> str:
    """Append a port to a bare address; anything else comes back as it is, right or wrong."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return text
    return f"[{text}]:{port}" if address.version == 6 else f"{text}:{port}"


def wrong(expected: str) -> PydanticCustomError:
    """The error of a validator, in the words that stand after `expected`."""
    # Braces would be taken for placeholders of the message.
    return PydanticCustomError("setting", "{expected}", {"expected": expected})


def _seconds(value: Any) -> float:
    expected = "seconds, or a duration such as 30s or 1h0m0s"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong(expected)
    try:
        number = float(value)
    except ValueError:
        try:
            number = parse_duration(str(value))
        except ValueError:
            raise wrong(expected) from None
    if not math.isfinite(number):
        raise wrong(expected)
    return number


def _checked(parse: Callable[[str], Any], expected: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        try:
            return str(parse(text))
        except ValueError:
            raise wrong(expected) from None

    return check


def _all_or_inside(value: Any) -> bool | tuple[str, ...]:
    expected = "true, false, or prefixes such as [203.0.113.0/24]"
    try:
        if isinstance(value, list | tuple):
            return tuple(canonical_prefix(text) for text in value)
        return _YES_OR_NO.validate_python(value)
    except (ValueError, AttributeError):
        raise wrong(expected) from None


def listen_at(default_port: int) -> Callable[[str], str]:
    """A validator of `IP:port`; a bare address gets that port, and nothing means: do not listen."""

    def check(text: str) -> str:
        address = with_port(text, default_port)
        try:
            if address:
                split_host_port(address)
        except ValueError:
            raise wrong(
                f"an IP and port such as 0.0.0.0:{default_port}, or nothing for no server"
            ) from None
        return address

    return check


Seconds = Annotated[float, BeforeValidator(_seconds)]
"""Seconds as a number, or a Go duration."""
Prefix = Annotated[str, AfterValidator(_checked(canonical_prefix, "a prefix such as 10.0.0.0/8"))]
"""A prefix, canonical."""
Address = Annotated[str, AfterValidator(_checked(canonical_address, "an IP address"))]
"""An address, canonical."""
AllOrInside = Annotated[bool | tuple[str, ...], PlainValidator(_all_or_inside)]
"""Whether addresses are allowed: all, none, or those inside canonical prefixes."""
NodePortAddress = Annotated[
    str,
    AfterValidator(
        _checked(
            lambda text: text if text in NODE_PORT_WORDS else canonical_prefix(text),
            "a prefix such as 10.0.0.0/8, or one of primary, localhost, all",
        )
    ),
]
"""What selects addresses for node ports."""
