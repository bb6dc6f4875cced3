"""The sentences an API server answers with when a field is wrong, and the checks of single values.

`Faults` collects all of an object's, each with its field's path. The wording is the API server's,
so that what a user finds by searching for it applies.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Collection, Iterable, Mapping

from pydantic import ValidationError

from ebpf_svc.model.net import Family, canonical_address, canonical_prefix

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?\Z")
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?\Z")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*\Z")
_LABEL_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?\Z")

_LABEL_RULE = (
    "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must"
    " start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for"
    " validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
)
_DNS_1035_RULE = (
    "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an"
    " alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123',"
    " regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')"
)
_SUBDOMAIN_RULE = (
    "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.',"
    " and must start and end with an alphanumeric character (e.g. 'example.com', regex used for"
    r" validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
)
_LABEL_VALUE_RULE = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.',"
    " and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or"
    " '12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
)
_KEY_NAME = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]\Z")
_KEY_NAME_RULE = (
    "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end"
    " with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for"
    " validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')"
)
_PORT_RULE = "must be between 1 and 65535, inclusive"
_ADDRESS_RULE = "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"
_PREFIX_RULE = "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)"

_SPECIAL = ("0.0.0.0", "127.", "169.254.", "224.0.0.", "::", "fe8", "fe9", "fea", "feb", "ff02:")

_TYPES = {
    "string_type": "a string",
    "int_type": "an integer",
    "bool_type": "a boolean",
    "list_type": "a list",
    "dict_type": "an object",
}


class Fault(Exception):
    """One wrong field: a path and what an API server says about it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field, self.message = field, message


class Faults(list[Fault]):
    """The wrong fields of one object, in the order they were found."""

    def add(self, field: str, message: str) -> None:
        self.append(Fault(field, message))

    def required(self, field: str, detail: str = "") -> None:
        self.append(Fault(field, f"Required value: {detail}" if detail else "Required value"))

    def invalid(self, field: str, value: object, detail: str) -> None:
        self.append(Fault(field, f"Invalid value: {_shown(value)}: {detail}"))

    def duplicate(self, field: str, value: object) -> None:
        self.append(Fault(field, f"Duplicate value: {_shown(value)}"))

    def forbidden(self, field: str, detail: str) -> None:
        self.append(Fault(field, f"Forbidden: {detail}"))

    def supported(self, field: str, value: str, supported: Collection[str]) -> bool:
        """Check membership; words are listed in alphabetical order, as the API does."""
        if value in supported:
            return True
        said = ", ".join(_shown(word) for word in sorted(supported))
        self.append(Fault(field, f"Unsupported value: {_shown(value)}: supported values: {said}"))
        return False

    def shape(self, error: ValidationError) -> None:
        """Take over what pydantic found: values of the wrong type."""
        seen: dict[str, tuple[object, list[str]]] = {}
        for detail in error.errors(include_url=False, include_context=False):
            where = [part for part in detail["loc"] if part not in ("int", "str")]
            # Both branches of a union report; they are one fault.
            _, kinds = seen.setdefault(path_of(where), (detail["input"], []))
            kinds.append(_TYPES.get(detail["type"], detail["msg"]))
        for field, (value, kinds) in seen.items():
            self.invalid(field, value, f"must be {' or '.join(dict.fromkeys(kinds))}")

    def label(self, field: str, value: str) -> None:
        """A DNS-1123 label: namespaces, port names."""
        self._pattern(field, value, 63, _LABEL, _LABEL_RULE)

    def dns_1035(self, field: str, value: str) -> None:
        """A DNS-1035 label: names of Services."""
        self._pattern(field, value, 63, _DNS_1035, _DNS_1035_RULE)

    def subdomain(self, field: str, value: str) -> None:
        """A DNS-1123 subdomain: names of other objects."""
        self._pattern(field, value, 253, _SUBDOMAIN, _SUBDOMAIN_RULE)

    def labels(self, field: str, labels: Mapping[str, str]) -> None:
        """Keys and values of a selector."""
        for key, value in labels.items():
            prefix, slash, name = key.rpartition("/")
            if slash:
                self._pattern(field, prefix, 253, _SUBDOMAIN, _SUBDOMAIN_RULE)
            self._pattern(field, name, 63, _KEY_NAME, _KEY_NAME_RULE)
            self._pattern(field, value, 63, _LABEL_VALUE, _LABEL_VALUE_RULE)

    def port(self, field: str, value: int) -> None:
        if not 1 <= value <= 65535:
            self.invalid(field, value, _PORT_RULE)

    def port_name(self, field: str, value: str) -> None:
        """An IANA_SVC_NAME (RFC 6335): at most 15 of letters, digits and single inner hyphens."""
        if len(value) > 15:
            self.invalid(field, value, "must be no more than 15 characters")
        if not re.fullmatch(r"[-a-z0-9]+", value):
            rule = "must contain only alpha-numeric characters (a-z, 0-9), and hyphens (-)"
            self.invalid(field, value, rule)
        if not re.search(r"[a-z]", value):
            self.invalid(field, value, "must contain at least one letter (a-z)")
        if "--" in value:
            self.invalid(field, value, "must not contain consecutive hyphens")
        if value.startswith("-") or value.endswith("-"):
            self.invalid(field, value, "must not begin or end with a hyphen")

    def address(self, field: str, text: str) -> str:
        """The address in canonical form, or "" when it is none."""
        try:
            return parse_address(text)
        except ValueError:
            self.invalid(field, text, _ADDRESS_RULE)
            return ""

    def endpoint_address(self, field: str, text: str) -> str:
        """An address traffic may be sent to; "" when it is not."""
        address = self.address(field, text)
        if address and (rule := _special(address)):
            self.invalid(field, text, rule)
            return ""
        return address

    def prefix(self, field: str, text: str) -> str:
        """The prefix in canonical form, or "" when it is none."""
        try:
            # Python would take a netmask after the slash too.
            if not text.rpartition("/")[2].strip().isdecimal():
                raise ValueError(text)
            return canonical_prefix(text)
        except ValueError:
            self.invalid(field, text, _PREFIX_RULE)
            return ""

    def _pattern(
        self, field: str, value: str, longest: int, pattern: re.Pattern[str], rule: str
    ) -> None:
        if len(value) > longest:
            self.invalid(field, value, f"must be no more than {longest} characters")
        if not pattern.match(value):
            self.invalid(field, value, rule)


