"""What the router measures, in a registry of its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from router.trace import ChoiceTrace
from router.work import Work
from telemetry import metrics as names
from telemetry.metrics import Metric
from tuner.online import Decision


class RouterMetrics:
    """Metrics of one router; those with a model's name as label are in `for_model`."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.nodes = names.ROUTER_NODES.gauge(registry)
        self.streams = names.ROUTER_STREAMS.gauge(registry)
        self.attempts = names.ROUTER_ATTEMPTS.counter(registry)
        self.attempts_ended = names.ROUTER_ATTEMPTS_ENDED.counter(registry)
        self.ways = names.ROUTER_WAYS.counter(registry)
        self.rebinds = names.ROUTER_REBINDS.counter(registry)
        self.role_switches = names.ROUTER_ROLE_SWITCHES.counter(registry)
        self.role_switch_seconds = names.ROUTER_ROLE_SWITCH_SECONDS.histogram(registry)
        self.tuner_decisions = names.ROUTER_TUNER_DECISIONS.counter(registry)
        self.tuner_pressure = names.ROUTER_TUNER_PRESSURE.gauge(registry)
        self.open_pairs = names.ROUTER_OPEN_PAIRS.gauge(registry)
        self.reserve_refusals = names.ROUTER_RESERVE_REFUSALS.counter(registry)
        self.grant_wait = names.ROUTER_GRANT_WAIT.histogram(registry)
        self.disconnects = names.ROUTER_DISCONNECTS.counter(registry)
        self.slow_clients = names.ROUTER_SLOW_CLIENTS.counter(registry)
        self.store_failures = names.ROUTER_STORE_FAILURES.counter(registry)
        self.responses = names.ROUTER_RESPONSES.counter(registry)
        self._http_requests = names.HTTP_REQUESTS.counter(registry)
        self.added = names.ROUTER_ADDED.histogram(registry)
        self.tokenize = names.ROUTER_TOKENIZE.histogram(registry)
        self.malformed = names.ROUTER_MALFORMED.gauge(registry)
        self.refused = names.ROUTER_REFUSED.gauge(registry)
        self._by_model = {metric: _make(metric, registry) for metric in _MODEL_METRICS}
        self._models: dict[str, ModelMetrics] = {}

    def answered(self, route: str, method: str, status: int) -> None:
        """An HTTP answer has left."""
        self.responses.labels(route, str(status)).inc()
        named = method if method in _METHODS else "OTHER"  # a client may invent one
        self._http_requests.labels(route, named, f"{status // 100}xx").inc()

    def switched(self, outcome: str, seconds: float) -> None:
        """A node that was asked for another role has it, or will not."""
        self.role_switches.labels(outcome).inc()
        if outcome == "done":
            self.role_switch_seconds.observe(seconds)

    def tuned(self, decision: Decision) -> None:
        """The tuner has looked."""
        self.tuner_decisions.labels(decision.grow or "stay").inc()
        if decision.pressure is not None:
            self.tuner_pressure.labels("prefill").set(decision.pressure.prefill)
            self.tuner_pressure.labels("decode").set(decision.pressure.decode)

    def for_model(self, name: str) -> ModelMetrics:
        """Metrics of one model (a fleet serves one, so there are few)."""
        if name not in self._models:
            self._models[name] = ModelMetrics(self._by_model, name)
        return self._models[name]

    def exposition(self) -> bytes:
        return generate_latest(self.registry)


