"""How values are spelt: durations, addresses with ports, names of fields."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebpf_svc.config.values import (
    file_name,
    format_duration,
    parse_duration,
    split_host_port,
    with_port,
)

DURATIONS = {
    "1h0m0s": 3600.0,
    "24h0m0s": 86400.0,
    "30s": 30.0,
    "1m30s": 90.0,
    "250ms": 0.25,
    "1.5s": 1.5,
    "100µs": 0.0001,
    "1ns": 1e-9,
    "0s": 0.0,
    "-2m0s": -120.0,
}


@pytest.mark.parametrize(("text", "seconds"), DURATIONS.items())
def test_go_duration_is_read_and_printed_as_go_prints_it(text: str, seconds: float) -> None:
    """What kube-proxy writes is what we write."""
    assert parse_duration(text) == pytest.approx(seconds)
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "seconds"),
    {"0": 0, "+5s": 5, "1h15m30.918s": 4530.918, ".5s": 0.5, "1m90s": 150, "100us": 1e-4}.items(),
)
def test_other_spellings_of_go_are_read(text: str, seconds: float) -> None:
    """All that Go's ParseDuration takes."""
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "30", "30 s", "1d", "1h1", "-", "1.s.", "s30"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    """A number without unit could be anything."""
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


@given(st.integers(min_value=0, max_value=10**17))
def test_every_duration_survives_being_printed(nanoseconds: int) -> None:
    """Printed and read again, to the nanosecond's rounding of a float."""
    seconds = nanoseconds / 1e9
    assert parse_duration(format_duration(seconds)) == pytest.approx(seconds, rel=1e-12)


def test_address_and_port_are_parted() -> None:
    """An IPv6 address stands in brackets."""
    assert split_host_port("127.0.0.1:80") == ("127.0.0.1", 80)
    assert split_host_port("[::1]:10256") == ("::1", 10256)


@pytest.mark.parametrize(
    "text",
    [
        "127.0.0.1",
        "::1:80",
        "[::1]",
        ":80",
        "localhost:80",
        "1.2.3.4:0",
        "1.2.3.4:65536",
        "1.2.3.4:x",
    ],
)
def test_what_is_no_address_and_port_is_refused(text: str) -> None:
    """K2: an IP and a port 1..65535."""
    with pytest.raises(ValueError, match=r"."):
        split_host_port(text)


def test_port_joins_a_bare_address_only() -> None:
    """Appended if missing; anything else is left for its check."""
    assert with_port("::", 10256) == "[::]:10256"
    assert with_port("0.0.0.0", 10256) == "0.0.0.0:10256"
    assert with_port("0.0.0.0:1", 10256) == "0.0.0.0:1"
    assert with_port("nonsense", 10256) == "nonsense"


@pytest.mark.parametrize(
    ("field", "name"),
    {
        "cluster_cidrs": "clusterCIDRs",
        "allow_external_ips": "allowExternalIPs",
        "socket_lb": "socketLB",
        "resync_period_s": "resyncPeriod",
        "oom_score_adj": "oomScoreAdj",
        "mode": "mode",
    }.items(),
)
def test_field_is_spelt_as_kubernetes_spells(field: str, name: str) -> None:
    """Camel case, initials in capitals; a duration carries its own unit."""
    assert file_name(field) == name
