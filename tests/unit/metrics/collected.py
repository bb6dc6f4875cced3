"""What a collector sees of a registry: samples by name and labels."""

from __future__ import annotations

import math

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from ebpf_svc.metrics.make import exposition


class Collected:
    """One collection, through the text format, as Prometheus gets it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.families = {
            family.name: family
            for family in text_string_to_metric_families(exposition(registry).decode())
        }
        self._samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
        }

    @property
    def names(self) -> set[str]:
        return {name for name, _ in self._samples}

    def value(self, name: str, **labels: str) -> float:
        """The value of one series; nan when there is none."""
        return self._samples.get((name, frozenset(labels.items())), math.nan)

    def values(self, name: str, label: str) -> dict[str, float]:
        """Every series of a metric, by one of its labels."""
        return {
            dict(labels)[label]: value
            for (of, labels), value in self._samples.items()
            if of == name
        }
