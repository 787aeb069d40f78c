"""The two disciplines, against a pretended endpoint."""

from __future__ import annotations

import asyncio
from itertools import islice

from tuner.drive import Limits, closed_loop, open_loop
from tuner.record import RequestRecord
from tuner.workload import RequestSpec, Span, Workload, requests

WORKLOAD = Workload(Span(1, 1), Span(1, 1))


class FakeClock:
    """Moves only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeEndpoint:
    """Answers after three turns of the event loop and remembers how many asked at once."""

    def __init__(self, clock: FakeClock, seconds_per_request: float = 0.0) -> None:
        self.clock = clock
        self.seconds = seconds_per_request
        self.in_flight = 0
        self.peak = 0
        self.records: list[RequestRecord] = []

    async def send(self, spec: RequestSpec, due: float) -> RequestRecord:
        start = self.clock()
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        for _ in range(3):
            await asyncio.sleep(0)
        self.in_flight -= 1
        self.clock.now += self.seconds
        return RequestRecord(spec.index, due, start, self.clock())


def test_closed_loop_keeps_the_concurrency_and_sends_each_request_once() -> None:
    clock = FakeClock()
    endpoint = FakeEndpoint(clock)
    specs = Limits(20, None).take(requests(WORKLOAD), clock)
    asyncio.run(closed_loop(specs, 4, endpoint.send, endpoint.records.append, clock))
    assert endpoint.peak == 4
    assert sorted(record.index for record in endpoint.records) == list(range(20))


def test_closed_loop_stops_sending_after_the_duration() -> None:
    clock = FakeClock()
    endpoint = FakeEndpoint(clock, seconds_per_request=1.0)
    specs = Limits(None, 5.0).take(requests(WORKLOAD), clock)
    asyncio.run(closed_loop(specs, 1, endpoint.send, endpoint.records.append, clock))
    assert len(endpoint.records) == 5


def test_open_loop_sends_at_the_offsets_whatever_is_in_flight() -> None:
    clock = FakeClock()
    endpoint = FakeEndpoint(clock)
    specs = Limits(10, None).take(requests(WORKLOAD), clock)
    offsets = [0.0] * 10
    asyncio.run(open_loop(specs, offsets, 100, endpoint.send, endpoint.records.append, clock))
    assert len(endpoint.records) == 10
    assert {record.due for record in endpoint.records} == {100.0}


def test_open_loop_at_its_limit_shows_lateness() -> None:
    clock = FakeClock()
    endpoint = FakeEndpoint(clock, seconds_per_request=1.0)
    specs = Limits(4, None).take(requests(WORKLOAD), clock)
    asyncio.run(open_loop(specs, [0.0] * 9, 1, endpoint.send, endpoint.records.append, clock))
    assert endpoint.peak == 1
    assert [record.start - record.due for record in endpoint.records] == [0, 1, 2, 3]


def test_limits() -> None:
    clock = FakeClock()
    assert len(list(Limits(3, None).take(requests(WORKLOAD), clock))) == 3
    assert list(Limits(None, 1.0).within([0.0, 0.5, 1.0, 1.5])) == [0.0, 0.5]
    endless = Limits(None, None)
    assert len(list(islice(endless.take(requests(WORKLOAD), clock), 7))) == 7
    assert list(endless.within([5.0])) == [5.0]
