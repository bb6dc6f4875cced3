"""Settings from a file and from options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ebpf_svc.cli.settings import PLACE, SERVING, settings_from
from ebpf_svc.config import Settings, SocketLB
from ebpf_svc.errors import ConfigError
from ebpf_svc.model.net import Family


def load(tmp_path: Path, text: str, **options: Any) -> Settings:
    """The settings of that YAML text under those options."""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return settings_from({"config": path, **options})


def test_nothing_given_is_the_defaults() -> None:
    """Every field has a default that works on a common node."""
    assert settings_from({}) == Settings()


def test_empty_file_is_the_defaults(tmp_path: Path) -> None:
    """A file of comments is no error."""
    assert load(tmp_path, "# nothing yet\n") == Settings()


def test_file_sets_fields_of_both_levels(tmp_path: Path) -> None:
    """Fields are named as in config.py; what is not named keeps its default."""
    settings = load(
        tmp_path,
        "manifests: /etc/services\nfamilies: [4]\nebpf:\n  socket_lb: hostOnly\n",
    )
    assert settings.manifests == Path("/etc/services")
    assert settings.families == (Family.V4,)
    assert settings.ebpf.socket_lb is SocketLB.HOST_ONLY
    assert settings.ebpf.pod_devices == Settings().ebpf.pod_devices


def test_option_overrides_the_file(tmp_path: Path) -> None:
    """One field of a section is replaced; its neighbours stay."""
    settings = load(
        tmp_path,
        "resync_period_s: 5\nebpf:\n  bpffs: /a\n  cache_dir: /b\n",
        ebpf__bpffs="/c",
        families=("4", "6"),
        masquerade_all="true",
    )
    assert (settings.ebpf.bpffs, settings.ebpf.cache_dir) == (Path("/c"), Path("/b"))
    assert settings.families == (Family.V4, Family.V6)
    assert (settings.resync_period_s, settings.masquerade_all) == (5, True)


def test_settings_written_as_json_are_read_back(tmp_path: Path) -> None:
    """What pydantic prints is a configuration file."""
    settings = Settings(node_name="node1", cluster_cidrs=("10.244.0.0/16",))
    assert load(tmp_path, settings.model_dump_json(indent=2)) == settings


def test_unknown_field_is_named_with_those_there_are(tmp_path: Path) -> None:
    """A typing error is told with the place and the right spelling in sight."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "ebpf:\n  bpfs: /sys/fs/bpf\n")
    assert caught.value.path == f"{tmp_path / 'config.yaml'}: ebpf.bpfs"
    assert caught.value.got == "unknown field bpfs"
    assert "bpffs" in caught.value.expected


def test_wrong_value_of_an_option_names_the_option() -> None:
    """The user typed `--socket-lb`, not `ebpf.socket_lb`."""
    with pytest.raises(ConfigError) as caught:
        settings_from({"ebpf__socket_lb": "no"})
    error = caught.value
    assert (error.path, error.got) == ("--socket-lb", "no")
    assert error.expected == "'full', 'hostOnly' or 'off'"


def test_every_wrong_field_is_told_at_once(tmp_path: Path) -> None:
    """The first is the error, the others its notes."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, "resync_period_s: 0\nmasquerade_all: perhaps\n")
    text = " ".join([str(caught.value), *caught.value.__notes__])
    assert "resync_period_s: got 0, expected greater than 0" in text
    assert "masquerade_all: got 'perhaps'" in text


@pytest.mark.parametrize("text", ["a: [", "- a\n- b\n", "just words"])
def test_file_that_holds_no_settings_is_refused(tmp_path: Path, text: str) -> None:
    """Broken YAML and YAML of another shape are told apart from a wrong field."""
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load(tmp_path, text)


def test_section_that_is_no_section_is_refused(tmp_path: Path) -> None:
    """An option for a field of it must not hide that the file is wrong."""
    with pytest.raises(ConfigError, match="ebpf"):
        load(tmp_path, "ebpf: yes\n", ebpf__bpffs="/c")


def test_every_option_names_a_field() -> None:
    """An option whose field was renamed would be an error for every user of it."""
    for flag in (*PLACE, *SERVING):
        model: Any = Settings()
        for name in flag.field.split("."):
            model = getattr(model, name)
