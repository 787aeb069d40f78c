"""What a fleet takes besides its engines' steps, measured from a client's side.

A request that is alone, then many at once, then both kinds of node busy: each tells one constant.

    sent    first token     second      third …            alone, and k streams at once
      |--- TTFT ---|---------|---step---|---step---|
      |front|prefill| handoff|          step = decode formula + per step + per stream

None of it is fitted to a load that is to be predicted: these are requests made for this purpose.
Of repeats the median counts: requests meet what else runs on the fleet's machine.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean, median

import numpy as np

from tuner.latency import LatencyModel, Sample, StepWork, fit
from tuner.quiet import spread_of


@dataclass(frozen=True, slots=True)
class Overheads:
    """Seconds and factors; the defaults say that there are none."""

    front_s: float = 0.0  # per request, before a node hears of it
    handoff_s: float = 0.0  # from the first token to the first step on the decode node
    step_s: float = 0.0  # per decode step, and
    stream_s: float = 0.0  # per request in it; below 0 where the formula was measured too slow
    prefill_factor: float = 1.0  # of the prefill formula: what its process does, and the pace
    decode_factor: float = 1.0  # of decode steps with what comes on top of them: the pace
    prefill_slowdown: float = 1.0  # while another node of this machine computes
    decode_slowdown: float = 1.0

    def __post_init__(self) -> None:
        if not all(0 <= value < 60 for value in (self.front_s, self.handoff_s)):
            raise ValueError(f"{self.front_s}, {self.handoff_s} are no times per request")
        if not all(abs(value) < 60 for value in (self.step_s, self.stream_s)):
            raise ValueError(f"{self.step_s}, {self.stream_s} are no times per step")
        for factor in (self.prefill_factor, self.decode_factor):
            if not 0 < factor < 100:
                raise ValueError(f"{factor} is no factor")
        if not all(1 <= value < 100 for value in (self.prefill_slowdown, self.decode_slowdown)):
            raise ValueError(f"{self.prefill_slowdown}, {self.decode_slowdown}: not slower")

    @property
    def shares_machine(self) -> bool:
        """Whether nodes slow each other down."""
        return max(self.prefill_slowdown, self.decode_slowdown) > 1.0

    def applied(self, model: LatencyModel) -> LatencyModel:
        """The formulas of steps as they are in the fleet, one node at a time."""
        a, b, c = (self.prefill_factor * value for value in model.prefill)
        d, e, f = model.decode
        whole = (max(0.0, d + self.step_s), e, max(0.0, f + self.stream_s))
        d, e, f = (self.decode_factor * value for value in whole)
        return replace(model, prefill=(a, b, c), decode=(d, e, f))


NO_OVERHEADS = Overheads()


@dataclass(frozen=True, slots=True)
class Alone:
    """An unloaded request."""

    prompt_tokens: int
    ttft_s: float
    second_s: float  # from the first token to the second


@dataclass(frozen=True, slots=True)
class Streams:
    """A time in which so many requests only decoded."""

    batch: int
    context: int  # tokens that the steps read, of all requests, in the middle of the time
    step_s: float


@dataclass(frozen=True, slots=True)
class Probes:
    """What was measured."""

    alone: Sequence[Alone]  # several of each length
    in_a_row_s: Sequence[float]  # between first tokens of prompts that wait for each other
    in_a_row_tokens: int  # of each of those
    streams: Sequence[Streams]  # several of each size
    prefill_slowdown: float
    decode_slowdown: float

    @property
    def spread(self) -> float:
        """How far repeats of the same are apart."""
        ttfts, steps = defaultdict(list), defaultdict(list)
        for one in self.alone:
            ttfts[one.prompt_tokens].append(one.ttft_s)
        for streams in self.streams:
            steps[streams.batch].append(streams.step_s)
        return spread_of([*ttfts.values(), *steps.values(), self.in_a_row_s])

    def settled(self) -> Probes:
        """Each kind once, as it is in the middle."""
        lengths = dict.fromkeys(one.prompt_tokens for one in self.alone)
        sizes = dict.fromkeys((one.batch, one.context) for one in self.streams)
        gaps = [gap for gap in self.in_a_row_s if gap > 0]
        return replace(
            self,
            alone=[_settled_alone(self.alone, length) for length in lengths],
            in_a_row_s=[median(gaps)] if gaps else [],
            streams=[_settled_streams(self.streams, *size) for size in sizes],
        )


def _settled_alone(alone: Sequence[Alone], length: int) -> Alone:
    these = [one for one in alone if one.prompt_tokens == length]
    ttft_s = median(one.ttft_s for one in these)
    return Alone(length, ttft_s, median(one.second_s for one in these))


def _settled_streams(streams: Sequence[Streams], batch: int, context: int) -> Streams:
    these = [one.step_s for one in streams if (one.batch, one.context) == (batch, context)]
    return Streams(batch, context, median(these))


def prompt_work(num_tokens: int) -> StepWork:
    return StepWork(prefill_tokens=num_tokens, prefill_squares=num_tokens**2)


def overheads_of(
    probes: Probes, model: LatencyModel, chunk: int, hop_s: float, handoff_hop_s: float
) -> Overheads:
    """The constants that make the formulas say what was measured.

    Args:
        chunk: the nodes' token budget per step.
        hop_s: what whoever uses them adds to a TTFT for messages.
        handoff_hop_s: the same between the first and the second token, with the transfer.
    """
    probes = probes.settled()
    step_s, stream_s = _stream_costs(probes.streams, model)
    front_s, factor = _front_costs(probes, model, chunk)
    first_step = [
        one.second_s - model.decode_steps_s(1, 1, one.prompt_tokens + 1) for one in probes.alone
    ]
    return Overheads(
        front_s=max(0.0, front_s - hop_s),
        handoff_s=max(0.0, median(first_step) - step_s - stream_s - handoff_hop_s),
        step_s=step_s,
        stream_s=stream_s,
        prefill_factor=factor,
        prefill_slowdown=max(1.0, probes.prefill_slowdown),
        decode_slowdown=max(1.0, probes.decode_slowdown),
    )


def _front_costs(probes: Probes, model: LatencyModel, chunk: int) -> tuple[float, float]:
    """Seconds per prompt, and the factor on its computation.

    Prompts of several lengths tell both, by least squares of the relative error: what is in
    proportion to the work, as where the machine was slower than when the formula was measured, is
    no constant. Prompts in a row tell the factor too, at another moment; the mean of both counts.
    """
    in_a_row_s = prefill_s(model, probes.in_a_row_tokens, chunk)
    factors = [gap / in_a_row_s for gap in probes.in_a_row_s]
    alone = [(prefill_s(model, one.prompt_tokens, chunk), one.ttft_s) for one in probes.alone]
    if len(alone) < 2:
        factor = mean(factors) if factors else 1.0
        return sum(ttft_s - factor * computed_s for computed_s, ttft_s in alone), factor
    front_s, slope = fit([Sample((1.0, computed_s), ttft_s) for computed_s, ttft_s in alone], 2)
    return front_s, mean([*factors, slope]) or 1.0


def prefill_s(model: LatencyModel, num_tokens: int, chunk: int) -> float:
    """A prompt alone, in chunks."""
    seconds = 0.0
    for start in range(0, num_tokens, chunk):
        end = min(start + chunk, num_tokens)
        work = StepWork(prefill_tokens=end - start, prefill_squares=end**2 - start**2)
        seconds += model.step_s(work)
    return seconds


def _stream_costs(streams: Sequence[Streams], model: LatencyModel) -> tuple[float, float]:
    """Per step and per stream, by least squares of the relative error; alone one size: per step."""
    if not streams:
        return 0.0, 0.0
    times = np.array([one.step_s for one in streams])
    extra = times - [model.decode_steps_s(1, one.batch, one.context) for one in streams]
    batches = np.array([one.batch for one in streams])
    if len(set(batches)) == 1:
        return float(np.median(extra)), 0.0
    rows = np.column_stack((np.ones_like(times), batches)) / times[:, None]
    step_s, stream_s = np.linalg.lstsq(rows, extra / times)[0]
    return float(step_s), float(stream_s)
