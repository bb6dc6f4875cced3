"""`ebpf-svc config` as a user meets it, and `run --write-config-to`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ebpf_svc.cli import cleanup, main
from ebpf_svc.config import Settings
from tests.unit.config.kube import kube_proxy, load_text, ours

Output = pytest.CaptureFixture[str]


def call(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(words)
    return int(end.value.code or 0)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(
        kube_proxy(mode="ipvs", configSyncPeriod="9m", clusterCIDR="10.0.0.0/8")
        + "---\n"
        + ours(ebpf={"socketLB": "hostOnly"})
    )
    return str(path)


def test_show_says_what_is_in_force_and_who_gave_it(file: str, capsys: Output) -> None:
    """Each setting with its origin, each field of kube-proxy's with what became of it."""
    assert call("config", "show", "--config", file, "--node-name", "a") == 0
    out, err = capsys.readouterr()
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in out.splitlines() if line}
    assert rows["ebpf.socketLB"] == f"hostOnly {file}: ebpf.socketLB"
    assert rows["nodeName"] == "a --node-name"
    assert rows["resyncPeriod"] == "30s default"
    assert rows["clusterCIDR"] == f"10.0.0.0/8 honoured clusterCIDRs {file}: clusterCIDR"
    assert rows["configSyncPeriod"].startswith("9m0s ignored ")
    assert "configSyncPeriod: ignored: " in err


def test_show_given_leaves_out_defaults(file: str, capsys: Output) -> None:
    """What somebody decided, on one screen."""
    call("config", "show", "--given", "--config", file)
    settings = capsys.readouterr().out.partition("\n\n")[0].splitlines()[1:]
    assert [line.split()[0] for line in settings] == [
        *("mode", "fallback", "kubeProxyMode", "clusterCIDRs", "ebpf.socketLB")
    ]


def test_show_as_json_is_one_object(file: str, capsys: Output) -> None:
    """For scripts: values with their origins."""
    call("config", "show", "--json", "--config", file)
    shown = json.loads(capsys.readouterr().out)
    assert shown["settings"]["clusterCIDRs"] == {
        "value": ["10.0.0.0/8"],
        "from": f"{file}: clusterCIDR",
    }
    assert shown["settings"]["ebpf.maglev"] == {"value": True, "from": "default"}
    assert {row["field"]: row["here"] for row in shown["kubeProxy"]} == {
        "mode": "different",
        "configSyncPeriod": "ignored",
        "clusterCIDR": "honoured",
    }


def test_validate_of_a_good_file_exits_zero(file: str, capsys: Output) -> None:
    """And names what has no effect."""
    assert call("config", "validate", "--config", file) == 0
    out, err = capsys.readouterr()
    assert out.startswith("valid: 5 of ")
    assert "configSyncPeriod" in err


def test_validate_of_a_bad_file_lists_everything_wrong(tmp_path: Path, capsys: Output) -> None:
    """Exit code 2, a line for each."""
    path = tmp_path / "bad.yaml"
    path.write_text(kube_proxy(mode="x", oomScoreAdj=5000))
    assert call("config", "validate", "--config", str(path)) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == (
        f"ebpf-svc: {path}: mode: got 'x', expected one of \"\", iptables, ipvs, nftables"
    )
    assert errors[1] == f"ebpf-svc: {path}: oomScoreAdj: got 5000, expected -1000..1000"


def test_defaults_are_a_file_to_begin_with(tmp_path: Path, capsys: Output) -> None:
    """Every setting with its meaning above it; as it is, it changes nothing."""
    call("config", "defaults")
    text = capsys.readouterr().out
    assert load_text(tmp_path, text).settings == Settings()
    assert "# Honour spec.externalIPs" in text


def test_defaults_of_kube_proxy_are_its_file(tmp_path: Path, capsys: Output) -> None:
    """What kube-proxy would do, for comparison."""
    call("config", "defaults", "--kube-proxy")
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["iptables"]["minSyncPeriod"] == "1s"
    load_text(tmp_path, text)


def test_run_writes_the_effective_settings_and_exits(
    tmp_path: Path, file: str, capsys: Output
) -> None:
    """Z9: the file holds what files and flags came to."""
    written = tmp_path / "out.yaml"
    assert call("run", "--config", file, "-v=5", "--write-config-to", str(written)) == 0
    settings = load_text(tmp_path, written.read_text()).settings
    assert settings.log.level == "debug"
    assert settings.cluster_cidrs == ("10.0.0.0/8",)


def test_run_says_what_it_ignores(tmp_path: Path, file: str, capsys: Output) -> None:
    """In its log, before it does anything."""
    call("run", "--config", file, "--write-config-to", str(tmp_path / "out.yaml"))
    (line,) = capsys.readouterr().err.splitlines()
    assert "config.ignored" in line
    assert "configSyncPeriod" in line


def test_run_cleanup_is_cleanup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kube-proxy's --cleanup (Z4), with the place the agent's own flags name."""
    seen: list[Settings] = []

    def remove(settings: Settings) -> tuple[list[str], list[str]]:
        seen.append(settings)
        return [], []

    monkeypatch.setattr(cleanup, "_remove", remove)
    place = ("--run-dir", str(tmp_path / "run"), "--bpffs", str(tmp_path))
    assert call("run", "--cleanup", "--proxy-mode=ipvs", *place) == 0
    assert [settings.ebpf.bpffs for settings in seen] == [tmp_path]
