"""docs/install.md against what it speaks of: files, commands, rights, ports."""

from __future__ import annotations

import re

import pytest

from ebpf_svc.cli import COMMANDS
from tests.deploy.conftest import AGENTS, DEPLOY, WAY_BACK, Deployed, rendered
from tests.deploy.kubelet import settings_of

ROOT = DEPLOY.parent
TEXT = (ROOT / "docs/install.md").read_text()


def test_files_it_names_are_there():
    """A command that is copied from it finds its file."""
    named = set(re.findall(r"(?<![./\w])deploy/[\w./-]*\w", TEXT))

    assert {f"deploy/{name}" for name in (*AGENTS, WAY_BACK)} <= named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_links_lead_somewhere():
    """To other documents, and to headings of its own."""
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in TEXT.splitlines()
        if line.startswith("#")
    }

    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        if target.startswith("#"):
            assert target[1:] in headings
        else:
            assert (ROOT / "docs" / target).exists()


def test_commands_of_ours_exist():
    """What the reader is told to type is there."""
    typed = set(re.findall(r"(?:`|-- |^)ebpf-svc ([a-z]+)", TEXT, re.MULTILINE))

    assert {"show", "check", "migrate", "cleanup", "config"} <= typed <= set(COMMANDS)


def test_rights_it_explains_are_those_that_are_granted(beside: Deployed):
    """Every resource and every mount has a row that says why."""
    rows = [line.split("|")[1] for line in TEXT.splitlines() if line.startswith("| ")]
    explained = set(re.findall(r"`([^`]+)`", " ".join(rows)))
    resources = {each for rule in beside.one("ClusterRole")["rules"] for each in rule["resources"]}
    paths = {str(place) for place, (_, volume) in beside.mounts().items() if "hostPath" in volume}

    assert resources | paths <= explained


@pytest.mark.parametrize("field", ["healthz_bind_address", "metrics_bind_address"])
def test_ports_it_tells_are_those_in_use(field, beside: Deployed):
    """Beside kube-proxy, and in its place."""
    for deployed in (beside, rendered("base")):
        port = getattr(settings_of(deployed), field).rpartition(":")[2]
        assert re.search(rf"\b{port}\b", TEXT)


def test_each_sentence_has_a_line_of_its_own():
    """A change of one sentence is a change of one line."""
    prose = re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL).splitlines()

    assert [line for line in prose if re.search(r"[a-z`)]\. +[A-Z`]", line)] == []
