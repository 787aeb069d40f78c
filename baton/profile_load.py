"""What requests take that come and go, beside what steps in a row take.

A node that waits for work is not always at once as fast as one that computes without a pause:
caches are cold, the processor sleeps, and a host lends it to others, who keep it for a while. So a
load of its own, as random as users are, is asked of the fleet and of its simulated twin, and the
prefill and the decode formula are scaled until the twin's requests take as long, in the median.
Nothing of it is fitted to a load that is to be predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from statistics import median

from baton.simulation.setup import Setup, Split
from baton.simulation.simulate import simulate
from baton.simulation.utilisation import at_utilisation
from engine.config import EngineConfig
from tuner.arrivals import Arrival, arrival_offsets
from tuner.overheads import Overheads
from tuner.profile import Profile
from tuner.record import RequestRecord
from tuner.replay import replay
from tuner.trace import Trace, TracedRequest, first_requests
from tuner.workload import PromptKind, Span, Workload, requests

PROMPTS, ANSWERS = Span(16, 160), Span(8, 16)  # tokens
UTILISATION = 0.4  # of the busiest node, if it were as fast as with steps in a row
FEWEST = 12  # requests
MOST = 1000
_ROUNDS = 8
_BOUND = 4.0  # who is further from what the probes found did something else


def under_load(profile: Profile, url: str, chunk: int, seconds: float, seed: int) -> Overheads:
    """The profile's overheads, with factors as the idle fleet behind `url` shows them under load.

    Args:
        chunk: the nodes' token budget per step.
        seconds: how long to ask, about.
        seed: of prompts that no cache knows yet, and of when they come.

    Raises:
        ConfigError: a request failed.
    """
    setup = twin(profile, chunk)
    trace = coming_and_going(setup, seconds, seed)
    return fitted_to(setup, trace, replay(url, trace, seed))


def twin(profile: Profile, chunk: int) -> Setup:
    """One prefill and one decode node, as the probes want them."""
    engine = EngineConfig(
        block_size=profile.layout.block_size,
        num_blocks=4 * profile.layout.num_blocks(MOST),
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
    over = setup.overheads
    prefill, decode = over.prefill_factor, over.decode_factor
    most_prefill, most_decode = _BOUND * prefill, _BOUND * decode
    for _ in range(_ROUNDS):
        simulated = simulate(replace(setup, overheads=over), trace).records
        prefill = min(most_prefill, prefill * times_as_long(_ttft, real, simulated))
        decode = min(most_decode, decode * times_as_long(_tpot, real, simulated))
        over = replace(over, prefill_factor=prefill, decode_factor=decode)
    return over


def times_as_long(
    time: Callable[[RequestRecord], float | None],
    real: Sequence[RequestRecord],
    simulated: Sequence[RequestRecord],
) -> float:
    """The median over requests; 1 where none tells."""
    told = {one.index: time(one) for one in simulated}
    both = [(time(one), told.get(one.index)) for one in real]
    ratios = [ours / theirs for ours, theirs in both if ours and theirs]
    return median(ratios) if ratios else 1.0


def _ttft(record: RequestRecord) -> float | None:
    return record.ttft


def _tpot(record: RequestRecord) -> float | None:
    return record.tpot
