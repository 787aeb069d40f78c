"""The online tuner beside every static split, simulated with a measured profile.

Two phases, the first of long prompts and short answers, the second of the reverse; each comes at
nearly the rate that the split made for it carries, by the formulas of `tuner.online`: a search by
simulation over a few hundred requests would end before a queue builds up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean

from baton.simulation.setup import Setup, Split
from baton.simulation.simulate import Simulated, simulate
from baton.simulation.tuned import Known, Tuning
from benchmarks.planning.real import drawn, merged, unloaded
from tuner.goodput import Slo, attainment
from tuner.online import Costs, Observation, pressure
from tuner.record import RequestRecord
from tuner.trace import Trace, scale_rate
from tuner.workload import Span
from wire.types import Role

NUM_NODES = 6
LOAD = 0.85  # of what the phase's own split carries
SHAPES = ((Span(500, 1000), Span(8, 24)), (Span(32, 96), Span(100, 300)))
MADE_FOR = (Split(prefill=4, decode=2), Split(prefill=2, decode=4))
STATIC = tuple(Split(prefill=n, decode=NUM_NODES - n) for n in range(1, NUM_NODES))
START = Split(prefill=3, decode=3)


@dataclass(frozen=True, slots=True)
class Shares:
    """Of good requests: per phase, and of all."""

    phases: tuple[float, ...]
    overall: float


def shares(records: Sequence[RequestRecord], slo: Slo, phase_s: float) -> Shares:
    split: list[list[RequestRecord]] = [[], []]
    for record in records:
        split[min(1, int(record.due // phase_s))].append(record)
    return Shares(
        tuple(attainment(part, slo).good for part in split), attainment(records, slo).good
    )


def ratios(tuned: Shares, static: Sequence[Shares]) -> tuple[float, float]:
    """Tuned beside the best static split: in the phase where that is worst, and over all."""
    best = [max(one.phases[phase] for one in static) for phase in range(len(tuned.phases))]
    phases = [
        mine / other if other else 1.0 for mine, other in zip(tuned.phases, best, strict=True)
    ]
    overall = max(one.overall for one in static)
    return min(phases), tuned.overall / overall if overall else 1.0


@dataclass(frozen=True, slots=True)
class Changing:
    """A load whose work changes from phase to phase, the fleet that it comes to, and the limits."""

    setup: Setup
    trace: Trace
    slo: Slo
    phase_s: float

    def static(self, split: Split) -> Simulated:
        return simulate(replace(self.setup, split=split, tuning=None), self.trace)

    def tuned(self) -> Simulated:
        return self._moved(Tuning(self.slo))

    def known(self) -> Simulated:
        """Somebody moves nodes who knows when the work changes: no tuner could be better."""
        first, second = (split.prefill for split in MADE_FOR)
        to_first = (0.0, Role.PREFILL, first - START.prefill)
        return self._moved(Known((to_first, (self.phase_s, Role.DECODE, first - second))))

    def _moved(self, who: Tuning | Known) -> Simulated:
        return simulate(replace(self.setup, split=START, tuning=who), self.trace)

    def shares(self, run: Simulated) -> Shares:
        return shares(run.records, self.slo, self.phase_s)


@dataclass(frozen=True, slots=True)
class Tuned:
    """The tuner's share of good requests in relation to others'."""

    worst_phase: float  # to the best static split of each phase
    overall: float  # to the best static split
    known: float  # to who knows beforehand what comes


def changing(
    setup: Setup, num_sampled: int, phase_s: float, tell: Callable[[str], None]
) -> Changing:
    """Overheads of nodes that shared one machine are left out: six would not."""
    over = replace(setup.overheads, prefill_slowdown=1.0, decode_slowdown=1.0)
    setup = replace(setup, overheads=over)
    kinds = [drawn("phase", num_sampled, *shape, seed=i) for i, shape in enumerate(SHAPES)]
    limits = [unloaded(setup, kind) for kind in kinds]
    slo = Slo(max(one.ttft_s for one in limits), max(one.tpot_s for one in limits))
    phases = []
    for number, (kind, split) in enumerate(zip(kinds, MADE_FOR, strict=True)):
        carried = carried_rate(kind, split, setup.costs, slo)
        tell(f"phase {number + 1}: {split} carries {carried:.3g} requests per second")
        phases.append(_phase(number, LOAD * carried, phase_s))
    return Changing(setup, merged("phases", phases), slo, phase_s)


def tuned_beside_static(
    setup: Setup, num_sampled: int, phase_s: float, tell: Callable[[str], None]
) -> Tuned:
    """The tuner as the router has it, every static split, and who knows beforehand."""
    load = changing(setup, num_sampled, phase_s, tell)
    found = {str(split): load.shares(load.static(split)) for split in STATIC}
    run = load.tuned()
    tuned, known = load.shares(run), load.shares(load.known())
    for name, one in {**found, "known beforehand": known, "tuned": tuned}.items():
        told = ", ".join(f"{share:.1%}" for share in one.phases)
        tell(f"  {name}: {told} of the phases' requests good, {one.overall:.1%} of all")
    for move in run.moves:
        tell(f"  at {move.at:.0f} s {move.node} becomes {move.role.value}: {move.reason}")
    worst, overall = ratios(tuned, list(found.values()))
    return Tuned(worst, overall, tuned.overall / known.overall if known.overall else 1.0)


def carried_rate(kind: Trace, split: Split, costs: Costs, slo: Slo) -> float:
    """Requests of this kind per second at which the split's pressure is 1."""
    prompts = [request.input_len for request in kind.requests]
    outputs = mean(request.output_len for request in kind.requests)
    one_per_s = Observation(
        requests_per_s=1.0,
        answers_per_s=1.0,
        prompt_tokens=mean(prompts),
        prompt_squares=mean(tokens * tokens for tokens in prompts),
        output_tokens=outputs,
        context_tokens=mean(prompts) + outputs / 2,
        num_requests=len(prompts),
        num_prefill=split.prefill,
        num_decode=split.decode,
    )
    return 1 / pressure(one_per_s, costs, slo).worst


def _phase(number: int, rate: float, phase_s: float) -> Trace:
    """Requests of one kind for as long as the phase lasts."""
    whole = drawn("phase", max(2, int(rate * phase_s)), *SHAPES[number], seed=10 + number)
    fitted = scale_rate(whole, whole.duration_s / (phase_s * 0.999))
    later = [replace(r, at=r.at + number * phase_s) for r in fitted.requests]
    return Trace("phase", tuple(later))
