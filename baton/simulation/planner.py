"""Finds the split of a number of nodes with the highest goodput, by simulation.

Every split of the nodes into prefill and decode, and all of them colocated, with each token budget:
the highest rate of the workload at which enough requests keep both limits. With prefill and decode
nodes the router chooses for each request whether to hand it over, as it does by default; so mixed
nodes in place of the decode nodes would be no other fleet. Ties go to the fleet that is named
first, and colocated ones are: where disaggregation does not pay, it is not chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from baton.simulation.setup import Setup, Split
from baton.simulation.simulate import simulate
from router.way import Rules
from tuner.goodput import Attainment, Slo, SloOf, attainment, highest_rate
from tuner.report import Summary, summarize
from tuner.trace import Trace, scale_rate

AUTO = Rules()
OVERLOAD = 1.15  # of the best rate: what fails there is the bottleneck
Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Point:
    """One simulated rate of one fleet."""

    rate: float
    attained: Attainment
    ttft_s: Summary
    tpot_s: Summary
    busy: dict[str, float]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One fleet and what it can do."""

    split: Split
    token_budget: int
    rate: float  # requests per second at which the share of good ones is reached; 0: at none
    points: tuple[Point, ...]  # all rates that were tried, the lowest first

    @property
    def per_node(self) -> float:
        return self.rate / self.split.num_nodes

    @property
    def most_good(self) -> float:
        return max(point.attained.good for point in self.points)

    @property
    def colocated(self) -> bool:
        return self.split.prefill == 0

    @property
    def fails_by(self) -> str:
        """The limit that most requests miss at the lowest rate that it does not carry."""
        beyond = next((point for point in self.points if point.rate > self.rate), self.points[-1])
        return "TTFT" if beyond.attained.ttft <= beyond.attained.tpot else "TPOT"

    @property
    def flags(self) -> str:
        """What makes `baton serve` such a fleet."""
        split = self.split
        counts = {"--prefill": split.prefill, "--decode": split.decode, "--mixed": split.mixed}
        given = [f"{flag} {count}" for flag, count in counts.items() if count]
        return " ".join([*given, f"--max-num-batched-tokens {self.token_budget}"])

    def __str__(self) -> str:
        return f"{self.split}, {self.token_budget} tokens per step"


@dataclass(frozen=True, slots=True)
class Plan:
    """The choice, all that it was chosen from, and what one more node would bring."""

    best: Candidate
    candidates: tuple[Candidate, ...]
    one_more: tuple[Candidate, ...]
    bottleneck: str
    slo: Slo
    share: float

    @property
    def possible(self) -> bool:
        return self.best.rate > 0


class Planner:
    """Tries fleets on one workload."""

    def __init__(
        self,
        setup: Setup,
        trace: Trace,
        slo: Slo,
        share: float,
        tell: Tell = lambda _: None,
        slo_of: SloOf | None = None,
    ) -> None:
        """`slo_of`: limits per request, instead of the same for all of them."""
        self._setup = setup
        self._trace = trace
        self._slo = slo
        self._judged_by = slo_of or slo
        self._share = share
        self._tell = tell

    def plan(
        self, num_nodes: int, token_budgets: Sequence[int], further: Sequence[int] = ()
    ) -> Plan:
        """Try everything that `num_nodes` nodes can be.

        The `further` token budgets are tried only with the colocated fleet and with the split that
        is best so far: with all of them it would take several times as long.
        """
        candidates = [
            self.candidate(split, budget)
            for split in splits_of(num_nodes)
            for budget in token_budgets
        ]
        for kind in (True, False):
            alike = [one for one in candidates if one.colocated is kind]
            if alike and further:
                split = max(alike, key=_worth).split
                candidates += [self.candidate(split, budget) for budget in further]
        best = max(candidates, key=_worth)
        more: list[Candidate] = []
        if best.rate:
            more = [self.candidate(split, best.token_budget) for split in larger(best.split)]
        bottleneck = self._bottleneck(best)
        return Plan(best, tuple(candidates), tuple(more), bottleneck, self._slo, self._share)

    def candidate(self, split: Split, token_budget: int) -> Candidate:
        """The highest rate that one fleet carries."""
        points: list[Point] = []

        def holds(rate: float) -> bool:
            points.append(self._point(split, token_budget, rate))
            return points[-1].attained.good >= self._share

        rate = highest_rate(holds, self._trace.rate or 1.0)
        points.sort(key=lambda point: point.rate)
        found = Candidate(split, token_budget, rate, tuple(points))
        self._tell(f"{found}: {rate:.3g} requests per second, {found.per_node:.3g} per node")
        return found

    def _point(self, split: Split, token_budget: int, rate: float) -> Point:
        engine = replace(self._setup.engine, max_num_batched_tokens=token_budget)
        setup = replace(self._setup, split=split, engine=engine, rules=AUTO)
        trace = scale_rate(self._trace, rate / (self._trace.rate or 1.0))
        found = simulate(setup, trace)
        return Point(
            rate=rate,
            attained=attainment(found.records, self._judged_by),
            ttft_s=summarize(r.ttft for r in found.records if r.ttft is not None),
            tpot_s=summarize(r.tpot for r in found.records if r.tpot is not None),
            busy=found.busy,
        )

    def _bottleneck(self, best: Candidate) -> str:
        """What fails first when there is a little more load than the fleet carries."""
        if best.rate:
            point = self._point(best.split, best.token_budget, OVERLOAD * best.rate)
        else:
            point = best.points[0]
        missed_ttft, missed_tpot = 1 - point.attained.ttft, 1 - point.attained.tpot
        first = "TTFT" if missed_ttft >= missed_tpot else "TPOT"
        if best.split.mixed:
            where = "the colocated nodes"
        else:
            where = "the prefill nodes" if first == "TTFT" else "the decode nodes"
        text = f"{where}: at {point.rate:.3g} requests per second {missed_ttft:.0%} miss the TTFT"
        return f"{text} and {missed_tpot:.0%} the TPOT"


def _worth(candidate: Candidate) -> tuple[float, float]:
    return candidate.rate, candidate.most_good


def splits_of(num_nodes: int) -> list[Split]:
    """Colocated first, then from one prefill node up."""
    apart = [Split(prefill=p, decode=num_nodes - p) for p in range(1, num_nodes)]
    return [Split(mixed=num_nodes), *apart]


def larger(split: Split) -> list[Split]:
    """With one more node of each kind."""
    if split.mixed:
        return [replace(split, mixed=split.mixed + 1)]
    return [
        replace(split, prefill=split.prefill + 1),
        replace(split, decode=split.decode + 1),
    ]
