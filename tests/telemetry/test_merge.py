"""Metrics of several processes as one: sums that never fall, gauges by their meaning."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from router.metrics import RouterMetrics
from telemetry import metrics
from telemetry.merge import Families, lasting, merge, parse, render


def told(requests: int, ttft: list[float], nodes: int, streams: int) -> Families:
    m = RouterMetrics()
    for _ in range(requests):
        m.answered("/v1/completions", "POST", 200)
    for value in ttft:
        m.for_model("m").observe(metrics.TIME_TO_FIRST_TOKEN, value)
    m.nodes.labels("decode", "serving").set(nodes)
    m.streams.set(streams)
    m.for_model("m").kv_usage.set(nodes / 10)
    return parse(m.exposition().decode())


def lines(families: Families) -> set[str]:
    return set(render(families).decode().splitlines())


def test_counters_and_histograms_are_summed_and_gauges_by_their_meaning() -> None:
    found = lines(merge([told(3, [0.01, 7], 4, 5), told(2, [0.01], 3, 6)]))
    assert {
        'baton_router_http_responses_total{route="/v1/completions",status="200"} 5.0',
        'vllm:time_to_first_token_seconds_bucket{le="0.01",model_name="m"} 2.0',
        'vllm:time_to_first_token_seconds_bucket{le="10.0",model_name="m"} 3.0',
        'vllm:time_to_first_token_seconds_bucket{le="+Inf",model_name="m"} 3.0',
        'vllm:time_to_first_token_seconds_count{model_name="m"} 3.0',
        "baton_router_streams 11.0",
        'baton_router_nodes{role="decode",state="serving"} 4.0',
        'vllm:kv_cache_usage_perc{model_name="m"} 0.4',
    } <= found


def test_labels_that_only_one_has_are_kept() -> None:
    other = RouterMetrics()
    other.answered("/ping", "GET", 404)
    found = lines(merge([told(1, [], 0, 0), parse(other.exposition().decode())]))
    assert 'baton_router_http_responses_total{route="/ping",status="404"} 1.0' in found
    assert 'baton_router_http_responses_total{route="/v1/completions",status="200"} 1.0' in found


def test_of_the_dead_what_counts_is_kept() -> None:
    found = lines(merge([lasting(told(3, [1], 4, 5)), told(2, [1], 3, 6)]))
    assert 'baton_router_http_responses_total{route="/v1/completions",status="200"} 5.0' in found
    assert "baton_router_streams 6.0" in found
    assert 'baton_router_nodes{role="decode",state="serving"} 3.0' in found


def test_what_is_parsed_is_told_again_as_it_was() -> None:
    registry = CollectorRegistry()
    counter = metrics.ROUTER_ATTEMPTS_ENDED.counter(registry)
    counter.labels('quo"te\\ and\nline').inc(2)
    metrics.ROUTER_GRANT_WAIT.histogram(registry).observe(0.2)
    metrics.ROUTER_STREAMS.gauge(registry).set(3)
    text = generate_latest(registry).decode()
    kept = [line for line in text.splitlines() if "_created" not in line]
    assert render(parse(text)).decode().splitlines() == kept