def path_of(parts: Iterable[str | int]) -> str:
    """A field path as the API prints it: `spec.ports[1].name`."""
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def parse_address(text: str) -> str:
    """Canonical form of an address.

    Raises:
        ValueError: it is no address.
    """
    # The C library answers for nearly all in a fraction of a microsecond; manifests hold many.
    try:
        if ":" not in text:
            socket.inet_pton(socket.AF_INET, text)
            return text
        address = socket.inet_ntop(socket.AF_INET6, socket.inet_pton(socket.AF_INET6, text))
    except OSError:
        if "%" in text or text != text.strip():
            raise ValueError(f"{text!r} is not a valid IP address") from None
        return canonical_address(text)
    if "." in address:
        # The API is written in Go, to which a v4-mapped address is the IPv4 address itself.
        mapped = address.removeprefix("::ffff:")
        return mapped if mapped != address else canonical_address(text)
    return address


def usable_address(text: str) -> str:
    """What `Faults.endpoint_address` answers, without saying why not."""
    try:
        address = parse_address(text)
    except ValueError:
        return ""
    return "" if _special(address) else address


def family_named(name: str) -> Family:
    """`IPv4`, `IPv6` of the API as a family; raises KeyError for any other word."""
    return {"IPv4": Family.V4, "IPv6": Family.V6}[name]


def _special(address: str) -> str:
    """Why an endpoint or external IP may not have this address; empty = it may."""
    if not address.startswith(_SPECIAL):
        return ""
    if address in ("0.0.0.0", "::"):
        return f"may not be unspecified ({address})"
    if address.startswith("127.") or address == "::1":
        return "may not be in the loopback range (127.0.0.0/8, ::1/128)"
    if address.startswith(("169.254.", "fe8", "fe9", "fea", "feb")):
        return "may not be in the link-local range (169.254.0.0/16, fe80::/10)"
    if address.startswith(("224.0.0.", "ff02:")):
        return "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)"
    return ""


def _shown(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), default=str, ensure_ascii=False)
