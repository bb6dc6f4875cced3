"""Print the catalog as a page: `python -m ebpf_svc.metrics.reference > docs/metrics.md`."""

from __future__ import annotations

from collections.abc import Iterable

from ebpf_svc.metrics.catalog import Spec, specs

_OPENING = """\
<!-- Made by `python -m ebpf_svc.metrics.reference`; change ebpf_svc/metrics/catalog.py instead. -->
# Metrics

`/metrics` on the metrics address (127.0.0.1:10249 unless `metricsBindAddress` says otherwise),
in Prometheus' text format.
`/metrics/slis` beside it has the outcomes of health checks.

Dashboard and alerts that use these metrics are in `deploy/monitoring/`.
"""
_SECTIONS = (
    (
        "kubeproxy_",
        "Kube-proxy's",
        "Names, types, labels and buckets as kube-proxy has them, so that its dashboards and "
        "alerts work.",
    ),
    ("ebpf_svc_", "Ours", "What only this agent can tell."),
    ("kubernetes_", "Health checks", "On `/metrics/slis`, as Kubernetes components have them."),
    ("process_", "The process", "As every program with a Prometheus library has them."),
)


def reference() -> str:
    """The page, Markdown."""
    parts = [_OPENING]
    every = tuple(specs())
    for prefix, title, text in _SECTIONS:
        rows = (_row(spec) for spec in every if spec.name.startswith(prefix))
        parts.append(f"\n## {title}\n\n{text}\n\n{_table(rows)}")
    return "".join(parts)


def _table(rows: Iterable[str]) -> str:
    return "\n".join(["| name | type | labels | |", "|---|---|---|---|", *rows]) + "\n"


def _row(spec: Spec) -> str:
    only = f" Only in mode {', '.join(spec.modes)}." if spec.modes else ""
    labels = ", ".join(spec.labels)
    return f"| `{spec.name}` | {spec.kind.value} | {labels} | {spec.help}{only} |"


if __name__ == "__main__":
    print(reference(), end="")
