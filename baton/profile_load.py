"""What requests take that come and go, beside what steps in a row take.

A node that waits for work is not always at once as fast as one that computes without a pause:
caches are cold, the processor sleeps, and a host lends it to others, who keep it for a while. So a
load of its own, as random as users are, is asked of the fleet and of its simulated twin. What a
request takes on its way is found anew, and the prefill and the decode formula are scaled, until the
twin's requests take as long.
Nothing of it is fitted to a load that is to be predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from statistics import median

from baton.simulation.setup import HOPS_TO_FIRST_TOKEN, Setup, Split
from baton.simulation.simulate import simulate
from baton.simulation.utilisation import at_utilisation
from engine.config import EngineConfig
from tuner.arrivals import Arrival, arrival_offsets
from tuner.latency import Sample, fit
from tuner.overheads import Overheads
from tuner.profile import Profile
from tuner.record import RequestRecord
from tuner.replay import replay
from tuner.trace import Trace, TracedRequest, first_requests
from tuner.workload import PromptKind, Span, Workload, requests

PROMPTS, ANSWERS = Span(16, 160), Span(8, 16)  # tokens
UTILISATION = 0.4  # of the busiest node, if it were as fast as with steps in a row
FEWEST, MOST = 12, 300  # requests
BOUND = 4.0  # times slower or faster than the probes found: then it did something else, too
_ROUNDS = 20
_SETTLED = 0.002  # of factors, and in seconds
Tell = Callable[[str], None]


def under_load(
    profile: Profile, url: str, chunk: int, seconds: float, seed: int, tell: Tell = print
) -> Overheads:
    """The profile's overheads, with factors as the idle fleet behind `url` shows them under load.

    Args:
        chunk: the nodes' token budget per step.
        seconds: how long to ask, about; slow nodes longer, for a few requests at least.
        seed: of prompts and times; prompts of a seed that was used before may be cached.

    Raises:
        ConfigError: a request failed.
        ValueError: it found factors that are none.
    """
    setup = twin(profile, chunk)
    trace = coming_and_going(setup, seconds, seed)
    tell(f"{len(trace.requests)} requests that come and go, in {trace.requests[-1].at:.0f} s")
    found = fitted_to(setup, trace, replay(url, trace, seed))
    if at_bound(found, setup.overheads):
        tell("they took far more or less time than the probes: was the fleet asked by others, too?")
    return found


def twin(profile: Profile, chunk: int) -> Setup:
    """One prefill and one decode node, as the probes want them, with memory for all requests."""
    engine = EngineConfig(
        block_size=profile.layout.block_size,
        num_blocks=MOST * profile.layout.num_blocks(PROMPTS.hi + ANSWERS.hi),
        max_model_len=profile.max_model_len,
        max_num_batched_tokens=chunk,
    )
    split = Split(prefill=1, decode=1)
    return Setup(split, engine, profile.layout, profile.latency, profile.overheads)


def coming_and_going(setup: Setup, seconds: float, seed: int) -> Trace:
    """Independent requests, at a rate that leaves the nodes idle more than half of the time."""
    longest = setup.engine.max_model_len - ANSWERS.hi
    prompts = Span(min(PROMPTS.lo, longest), min(PROMPTS.hi, longest))
    specs = islice(requests(Workload(prompts, ANSWERS, PromptKind.TOKENS, seed=seed)), MOST)
    offsets = arrival_offsets(1.0, Arrival.POISSON, seed)
    made = [
        TracedRequest(at, len(spec.prompt), spec.output_len)
        for spec, at in zip(specs, offsets, strict=False)
    ]
    whole, _ = at_utilisation(setup, Trace("coming and going", tuple(made)), UTILISATION)
    number = sum(request.at <= seconds for request in whole.requests)
    return first_requests(whole, max(FEWEST, number))


def fitted_to(setup: Setup, trace: Trace, real: Sequence[RequestRecord]) -> Overheads:
    """Overheads with which the simulated requests take as long as the real ones."""
    found = probed = setup.overheads
    hops_s = HOPS_TO_FIRST_TOKEN * setup.hop_s
    for _ in range(_ROUNDS):
        simulated = simulate(replace(setup, overheads=found), trace).records
        way_s, prefill = first_tokens(real, simulated, found.front_s + hops_s)
        decode = times_as_long(real, simulated)
        front_s = max(0.0, way_s - hops_s)
        if max(abs(prefill - 1), abs(decode - 1), abs(front_s - found.front_s)) < _SETTLED:
            break
        found = replace(
            found,
            front_s=front_s,
            prefill_factor=_bounded(found.prefill_factor * prefill, probed.prefill_factor),
            decode_factor=_bounded(found.decode_factor * decode, probed.decode_factor),
        )
    return found


def first_tokens(
    real: Sequence[RequestRecord], simulated: Sequence[RequestRecord], way_s: float
) -> tuple[float, float]:
    """What requests take on their way, and how many times as long in queues and prefills.

    By least squares over prompts of many lengths, as `tuner.overheads` has it of prompts alone.

    Args:
        way_s: what the simulated ones take on their way.
    """
    told = {one.index: one.ttft for one in simulated}
    both = [(one.ttft, told.get(one.index)) for one in real]
    samples = [Sample((1.0, theirs - way_s), ours) for ours, theirs in both if ours and theirs]
    if not samples:
        return way_s, 1.0
    found_s, times = fit(samples, 2)
    if times:
        return found_s, times
    # No prompt's length shows: they take as long as was known, and the rest is the way.
    return max(0.0, median(one.seconds - one.variables[1] for one in samples)), 1.0


def _bounded(factor: float, probed: float) -> float:
    return min(max(factor, probed / BOUND), probed * BOUND)


def at_bound(found: Overheads, probed: Overheads) -> bool:
    """Whether a factor would have to be further from what the probes found."""
    prefill = found.prefill_factor / probed.prefill_factor
    decode = found.decode_factor / probed.decode_factor
    return not all(1 / BOUND < times < BOUND for times in (prefill, decode))


def times_as_long(real: Sequence[RequestRecord], simulated: Sequence[RequestRecord]) -> float:
    """Real tokens after the first, the median over requests; 1 where none tells."""
    told = {one.index: one.tpot for one in simulated}
    both = [(one.tpot, told.get(one.index)) for one in real]
    ratios = [ours / theirs for ours, theirs in both if ours and theirs]
    return median(ratios) if ratios else 1.0
