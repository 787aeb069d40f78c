"""The control of draft lengths, on a made-up machine: what pays is done, what does not is not."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from engine.drafting.control import (
    LEARNING_STEPS,
    LONGEST_PAUSE,
    LOOK_EVERY,
    OFF_MARGIN,
    ON_MARGIN,
    PLAIN_EVERY,
    Controller,
    Decoding,
    Drafted,
    Observed,
)


class Machine:
    """Steps cost a + b * context + c * rows; drafting a token costs `draft_s` where it has to."""

    def __init__(
        self, controller: Controller, *, row_s: float, draft_s: float = 0.0, noise: float = 0.0
    ) -> None:
        self.controller = controller
        self._row_s = row_s
        self._draft_s = draft_s
        self._noise = noise
        self._rng = random.Random(0)
        self.seconds = 0.0
        self.num_tokens = 0
        self.lengths: list[int] = []

    def step(self, acceptances: list[float], context: int = 100) -> list[int]:
        """One step of as many requests; returns the lengths that were chosen."""
        most = self.controller.num_speculative_tokens
        names = [str(number) for number in range(len(acceptances))]
        chosen = [0] * len(names)
        if not self.controller.pauses(len(names)):
            chosen = self.controller.lengths([Decoding(name, context, most) for name in names])
        drafts = [
            self._draft(name, length, share)
            for name, length, share in zip(names, chosen, acceptances, strict=True)
        ]
        num_drafted = sum(chosen)
        rows = len(chosen) + num_drafted
        step_s = 0.001 + 1e-7 * context * len(chosen) + self._row_s * rows
        step_s *= 1 + self._noise * self._rng.random() ** 8
        draft_s = self._draft_s * max(chosen)
        self.controller.observe(
            Observed(
                context=context * len(chosen),
                num_requests=len(chosen),
                num_rows=rows,
                longest_draft=max(chosen),
                num_drafted=num_drafted,
                draft_s=draft_s,
                step_s=step_s,
                drafts=drafts,
            )
        )
        self.seconds += step_s + draft_s
        self.num_tokens += len(chosen) + sum(d.num_accepted for d in drafts)
        self.lengths.append(max(chosen))
        return chosen

    def _draft(self, name: str, length: int, share: float) -> Drafted:
        accepted = 0
        while accepted < length and self._rng.random() < share:
            accepted += 1
        return Drafted(name, length, length, accepted, min(length, accepted + 1))

    def rate(self, acceptances: list[float], num_steps: int = 300) -> float:
        """Tokens per second of steps from here on."""
        self.seconds, self.num_tokens, self.lengths = 0.0, 0, []
        for _ in range(num_steps):
            self.step(acceptances)
        return self.num_tokens / self.seconds


def plain_rate(num_requests: int, row_s: float) -> float:
    """Without drafts."""
    return num_requests / (0.001 + 1e-5 * num_requests + row_s * num_requests)


def ideal_rate(num_requests: int, row_s: float, draft_s: float, share: float, most: int) -> float:
    """With the best length, known in advance."""
    rates = []
    for length in range(most + 1):
        tokens = num_requests * sum(share**k for k in range(length + 1))
        rows = num_requests * (1 + length)
        seconds = 0.001 + 1e-5 * num_requests + row_s * rows + draft_s * length
        rates.append(tokens / seconds)
    return max(rates)


@pytest.mark.parametrize("noise", [0.0, 3.0])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.95])
@pytest.mark.parametrize(
    ("num_requests", "row_s", "draft_s"),
    [(1, 1e-5, 0.0), (1, 5e-5, 1e-4), (1, 1e-4, 5e-4), (16, 1e-5, 1e-4), (16, 2e-4, 1e-4)],
)
def test_it_comes_near_the_best_length(
    num_requests: int, row_s: float, draft_s: float, share: float, noise: float
) -> None:
    machine = Machine(Controller(6), row_s=row_s, draft_s=draft_s, noise=noise)
    machine.rate([share] * num_requests, 60)  # learns
    rate = machine.rate([share] * num_requests)
    best = ideal_rate(num_requests, row_s, draft_s, share, 6)
    slower = 1 + noise / 9  # the noise's mean
    assert rate * slower > (0.85 if noise else 0.9) * best
    assert rate * slower > (0.9 if noise else 0.96) * plain_rate(num_requests, row_s)


def test_lengths_are_each_requests_own() -> None:
    machine = Machine(Controller(6), row_s=4e-5)
    machine.rate([0.9, 0.05, 0.9, 0.05], 100)
    chosen = machine.step([0.9, 0.05, 0.9, 0.05])
    assert min(chosen[0], chosen[2]) > max(chosen[1], chosen[3])


def test_where_nothing_pays_probes_become_rare_and_find_the_change() -> None:
    machine = Machine(Controller(4), row_s=4e-4)
    machine.rate([0.05] * 4, 3 * LONGEST_PAUSE)
    drafted = sum(length > 0 for length in machine.lengths[LONGEST_PAUSE:])
    assert 1 <= drafted <= 8
    assert not machine.controller.speculating
    machine = Machine(Controller(4), row_s=4e-5)
    machine.rate([0.01], 200)
    assert not machine.controller.speculating
    machine.rate([0.95], 4 * LONGEST_PAUSE)
    assert machine.controller.speculating


def test_steps_that_could_not_be_drafted_teach_nothing_about_drafts() -> None:
    machine = Machine(Controller(0), row_s=1e-5)
    machine.rate([0.9], 100)
    machine.controller.num_speculative_tokens = 4
    machine.rate([0.9], 20)
    assert any(machine.lengths)


def test_what_may_not_be_drafted_is_not() -> None:
    controller = Controller(5, adaptive=False)
    batch = [Decoding("a", 10, 0), Decoding("b", 10, 2), Decoding("c", 10, 5)]
    assert controller.lengths(batch) == [0, 2, 5]
    assert Controller(5).lengths([Decoding("a", 10, 0)]) == [0]
    assert Controller(5).lengths([]) == []


def test_a_gain_between_the_margins_changes_nothing() -> None:
    """Else noise of a few per cent would switch drafting on and off for ever."""
    between = (ON_MARGIN + OFF_MARGIN) / 2
    for on in (True, False):
        controller = Learned(gain=between, on=on)
        for _ in range(40):
            controller.pauses(1)
            controller.lengths([Decoding("a", 10, 4)])
        assert controller.speculating is on
        for gain, then in ((OFF_MARGIN - 0.01, False), (ON_MARGIN + 0.01, True)):
            controller.gain = gain
            for _ in range(LOOK_EVERY):
                controller.pauses(1)
                controller.lengths([Decoding("a", 10, 4)])
            assert controller.speculating is then


class Learned(Controller):
    """It has looked often enough, and finds the gain that a test wants."""

    def __init__(self, *, gain: float, on: bool) -> None:
        super().__init__(4, _num_learning=LEARNING_STEPS, _on=on)
        self.gain = gain

    def _best(self, batch: Sequence[Decoding]) -> tuple[list[int], float]:
        return [request.most for request in batch], self.gain


def test_one_step_in_many_goes_without_drafts_so_that_the_comparison_stays_true() -> None:
    machine = Machine(Controller(4), row_s=1e-5)
    machine.rate([0.95] * 2, 3 * PLAIN_EVERY)
    plain = [number for number, length in enumerate(machine.lengths[20:]) if not length]
    assert machine.controller.speculating
    assert len(plain) in (2, 3)


def test_lengths_that_were_decided_end_where_a_request_does() -> None:
    controller = Learned(gain=2.0, on=True)
    assert controller.lengths([Decoding("a", 10, 4), Decoding("b", 10, 4)]) == [4, 4]
    assert controller.lengths([Decoding("b", 14, 0), Decoding("a", 14, 3)]) == [0, 3]
