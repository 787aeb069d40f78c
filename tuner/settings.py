"""What one run of `baton bench` is: its flags (`tuner.flags`), decided."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tuner.arrivals import PLAIN_SHAPE, Arrival, ArrivalShape, arrival_offsets
from tuner.client import Endpoint, Target, base_url
from tuner.drive import Limits
from tuner.flags import DEFAULT_CONCURRENCY, DEFAULT_NUM_REQUESTS, MAX_IN_FLIGHT
from tuner.goodput import Slo
from tuner.trace import Trace, first_requests, limit_lengths, scale_lengths, scale_rate
from tuner.trace_files import TraceFormat, read_trace
from tuner.workload import PromptKind, RequestSpec, Workload, requests, trace_requests
from wire.errors import ConfigError


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """One run of the load generator, decided."""

    target: Target
    workload: Workload
    limits: Limits
    concurrency: int
    rate: float | None  # requests per second; None: a trace's own, else a closed loop
    arrival: Arrival | None  # with a rate; None: the trace's own times, faster or slower
    warmup: int
    json_path: Path | None = None
    html_path: Path | None = None
    shape: ArrivalShape = PLAIN_SHAPE
    slo: Slo | None = None
    trace: Trace | None = field(default=None, repr=False)
    sweep: tuple[float, ...] = ()  # rates to run one after the other
    notes: tuple[str, ...] = ()  # for the user, before anything is sent

    @property
    def is_open_loop(self) -> bool:
        return self.rate is not None or self._keeps_times

    @property
    def _keeps_times(self) -> bool:
        """Whether requests are sent when the trace says, or at its pace."""
        if self.trace is None or not self.trace.timed:
            return False
        return self.rate is None or self.arrival is None

    def at_rate(self, rate: float, edition: int) -> BenchSettings:
        """One run of a sweep: the same lengths, prompts that no earlier run has sent."""
        return replace(self, rate=rate, workload=replace(self.workload, edition=edition))

    def specs(self) -> Iterator[RequestSpec]:
        """What to send, in order; endless without a trace."""
        if self.trace is None:
            return requests(self.workload)
        return trace_requests(self.trace, self.workload)

    def offsets(self) -> Iterator[float]:
        """When to send it, in seconds from the start."""
        if self._keeps_times:
            assert self.trace is not None
            slower = 1.0 if self.rate is None else self.trace.rate / self.rate
            return (request.at * slower for request in self.trace.requests)
        assert self.rate is not None
        assert self.arrival is not None
        return arrival_offsets(self.rate, self.arrival, self.workload.seed, self.shape)

    def as_json(self) -> dict[str, Any]:
        """All settings but the secret ones (headers carry keys)."""
        settings = asdict(replace(self, trace=None))
        for name in ("json_path", "html_path", "trace", "sweep", "notes"):
            del settings[name]
        del settings["target"]["headers"]
        for name in ("input_len", "output_len", "token_ids"):
            settings["workload"][name] = str(getattr(self.workload, name))
        if self.trace is not None:
            settings["trace"] = {"name": self.trace.name, "requests": len(self.trace.requests)}
        return settings


def settings_from(args: argparse.Namespace) -> BenchSettings:
    """What the flags ask for.

    Raises:
        ConfigError: they contradict each other.
    """
    trace, notes = (None, []) if args.trace is None else _trace(args)
    _refuse_what_would_be_ignored(args, trace)
    has_rate = args.rate is not None or bool(args.sweep)
    is_closed = not has_rate and (trace is None or not trace.timed)
    default_concurrency = DEFAULT_CONCURRENCY if is_closed else MAX_IN_FLIGHT
    return BenchSettings(
        target=_target(args),
        workload=_workload(args),
        limits=_limits(args),
        concurrency=args.concurrency or default_concurrency,
        rate=args.rate,
        arrival=_arrival(args, trace),
        warmup=args.warmup,
        json_path=args.json,
        html_path=args.html,
        shape=_shape(args),
        slo=_slo(args),
        trace=trace,
        sweep=_sweep(args),
        notes=tuple(notes),
    )


def _arrival(args: argparse.Namespace, trace: Trace | None) -> Arrival | None:
    """A trace whose requests all came at once has no times that could be brought to a rate."""
    if args.arrival is not None:
        return Arrival(args.arrival)
    has_times = trace is not None and trace.timed and trace.rate > 0
    return None if has_times else Arrival.FIXED


# Which arrivals read a flag of the shape.
_READ_BY = {
    "burstiness": (Arrival.GAMMA,),
    "period": (Arrival.ONOFF, Arrival.DIURNAL),
    "on_share": (Arrival.ONOFF,),
    "swing": (Arrival.DIURNAL,),
}


def _refuse_what_would_be_ignored(args: argparse.Namespace, trace: Trace | None) -> None:
    """Raise ConfigError for a flag that would change nothing here."""
    has_rate = args.rate is not None or bool(args.sweep)
    if trace is None:
        for name in ("trace_format", "rate_scale", "length_scale", "max_model_len"):
            if getattr(args, name) is not None:
                raise ConfigError(f"{_flag(name)} is about a --trace; there is none")
    elif args.rate_scale is not None and (has_rate or not trace.timed):
        why = "give either it or a rate" if has_rate else f"{trace.name} tells no times; use --rate"
        raise ConfigError(f"--rate-scale: {why}")
    if args.arrival is not None and not has_rate:
        raise ConfigError("--arrival needs --rate or --sweep")
    for name, readers in _READ_BY.items():
        if getattr(args, name) is not None and args.arrival not in readers:
            raise ConfigError(f"{_flag(name)} is read only with --arrival {' or '.join(readers)}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _target(args: argparse.Namespace) -> Target:
    headers = dict(_header(text) for text in args.header)
    if args.api_key:
        headers["Authorization"] = f"Bearer {args.api_key}"
    return Target(
        url=base_url(args.url),
        model=args.model,
        endpoint=Endpoint(args.endpoint),
        temperature=args.temperature,
        ignore_eos=args.ignore_eos,
        headers=headers,
        timeout_s=args.timeout,
    )


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not (colon and name.strip()):
        raise ConfigError(f"--header {text!r}: expected NAME:VALUE")
    return name.strip(), value.strip()


def _workload(args: argparse.Namespace) -> Workload:
    chat = args.endpoint == Endpoint.CHAT
    default_kind = PromptKind.WORDS if chat else PromptKind.TOKENS
    kind = PromptKind(args.prompt_kind or default_kind)
    if chat and kind is PromptKind.TOKENS:
        raise ConfigError("a chat message is text: --endpoint chat needs --prompt-kind words")
    return Workload(args.input_len, args.output_len, kind, args.token_ids, args.seed)


def _shape(args: argparse.Namespace) -> ArrivalShape:
    given = {
        "burstiness": args.burstiness,
        "period_s": args.period,
        "on_share": args.on_share,
        "swing": args.swing,
    }
    try:
        return replace(PLAIN_SHAPE, **{name: v for name, v in given.items() if v is not None})
    except ValueError as error:
        raise ConfigError(f"--arrival: {error}") from error


def _slo(args: argparse.Namespace) -> Slo | None:
    if (args.ttft is None) != (args.tpot is None):
        raise ConfigError("--ttft and --tpot make sense only together")
    return None if args.ttft is None else Slo(args.ttft / 1e3, args.tpot / 1e3)


def _sweep(args: argparse.Namespace) -> tuple[float, ...]:
    if args.sweep and args.rate is not None:
        raise ConfigError("give either --rate or --sweep")
    return tuple(sorted(set(args.sweep)))


def _trace(args: argparse.Namespace) -> tuple[Trace, list[str]]:
    """The recorded load as it is to be sent, and what of it will not be. Raises ConfigError."""
    form = None if args.trace_format is None else TraceFormat(args.trace_format)
    trace = read_trace(args.trace, form)
    notes = [trace.skipped_text()] if trace.num_skipped else []
    trace = scale_rate(scale_lengths(trace, args.length_scale or 1.0), args.rate_scale or 1.0)
    if args.max_model_len is not None:
        trace, num_long = limit_lengths(trace, args.max_model_len)
        if num_long:
            notes.append(f"{trace.name}: {num_long} requests exceed --max-model-len, left out")
    if not trace.requests:
        raise ConfigError(f"no request of {args.trace} fits in --max-model-len")
    number = args.num_requests or 0
    if number > len(trace.requests):
        notes.append(f"{trace.name}: only {len(trace.requests)} requests, not --num-requests")
    return (first_requests(trace, number) if number else trace), notes


def _limits(args: argparse.Namespace) -> Limits:
    if args.num_requests is None and args.duration is None:
        return Limits(DEFAULT_NUM_REQUESTS if args.trace is None else None, None)
    return Limits(args.num_requests, args.duration)
