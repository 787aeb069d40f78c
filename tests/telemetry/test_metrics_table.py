"""One table of names, each exported by somebody and documented."""

from __future__ import annotations

from telemetry import metrics
from telemetry.metrics import Metric
from tests.telemetry.metrics_table import PAGE, all_metrics, exported, written


def test_no_name_is_used_twice() -> None:
    names = [value.name for value in vars(metrics).values() if isinstance(value, Metric)]
    assert sorted(names) == sorted(set(names))


def test_every_name_is_exported_and_nothing_else() -> None:
    assert exported().keys() == all_metrics().keys()


def test_histograms_are_those_with_buckets() -> None:
    kinds = {name: kind for name, (kind, _) in exported().items()}
    with_buckets = {name for name, metric in all_metrics().items() if metric.buckets}
    assert {name for name, kind in kinds.items() if kind == "histogram"} == with_buckets


def test_the_page_is_up_to_date() -> None:
    """If not: python -m tests.telemetry.metrics_table"""
    page = PAGE.read_text()
    assert page == written(page)
    assert page.count("<!-- end -->") == 3
