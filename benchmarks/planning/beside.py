"""Goodput of several fleets beside each other: long prompts among short chats, on real nodes.

A request's limits are those of its kind: TTFT_TIMES the median TTFT and TPOT_TIMES the median TPOT
of requests of that kind that are alone on a colocated node, where nothing is handed over. (One
limit for both kinds would be missed by every long prompt, or by no chat.)

Goodput is the highest rate at which SHARE of the requests keep both of their limits. Each fleet
begins at the rate that the simulator predicts for it, and goes up or down from there until one
rate holds and a higher one does not; between the two the share is taken for a straight line. All
fleets stand at the same time, idle but for the one that is measured, and are measured in turns. A
rate that does not hold is tried again in the next turn, and the better of both counts: what others
take of a machine differs from minute to minute.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from statistics import median

from baton.simulation.planner import Candidate, Plan, Planner
from baton.simulation.setup import Setup
from benchmarks.planning.real import TPOT_TIMES, TTFT_TIMES, drawn, merged
from tuner.goodput import Attainment, Slo, attainment
from tuner.record import RequestRecord
from tuner.replay import replay
from tuner.trace import Trace, scale_rate
from tuner.workload import Span

SHARE = 0.9
LONG_SHARE = 0.15
CHATS = (Span(32, 96), Span(16, 48))  # prompt, answer
LONG = (Span(1500, 1900), Span(8, 16))
LONG_FROM = 500  # tokens of a prompt that is no chat's
STEP = 1.3  # from one rate to the next
MAX_RATES = 5  # of one fleet
TRIES = 2  # at a rate that does not hold
WARM_RATE, NUM_WARM = 1.5, 15
Tell = Callable[[str], None]
Fleets = Callable[[Candidate], AbstractContextManager[str]]
Replay = Callable[[str, Trace, int], list[RequestRecord]]


def kind_of(record: RequestRecord) -> str:
    return "long" if record.prompt_tokens >= LONG_FROM else "chat"


def load(number: int) -> Trace:
    """Chats by a Poisson process, and long prompts between them; about one request per second.

    Long prompts come evenly: with few of them in half a minute, a random process would decide how
    much a fleet carries.
    """
    num_long = max(2, round(number * LONG_SHARE))
    chats = drawn("chats", number - num_long, *CHATS, seed=1, rate=1 - LONG_SHARE)
    longs = drawn("long", num_long, *LONG, seed=2)
    spaced = [
        replace(request, at=(index + 0.5) / LONG_SHARE)
        for index, request in enumerate(longs.requests)
    ]
    return merged("mixed", [chats, replace(longs, requests=tuple(spaced))])


def at_rate(rate: float, run_s: float) -> Trace:
    """So many seconds of the load."""
    whole = load(max(20, round(rate * run_s)))
    return scale_rate(whole, rate / (whole.rate or rate))


def alone(num_chats: int, num_long: int, chat_s: float, long_s: float) -> Trace:
    """Requests of both kinds, so far apart that each has ended before the next one comes."""
    chats = drawn("chats", num_chats, *CHATS, seed=3).requests
    longs = drawn("long", num_long, *LONG, seed=4).requests
    placed = [replace(request, at=i * chat_s) for i, request in enumerate(chats)]
    begin = num_chats * chat_s
    placed += [replace(request, at=begin + i * long_s) for i, request in enumerate(longs)]
    return Trace("alone", tuple(placed))


def limits_from(records: Sequence[RequestRecord]) -> dict[str, Slo]:
    """By kind, from requests that were alone."""
    found = {}
    for kind in ("chat", "long"):
        mine = [record for record in records if kind_of(record) == kind]
        ttft = median(record.ttft for record in mine if record.ttft is not None)
        tpot = median(record.tpot for record in mine if record.tpot is not None)
        found[kind] = Slo(TTFT_TIMES * ttft, TPOT_TIMES * tpot)
    return found


# ------------------------------------------------------------ what to compare


def chosen_fleets(
    setup: Setup,
    limits: Mapping[str, Slo],
    budgets: Sequence[int],
    default: int,
    num_requests: int,
    tell: Tell,
) -> tuple[Plan, dict[str, Candidate]]:
    """The plan for two nodes; the colocated fleet as it comes, the best other one, the plan's."""
    slo = limits["chat"]
    planner = Planner(
        setup, load(num_requests), slo, SHARE, tell, lambda record: limits[kind_of(record)]
    )
    plan = planner.plan(2, budgets)
    together = [found for found in plan.candidates if found.split.mixed]
    usual = next(found for found in together if found.token_budget == default)
    others = [found for found in together if found is not usual]
    tuned = max(others, key=lambda found: (found.rate, found.most_good))
    return plan, {"colocated": usual, "tuned": tuned, "planned": plan.best}


