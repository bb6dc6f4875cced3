"""What is called: `ADDRESS:PORT[/protocol]`, or a Service by name."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ebpf_svc.errors import ConfigError
from ebpf_svc.model.desired import FrontendKey, FrontendKind
from ebpf_svc.model.net import Protocol, canonical_address
from ebpf_svc.status import NamedFrontend

EXAMPLE = "ADDRESS:PORT, [IPV6]:PORT, either with /udp or /sctp; or: svc NAMESPACE/NAME[:PORT]"
_AT = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([0-9.]+)):(\d{1,5})")
_SERVICE = re.compile(r"([^/:]+)/([^/:]+)(?::([^/:]+))?")


def parse(words: tuple[str, ...], names: Mapping[FrontendKey, NamedFrontend]) -> FrontendKey:
    """Read DST.

    Args:
        words: `10.96.0.1:80/udp`, or `svc` and `ns/name:port`.
        names: which frontends belong to which Service.

    Raises:
        ConfigError: it says nothing, or names a Service that is not served.
    """
    if len(words) == 2 and words[0] == "svc":
        return _service(words[1], names)
    if len(words) != 1:
        raise ConfigError("DST", got=" ".join(words) or None, expected=EXAMPLE)
    text, protocol = _protocol(words[0])
    match = _AT.fullmatch(text)
    if match is None or not 0 < int(match[3]) < 65536:
        raise ConfigError("DST", got=words[0], expected=EXAMPLE)
    try:
        address = canonical_address(match[1] or match[2])
    except ValueError as error:
        raise ConfigError("DST", got=words[0], expected=EXAMPLE) from error
    return FrontendKey(address, int(match[3]), protocol or Protocol.TCP)


def _protocol(word: str) -> tuple[str, Protocol | None]:
    text, slash, name = word.rpartition("/")
    if not slash or name.upper() not in Protocol.__members__:
        return word, None
    return text, Protocol(name.upper())


def _service(word: str, names: Mapping[FrontendKey, NamedFrontend]) -> FrontendKey:
    """The cluster IP of a service port, IPv4 first."""
    text, protocol = _protocol(word)
    match = _SERVICE.fullmatch(text)
    if match is None:
        raise ConfigError("DST", got=f"svc {word}", expected=EXAMPLE)
    namespace, name, port = match.groups()
    mine = {
        key: named
        for key, named in names.items()
        if (named.namespace, named.name) == (namespace, name)
        and named.kind is FrontendKind.CLUSTER_IP
    }
    found = sorted(
        (":" in key.address, key.port, key.protocol, key)
        for key, named in mine.items()
        if (port is None or port in (named.port, str(key.port)))
        and (protocol is None or protocol is key.protocol)
    )
    if not found:
        ports = sorted({f"{named.port or key.port}/{key.protocol}" for key, named in mine.items()})
        has = f"a port of it: {', '.join(ports)}" if ports else "a Service that is served here"
        raise ConfigError("DST", got=f"svc {word}", expected=has)
    return found[0][3]
