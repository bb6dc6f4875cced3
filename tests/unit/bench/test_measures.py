"""Which figures a run takes, and what one sample says."""

from __future__ import annotations

import pytest

from ebpf_svc.bench import generator, measures
from ebpf_svc.bench.generator import GeneratorError, Outcome
from ebpf_svc.bench.measures import MEASURES
from ebpf_svc.bench.population import Population
from ebpf_svc.model.net import Family

_BY_KEY = {measure.key: measure for measure in MEASURES}


def _outcome(**fields: int) -> Outcome:
    usual = {
        "done": 1_000, "errors": 0, "bytes": 0, "elapsed_ns": 200_000_000, "cpu_ns": 100_000_000,
        "user_ns": 0, "p50_ns": 7_000, "p99_ns": 9_000, "p999_ns": 20_000,
    }  # fmt: skip
    return Outcome(**{**usual, **fields}, histogram=((100, 2), (1_000_000, 1)))


def test_rate_is_told_per_second_of_cpu() -> None:
    """Half of the CPU went to others: the way costs what it costs."""
    assert _BY_KEY["connect"].value(_outcome()) == 10_000
    assert _BY_KEY["bulk"].value(_outcome(bytes=1_250_000_000)) == 100
    assert _BY_KEY["udp"].value(_outcome()) == 7


def test_everything_is_measured_at_one_size_and_the_rest_where_it_scales() -> None:
    """Numbers of services meet what depends on them; backends are varied once."""
    steps = list(measures.steps((10_000, 1, 100), full_at=100))
    at = {
        count: [s.measure.key for s in steps if s.services == count] for count in (1, 100, 10_000)
    }
    assert at[1] == at[10_000] == ["connect", "udp", "first"]
    assert set(at[100]) == set(_BY_KEY)
    assert [s.backends for s in steps if s.services == 100 and s.measure.key == "connect"] == [
        1, 10, 1_000,
    ]  # fmt: skip
    assert [s.services for s in steps] == sorted(s.services for s in steps)


def test_wanted_measures_alone_are_taken() -> None:
    """A single question is answered quickly."""
    steps = list(measures.steps((1, 100), full_at=100, wanted=["bulk"]))
    assert [(s.measure.key, s.services) for s in steps] == [("bulk", 100)]


def test_direct_goes_to_the_backend_and_others_to_the_service() -> None:
    """Same host, same program, other address."""
    direct = _BY_KEY["connect"].order(10, direct=True)
    ours = _BY_KEY["connect"].order(10, direct=False)
    assert (direct.address, direct.port) == ("10.244.128.1", 8080)
    assert (ours.address, ours.port) == ("10.111.248.10", 80)
    far = _BY_KEY["nodeport-far"].order(1, direct=False)
    assert (far.address, far.port) == ("192.168.100.11", 30081)


def test_every_address_is_of_the_family_that_is_asked_for() -> None:
    """Service, backend and node; what is asked directly is behind the service, too."""
    connect, far = _BY_KEY["connect"], _BY_KEY["nodeport-far"]
    direct = connect.order(1_000, direct=True, family=Family.V6)
    ours = connect.order(1_000, direct=False, family=Family.V6)
    assert (direct.address, ours.address) == ("fd00:10:244:80::1", "fd00:10:96::f:3e8")
    assert far.order(1, direct=True, family=Family.V6).address == "fd00:10:244:90::1"
    assert far.order(1, direct=False, family=Family.V6).address == "fd00:192:168:100::11"
    services, slices = (
        [each for each in Population(2, 1, Family.V6).objects() if each["kind"] == kind]
        for kind in ("Service", "EndpointSlice")
    )
    assert [each["spec"]["clusterIP"] for each in services] == ["fd00:10:96::1", "fd00:10:96::2"]
    assert {each["addressType"] for each in slices} == {"IPv6"}
    assert slices[1]["endpoints"][0]["addresses"] == ["fd00:10:128::2"]


def test_histograms_of_all_rounds_become_one() -> None:
    """Counts are kept, steps get coarser."""
    figure = measures.figure(next(measures.steps((1,), full_at=1)))
    measures.summarize(figure, _BY_KEY["connect"], {"ebpf": [_outcome(), _outcome()]})
    assert sum(count for _, count in figure.histograms["ebpf"]) == 6
    assert figure.details["ebpf"]["wall_per_s"] == 5_000
    assert figure.details["ebpf"]["cpu_us"] == 100


@pytest.mark.parametrize(("done", "errors"), [(0, 0), (100, 2)])
def test_failed_exchanges_are_no_figure(done: int, errors: int) -> None:
    """A variant that does not answer must not look quick."""
    said = {"done": done, "errors": errors}
    with pytest.raises(GeneratorError):
        generator.outcome(said, 0)


@pytest.mark.parametrize(
    ("others_ns", "p50_ns", "cpu_ns"), [(30, 7, 80), (None, 7, 70), (None, 0, 200)]
)
def test_median_exchange_stands_for_cpu_time_nobody_counts(
    others_ns: int | None, p50_ns: int, cpu_ns: int
) -> None:
    """A kernel that runs as a process counts in ticks, and a sample would come to none; what is
    streamed has no exchanges, only time that passed.
    """
    said = {"done": 10, "errors": 0, "bytes": 0, "elapsed_ns": 200, "cpu_ns": 50, "user_ns": 0}
    said |= {"p50_ns": p50_ns, "p99_ns": 9, "p999_ns": 20}
    assert generator.outcome({**said, "histogram": []}, others_ns).cpu_ns == cpu_ns
