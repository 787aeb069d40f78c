"""The node's own histograms against Prometheus's."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.samples import Sample

from telemetry.histogram import Buckets
from telemetry.metrics import Metric

METRIC = Metric("m", "for the test", (), (0.5, 1, 10))


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0, 2.0, 10.0, 11.0]), max_size=30))
def test_counts_are_those_of_prometheus(values: list[float]) -> None:
    registry = CollectorRegistry()
    oracle, buckets = METRIC.histogram(registry), Buckets.of(METRIC)
    for value in values:
        oracle.observe(value)
        buckets.observe(value)
    (family,) = registry.collect()
    samples: list[Sample] = family.samples
    expected = [(s.labels["le"], s.value) for s in samples if s.name == "m_bucket"]
    assert buckets.cumulative() == expected
    assert buckets.count == len(values)
    assert buckets.total == sum(values)
