"""Dashboard and alerts name metrics and labels that exist, and fire when they should."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ebpf_svc.dataplane.ebpf.constants import Drop
from ebpf_svc.metrics import catalog
from ebpf_svc.metrics.catalog import Kind
from ebpf_svc.metrics.collect import EXTERNAL, INTERNAL

FOLDER = Path(__file__).parents[3] / "deploy/monitoring"
RULES: dict[str, Any] = yaml.safe_load((FOLDER / "rules.yaml").read_text())["spec"]
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text())

TARGET_LABELS = {"instance", "job"}
"""What Prometheus adds; `up` is its own."""
LABELS: dict[str, set[str]] = {"up": set()}
for spec in catalog.specs():
    labels = set(spec.labels)
    if spec.kind is Kind.HISTOGRAM:
        LABELS |= {f"{spec.name}_{suffix}": labels for suffix in ("sum", "count")}
        LABELS[f"{spec.name}_bucket"] = labels | {"le"}
    else:
        LABELS[spec.name] = labels

_SERIES = re.compile(r"\b(up|(?:kubeproxy|ebpf_svc|kubernetes|process)_\w+)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"')
_GROUPING = re.compile(r"\b(?:by|on|ignoring|without|group_left|group_right)\s*\(([^)]*)\)")
_IN_TEXT = re.compile(r"\$labels\.(\w+)")


def queries() -> Iterator[tuple[str, str]]:
    """Where, and the expression."""
    for alert in ALERTS:
        yield alert["alert"], alert["expr"]
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield f"variable {variable['name']}", variable["definition"]


QUERIES = [pytest.param(expr, id=where) for where, expr in queries()]


@pytest.mark.parametrize("expr", QUERIES)
def test_query_uses_metrics_and_labels_that_exist(expr: str) -> None:
    """A misspelt name gives an empty panel, or an alert that never fires."""
    known = set(TARGET_LABELS)
    series = _SERIES.findall(expr)
    assert series
    for name, matchers in series:
        assert name in LABELS, f"no such metric: {name}"
        known |= LABELS[name]
        for label, _ in _MATCHER.findall(matchers):
            assert label in LABELS[name] | TARGET_LABELS, f"{name} has no label {label}"
    known.update(re.findall(r'label_replace\([^()]*?, "(\w+)"', expr))
    for group in _GROUPING.findall(expr):
        assert {label.strip() for label in group.split(",")} <= known


@pytest.mark.parametrize("expr", QUERIES)
def test_query_asks_for_label_values_that_occur(expr: str) -> None:
    """Reasons, policies and tables are named as the agent names them."""
    values = {
        "reason": {drop.name.lower() for drop in Drop},
        "traffic_policy": {INTERNAL, EXTERNAL},
        "evicts": {"true", "false"},
        "ip_family": {"IPv4", "IPv6"},
    }
    for _, matchers in _SERIES.findall(expr):
        for label, wanted in _MATCHER.findall(matchers):
            for value in wanted.split("|") if label in values else ():
                assert value in values[label], f"{label} is never {value}"


def test_every_reason_of_a_drop_is_watched() -> None:
    """A reason added later must be told apart: a fault, a state, or wanted."""
    watched = {
        reason
        for rule in ALERTS
        for reasons in re.findall(r'reason=~"([^"]*)"', rule["expr"])
        for reason in reasons.split("|")
    }
    assert watched | {"source_range"} == {drop.name.lower() for drop in Drop}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_alert_says_what_is_wrong_and_where(alert: dict[str, Any]) -> None:
    """Each has a severity, a sentence and a hint, with labels its query leaves."""
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    texts = alert["annotations"]
    assert {*texts} == {"summary", "description"}
    names = {name for name, _ in _SERIES.findall(alert["expr"])}
    known = set.union(TARGET_LABELS, *(LABELS[name] for name in names))
    assert {*_IN_TEXT.findall(texts["summary"] + texts["description"])} <= known


def test_alerts_watch_what_kube_proxys_do() -> None:
    """The pair of timestamps, and the programming latency (MX5)."""
    exprs = " ".join(alert["expr"] for alert in ALERTS)
    assert catalog.LAST_QUEUED.name in exprs
    assert catalog.LAST_SYNCED.name in exprs
    assert catalog.PROGRAMMING_DURATION.name in exprs


def test_dashboard_panels_lie_side_by_side() -> None:
    """No panel covers another; each has a title, a description and its own id."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["title"]
        assert panel["type"] == "row" or panel["description"]
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_rules_fire_when_they_should(tmp_path: Path) -> None:
    """rules_test.yaml and the syntax of every query, by Prometheus' own tool."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt-get install prometheus)")
    bare = copy.deepcopy(RULES)
    for group in bare["groups"]:
        for rule in group["rules"]:
            del rule["annotations"]
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(RULES))
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(bare))
    shutil.copy(FOLDER / "rules_test.yaml", tmp_path)
    exprs = [
        re.sub(r"\$__rate_interval", "5m", expr)
        for where, expr in queries()
        if not where.startswith("variable")
    ]
    records = [{"record": f"query{n}", "expr": expr} for n, expr in enumerate(exprs)]
    panels = {"groups": [{"name": "dashboard", "rules": records}]}
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump(panels))
    for words in ("check rules whole.yaml panels.yaml", "test rules rules_test.yaml"):
        argv = [promtool, *words.split()]
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