# ------------------------------------------------------------ measuring


@dataclass(slots=True)
class Measured:
    """One fleet: what was seen, by rate."""

    first_rate: float
    seen: dict[float, Attainment] = field(default_factory=dict)
    tries: Counter[float] = field(default_factory=Counter)

    def take(self, rate: float, share: Attainment) -> None:
        """One more try; a better one than before counts."""
        self.tries[rate] += 1
        if rate not in self.seen or share.good > self.seen[rate].good:
            self.seen[rate] = share

    @property
    def next_rate(self) -> float | None:
        """None: it is known between which rates the share falls below SHARE, or enough tried."""
        if not self.seen:
            return self.first_rate
        held, failed = self._held(), self._failed()
        if again := [rate for rate in failed if self.tries[rate] < TRIES]:
            return again[0]
        if (held and failed) or len(self.seen) >= MAX_RATES:
            return None
        return min(failed) / STEP if failed else max(held) * STEP

    def _held(self) -> list[float]:
        return [rate for rate, share in self.seen.items() if share.good >= SHARE]

    def _failed(self) -> list[float]:
        return [rate for rate, share in self.seen.items() if share.good < SHARE]

    @property
    def goodput(self) -> float:
        """Where the share crosses SHARE; 0 if no rate held, the highest one if all did."""
        held, failed = self._held(), self._failed()
        if not held or not failed:
            return max(held, default=0.0)
        low, high = max(held), min(failed)
        spare, lack = self.seen[low].good - SHARE, SHARE - self.seen[high].good
        return low + (high - low) * spare / (spare + lack)


def measured_goodput(
    candidates: Mapping[str, Candidate],
    limits: Mapping[str, Slo],
    fleets: Fleets,
    run_s: float,
    tell: Tell,
    ask: Replay = replay,
) -> dict[str, Measured]:
    """By name, in turns; raises ConfigError where a request fails."""
    found: dict[str, Measured] = {}
    urls: dict[str, str] = {}
    with ExitStack() as stack:
        for number, (name, candidate) in enumerate(candidates.items()):
            urls[name] = stack.enter_context(fleets(candidate))
            warm = scale_rate(load(NUM_WARM), WARM_RATE)
            ask(urls[name], warm, 900 + number)  # the router knows its pace then
            tell(f"{name}: {candidate}, predicted {candidate.rate:.2f}/s")
            found[name] = Measured(max(0.3, candidate.rate))
        began, seed = time.perf_counter(), 1000
        while any(one.next_rate is not None for one in found.values()):
            for name, one in found.items():
                if (rate := one.next_rate) is not None:
                    seed += 1
                    trace = at_rate(rate, run_s)
                    records = ask(urls[name], trace, seed)
                    share = attainment(records, lambda r: limits[kind_of(r)])
                    one.take(rate, share)
                    after = f"[{time.perf_counter() - began:4.0f} s] {name} at {rate:.2f}/s"
                    tell(f"{after}, {len(records)} requests: {_words(share)}")
    return found


def _words(share: Attainment) -> str:
    return f"{share.good:.0%} good (TTFT {share.ttft:.0%}, TPOT {share.tpot:.0%})"


def ratio(one: float, other: float) -> float | None:
    """None where the other one is 0: nothing was good there."""
    return round(one / other, 3) if other else None
