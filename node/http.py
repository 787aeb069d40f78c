"""A node's own HTTP: /health (the process lives), /ready (it takes requests), /metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.engine import Engine
from kvtransfer.transport import TransferStats
from telemetry import metrics as names
from wire.errors import ConfigError

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class NodeCollector(Collector):
    """Reads the node's state when Prometheus asks; nothing is counted twice on the hot path."""

    def __init__(self, engine: Engine, stats: TransferStats, num_steps: Callable[[], int]) -> None:
        self._engine = engine
        self._stats = stats
        self._num_steps = num_steps

    def collect(self) -> Iterable[Metric]:
        yield from self._engine_metrics()
        yield from self._transfer_metrics()

    def _engine_metrics(self) -> Iterable[Metric]:
        load = self._engine.load()
        counts = self._engine.block_counts()
        yield _gauge(names.NUM_REQUESTS_RUNNING, load.num_running)
        yield _gauge(names.NUM_REQUESTS_WAITING, load.num_waiting)
        held = counts.total - counts.free - counts.cached
        yield _gauge(names.KV_CACHE_USAGE, held / counts.total)
        blocks = _family(GaugeMetricFamily, names.NODE_BLOCKS, "state")
        for state in ("free", "cached", "leased", "running", "quarantined"):
            blocks.add_metric([state], getattr(counts, state))
        yield blocks
        yield _gauge(names.NODE_BLOCKS_TOTAL, counts.total)
        yield _counter(names.NODE_STEPS, self._num_steps())

    def _transfer_metrics(self) -> Iterable[Metric]:
        stats = self._stats
        yield _counter(names.TRANSFER_BYTES_SENT, stats.bytes_sent)
        yield _counter(names.TRANSFER_BYTES_RECEIVED, stats.bytes_received)
        dropped = _family(CounterMetricFamily, names.TRANSFER_UNITS_DROPPED, "cause")
        for cause, count in sorted(stats.units_dropped.items()):
            dropped.add_metric([cause], count)
        yield dropped
        handoffs = _family(CounterMetricFamily, names.HANDOFFS, "outcome")
        for outcome, count in sorted(stats.handoffs.items()):
            handoffs.add_metric([outcome], count)
        yield handoffs


def _gauge(metric: names.MetricName, value: float) -> Metric:
    return GaugeMetricFamily(metric.name, metric.help, value=value)


def _counter(metric: names.MetricName, value: float) -> Metric:
    return CounterMetricFamily(metric.name, metric.help, value=value)


def _family(
    kind: type[GaugeMetricFamily] | type[CounterMetricFamily],
    metric: names.MetricName,
    label: str,
) -> GaugeMetricFamily | CounterMetricFamily:
    return kind(metric.name, metric.help, labels=[label])


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

    async def metrics(request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": _CONTENT_TYPE})

    app = web.Application()
    app.add_routes(
        [web.get("/health", health), web.get("/ready", ready), web.get("/metrics", metrics)]
    )
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, host, port)
    try:
        await site.start()
    except OSError as error:
        await runner.cleanup()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    address = runner.addresses[0]
    return runner, f"http://{address[0]}:{address[1]}"
