"""A node's own HTTP: /health (the process lives), /ready (it takes requests), /metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.core import Metric as Prometheus
from prometheus_client.registry import Collector

from engine.engine import Engine
from node.role import Role
from node.stats import NodeStats
from telemetry import metrics
from telemetry.histogram import Buckets
from wire.errors import ConfigError

_IDLE_CONNECTION_S = 75.0  # strangers' idle connections must not use up the descriptors
_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class NodeCollector(Collector):
    """Reads the node's state when Prometheus asks; nothing is counted twice on the hot path."""

    def __init__(
        self,
        model_name: str,
        engine: Engine,
        stats: NodeStats,
        role: Callable[[], Role],
        num_malformed: Callable[[], int],
        num_refused: Callable[[], int],
        num_unstaged: Callable[[], int],
    ) -> None:
        self._model_name = model_name
        self._engine = engine
        self._stats = stats
        self._role = role
        self._num_malformed = num_malformed
        self._num_refused = num_refused
        self._num_unstaged = num_unstaged

    def collect(self) -> Iterable[Prometheus]:
        yield from self._engine_metrics()
        yield from self._step_metrics()
        yield from self._draft_metrics()
        yield from self._transfer_metrics()

    def _engine_metrics(self) -> Iterable[Prometheus]:
        load = self._engine.load()
        counts = self._engine.block_counts()
        model = (self._model_name,)
        yield _gauge(metrics.NUM_REQUESTS_RUNNING, {model: load.num_running})
        yield _gauge(metrics.NUM_REQUESTS_WAITING, {model: load.num_waiting})
        held = counts.total - counts.free - counts.cached
        yield _gauge(metrics.KV_CACHE_USAGE, {model: held / counts.total})
        states = ("free", "cached", "leased", "running", "quarantined")
        yield _gauge(metrics.NODE_BLOCKS, {(state,): getattr(counts, state) for state in states})
        yield _gauge(metrics.NODE_BLOCKS_CAPACITY, {(): counts.total})

    def _step_metrics(self) -> Iterable[Prometheus]:
        stats, model = self._stats, (self._model_name,)
        yield _counter(metrics.NODE_STEPS, {(): stats.steps})
        yield _histogram(metrics.NODE_STEP_SECONDS, {(): stats.seconds_per_step})
        yield _histogram(metrics.ITERATION_TOKENS, {model: stats.tokens_per_step})
        yield _counter(metrics.NODE_STEP_TOKENS, {(): stats.step_tokens})
        yield _counter(metrics.NODE_OUTPUT_TOKENS, {(): stats.output_tokens})
        yield _counter(metrics.NODE_CHUNKS, {(): stats.unfinished_chunks})
        yield _counter(metrics.PREEMPTIONS, {model: stats.preemptions})
        yield _counter(metrics.STEPS_AHEAD, {(): stats.ahead})
        yield _counter(metrics.OUT_OF_MEMORY, {(): stats.out_of_memory})
        yield _counter(metrics.GRAPH_FAILURES, {(): stats.graph_failures})
        yield _counter(metrics.CORRUPTED, {model: stats.corrupted})
        yield _counter(metrics.PREFIX_QUERIES, {model: stats.prefix_queries})
        yield _counter(metrics.PREFIX_HITS, {model: stats.prefix_hits})
        yield _counter(metrics.NODE_MALFORMED, {(): self._num_malformed()})
        yield _counter(metrics.NODE_REFUSED, {(): self._num_refused()})
        yield _counter(metrics.STAGING_FULL, {(): self._num_unstaged()})

    def _draft_metrics(self) -> Iterable[Prometheus]:
        stats, model = self._stats, (self._model_name,)
        yield _counter(metrics.SPEC_DRAFTS, {model: stats.drafts})
        yield _counter(metrics.SPEC_DRAFT_TOKENS, {model: stats.draft_tokens})
        yield _counter(metrics.SPEC_ACCEPTED_TOKENS, {model: sum(stats.accepted_at)})
        by_position: Values = {(*model, str(i)): n for i, n in enumerate(stats.accepted_at)}
        yield _counter(metrics.SPEC_ACCEPTED_PER_POSITION, by_position)
        yield _histogram(metrics.SPEC_TOKENS_PER_STEP, {(): stats.tokens_per_draft})
        yield _counter(metrics.SPEC_DRAFT_SECONDS, {(): stats.draft_s})
        yield _gauge(metrics.SPEC_SAVED_SECONDS, {(): stats.draft_saved_s})
        yield _counter(metrics.SPEC_FAILURES, {(): stats.drafter_failures})

    def _transfer_metrics(self) -> Iterable[Prometheus]:
        role = self._role()
        stats = role.stats
        for metric, states in role.open_transfers.items():
            yield _gauge(metric, _by_label(states))
        for metric, by_transport in stats.histograms.items():
            yield _histogram(metric, {(name,): it for name, it in by_transport.items()})
        yield _counter(metrics.TRANSFER_BYTES_SENT, {(): stats.bytes_sent})
        yield _counter(metrics.TRANSFER_BYTES_RECEIVED, {(): stats.bytes_received})
        yield _counter(metrics.TRANSFER_MESSAGES_UNSENT, {(): stats.messages_unsent})
        yield _counter(metrics.TRANSFER_UNITS_DROPPED, _by_label(stats.units_dropped))
        yield _counter(metrics.TRANSPORT_FAILURES, _by_label(stats.transport_failures))
        yield _counter(metrics.HANDOFFS, _by_label(stats.handoffs))


Values = Mapping[tuple[str, ...], float]  # by label values


def _by_label(counts: Mapping[str, int]) -> Values:
    return {(label,): count for label, count in sorted(counts.items())}


def _gauge(metric: metrics.Metric, values: Values) -> Prometheus:
    family = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


def _counter(metric: metrics.Metric, values: Values) -> Prometheus:
    family = CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


def _histogram(metric: metrics.Metric, values: Mapping[tuple[str, ...], Buckets]) -> Prometheus:
    family = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
    for labels, buckets in values.items():
        family.add_metric(labels, buckets.cumulative(), buckets.total)
    return family


async def serve_http(
    host: str, port: int, collector: Collector, is_ready: Callable[[], bool]
) -> tuple[web.AppRunner, str]:
    """Start serving; returns the runner (the caller ends it) and the bound URL."""
    registry = CollectorRegistry()
    registry.register(collector)

    async def health(request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def ready(request: web.Request) -> web.Response:
        good = is_ready()
        return web.json_response({"ready": good}, status=200 if good else 503)

    async def expose(request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": _CONTENT_TYPE})

    app = web.Application()
    app.add_routes(
        [web.get("/health", health), web.get("/ready", ready), web.get("/metrics", expose)]
    )
    runner = web.AppRunner(app, access_log=None, keepalive_timeout=_IDLE_CONNECTION_S)
    await runner.setup()
    site = web.TCPSite(runner, host, port)
    try:
        await site.start()
    except OSError as error:
        await runner.cleanup()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    bound, bound_port = runner.addresses[0][:2]
    shown = f"[{bound}]" if ":" in bound else bound
    return runner, f"http://{shown}:{bound_port}"
