"""The image file, read and not run: what a reviewer would look for each time."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from dockerfile_parse import DockerfileParser

from ebpf_svc import __version__
from tests.deploy.conftest import DEPLOY

ROOT = DEPLOY.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def parsed() -> Any:
    """The Dockerfile."""
    return DockerfileParser(str(DEPLOY / "Dockerfile"))


def _instructions(parsed: Any, name: str) -> list[str]:
    return [each["value"] for each in parsed.structure if each["instruction"] == name]


def _last_stage(parsed: Any) -> list[dict[str, Any]]:
    starts = [i for i, each in enumerate(parsed.structure) if each["instruction"] == "FROM"]
    return list(parsed.structure[starts[-1] :])


def test_base_is_debian_slim_by_name_and_never_latest(parsed):
    """One base for all stages, so that the interpreter bcc was built for is the environment's."""
    assert _instructions(parsed, "ARG")[0] == "BASE=debian:bookworm-slim"
    assert _instructions(parsed, "FROM") == ["${BASE} AS build", "${BASE}"]


def test_packages_come_fresh_and_without_what_they_recommend(parsed):
    """An index of another layer's age would name packages that are gone."""
    installing = [run for run in _instructions(parsed, "RUN") if "apt-get install" in run]

    assert len(installing) == 2
    for run in installing:
        assert run.startswith("apt-get update ")
        assert "apt-get install -y --no-install-recommends" in run


def test_last_stage_installs_the_least_and_leaves_no_index(parsed):
    """BCC, the two tools that masquerade, and no tool chain."""
    (run,) = (each["value"] for each in _last_stage(parsed) if each["instruction"] == "RUN")
    words = run.split("--no-install-recommends")[1].split("&&")[0].split()

    assert words == ["iptables", "nftables", "python3-bpfcc"]
    assert "rm -rf /var/lib/apt/lists/*" in run


def test_what_is_copied_exists_and_is_not_ignored(parsed):
    """A file that is missing from the context would fail the build of everybody but its author."""
    kept = [line[1:] for line in _lines(DEPLOY / "Dockerfile.dockerignore") if line[0] == "!"]
    copied = [
        source
        for value in _instructions(parsed, "COPY")
        if not value.startswith("--from=build ")
        for source in value.split()[:-1]
    ]

    assert sorted(copied) == sorted(kept)
    assert all((ROOT / source).exists() for source in copied)
    assert _instructions(parsed, "ADD") == []


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]


def test_entrypoint_is_the_command_of_the_package(parsed):
    """The manifests give arguments alone."""
    (entrypoint,) = _instructions(parsed, "ENTRYPOINT")
    (program,) = json.loads(entrypoint)

    assert Path(program).name in PROJECT["scripts"]
    assert f"python3 -m venv --system-site-packages {Path(program).parents[1]}" in parsed.content


def test_labels_name_this_version_and_licence(parsed):
    """`docker inspect` tells what runs."""
    labels = parsed.labels

    assert labels["org.opencontainers.image.title"] == PROJECT["name"]
    assert labels["org.opencontainers.image.description"] == PROJECT["description"]
    assert labels["org.opencontainers.image.version"] == __version__ == PROJECT["version"]
    assert labels["org.opencontainers.image.licenses"] == PROJECT["license"]["text"]
