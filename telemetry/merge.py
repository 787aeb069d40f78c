"""Metrics of several processes, told as those of one.

Counters and histograms are summed, those of processes that have died included: a sum that fell
would look like a restart, and Prometheus would count all of it again. Of a dead process what it
last told is kept. A gauge tells of now, so only the living count; the table in `telemetry.metrics`
says whether it is summed. When a counter was created means nothing for a sum: `_created` is left
out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric as Samples
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from telemetry import metrics
from telemetry.metrics import Metric

_GAUGES = {m.name: m.of_workers for m in vars(metrics).values() if isinstance(m, Metric)}
_Key = tuple[str, tuple[tuple[str, str], ...]]  # a sample's name and labels


@dataclass(slots=True)
class Family:
    """One metric with its samples."""

    kind: str
    help: str
    values: dict[_Key, float] = field(default_factory=dict)


Families = dict[str, Family]


def parse(text: str) -> Families:
    """What a process tells, in Prometheus's text format."""
    return {
        found.name: Family(
            found.type,
            found.documentation,
            {(s.name, tuple(s.labels.items())): s.value for s in found.samples},
        )
        for found in text_string_to_metric_families(text)
        if not found.name.endswith("_created")
    }


def merge(told: Iterable[Families]) -> Families:
    """All of these as one."""
    merged: Families = {}
    for families in told:
        for name, family in families.items():
            into = merged.setdefault(name, Family(family.kind, family.help))
            combine = _rule(name, family.kind)
            for key, value in family.values.items():
                known = into.values.get(key)
                into.values[key] = value if known is None else combine(known, value)
    return merged


def lasting(families: Families) -> Families:
    """What outlives the process that told it."""
    return {name: family for name, family in families.items() if family.kind != "gauge"}


def render(families: Families) -> bytes:
    """In Prometheus's text format."""
    registry = CollectorRegistry()
    registry.register(_Told(families))
    return generate_latest(registry)


def _rule(name: str, kind: str) -> Callable[[float, float], float]:
    return max if kind == "gauge" and _GAUGES.get(name) == "max" else lambda a, b: a + b


class _Told(Collector):
    def __init__(self, families: Families) -> None:
        self._families = families

    def collect(self) -> Iterator[Samples]:
        for name, family in self._families.items():
            samples = Samples(name, family.help, family.kind)
            for (sample, labels), value in family.values.items():
                samples.add_sample(sample, dict(labels), value)
            yield samples