_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_MODEL_HISTOGRAMS = (
    names.TIME_TO_FIRST_TOKEN,
    names.INTER_TOKEN_LATENCY,
    names.TIME_PER_OUTPUT_TOKEN,
    names.E2E_LATENCY,
    names.QUEUE_TIME,
    names.PREFILL_TIME,
    names.DECODE_TIME,
    names.INFERENCE_TIME,
    names.REQUEST_PROMPT_TOKENS,
    names.REQUEST_GENERATION_TOKENS,
    names.REQUEST_LONGEST_GENERATION,
    names.REQUEST_COMPUTED_TOKENS,
    names.REQUEST_MAX_TOKENS,
    names.REQUEST_N,
)
_MODEL_GAUGES = (names.NUM_REQUESTS_RUNNING, names.NUM_REQUESTS_WAITING, names.KV_CACHE_USAGE)
_MODEL_COUNTERS = (
    names.PROMPT_TOKENS,
    names.PROMPT_TOKENS_CACHED,
    names.GENERATION_TOKENS,
    names.REQUEST_SUCCESS,
    names.ADMISSION_REJECTIONS,
)
_MODEL_METRICS = (*_MODEL_HISTOGRAMS, *_MODEL_GAUGES, *_MODEL_COUNTERS)


def _make(metric: Metric, registry: CollectorRegistry) -> Histogram | Gauge | Counter:
    if metric in _MODEL_HISTOGRAMS:
        return metric.histogram(registry)
    return metric.gauge(registry) if metric in _MODEL_GAUGES else metric.counter(registry)


class ModelMetrics:
    """The metrics of one model, with the label already applied."""

    def __init__(
        self, by_model: dict[Metric, Histogram | Gauge | Counter], model_name: str
    ) -> None:
        self._metrics = by_model
        self._model_name = model_name
        self._histograms = {metric: self._labelled(metric) for metric in _MODEL_HISTOGRAMS}
        self.running = self._gauge(names.NUM_REQUESTS_RUNNING)
        self.waiting = self._gauge(names.NUM_REQUESTS_WAITING)
        self.kv_usage = self._gauge(names.KV_CACHE_USAGE)

    def _labelled(self, metric: Metric) -> Histogram:
        histogram = self._metrics[metric].labels(self._model_name)
        assert isinstance(histogram, Histogram)
        return histogram

    def _gauge(self, metric: Metric) -> Gauge:
        gauge = self._metrics[metric].labels(self._model_name)
        assert isinstance(gauge, Gauge)
        return gauge

    def count(self, metric: Metric, amount: float = 1, *labels: str) -> None:
        counter = self._metrics[metric].labels(self._model_name, *labels)
        assert isinstance(counter, Counter)
        counter.inc(amount)

    def observe(self, metric: Metric, value: float | None) -> None:
        if value is not None:
            self._histograms[metric].observe(value)

    def finished(self, work: Work, trace: ChoiceTrace, num_cached: int) -> None:
        """A choice has ended with a result (or, `abort`, because its client left)."""
        timeline, num_tokens = trace.timeline, trace.num_output_tokens
        self.count(names.REQUEST_SUCCESS, 1, trace.end)
        self.count(names.PROMPT_TOKENS, work.num_tokens)
        self.count(names.PROMPT_TOKENS_CACHED, num_cached)
        self.count(names.GENERATION_TOKENS, num_tokens)
        self.observe(names.REQUEST_PROMPT_TOKENS, work.num_tokens)
        if timeline.first_token is not None:
            self.observe(names.REQUEST_COMPUTED_TOKENS, work.num_tokens - num_cached)
        self.observe(names.REQUEST_GENERATION_TOKENS, num_tokens)
        self.observe(names.REQUEST_MAX_TOKENS, work.sampling.max_tokens)
        self.observe(names.QUEUE_TIME, timeline.queue_s)
        self.observe(names.TIME_TO_FIRST_TOKEN, timeline.time_to_first_token_s)
        self.observe(names.PREFILL_TIME, timeline.prefill_s)
        self.observe(names.DECODE_TIME, timeline.decode_s)
        self.observe(names.INFERENCE_TIME, timeline.inference_s)
        self.observe(names.E2E_LATENCY, timeline.total_s)
        if num_tokens > 1 and timeline.decode_s is not None:
            self.observe(names.TIME_PER_OUTPUT_TOKEN, timeline.decode_s / (num_tokens - 1))
