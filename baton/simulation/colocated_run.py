"""One simulated run of nodes that prefill and decode: what disaggregation has to beat.

A request goes to the node that would finish its prompt first, by the router's own policy; there
each is prefilled in chunks between the others' tokens, by the real scheduler.
"""

from __future__ import annotations

from functools import partial

from baton.simulation.clock import VirtualClock
from baton.simulation.fleet_run import Choice, record_of, register_message, request_work
from baton.simulation.names import PrefixNames
from baton.simulation.node import FINGERPRINT, SimulatedEngine
from baton.simulation.setup import Setup
from engine.plan import RequestProgress
from engine.request import Request
from router.dispatch import Dispatch, DispatchLimits
from router.fleet import Fleet
from router.policy import Wishes
from tuner.record import RequestRecord
from tuner.trace import Trace, TracedRequest
from wire.errors import CapacityError
from wire.messages import CacheEvents
from wire.types import NodeId, Role


class ColocatedRun:
    """Everything of one run."""

    def __init__(self, setup: Setup, trace: Trace) -> None:
        self.records: list[RequestRecord] = []
        self.clock = VirtualClock()
        self.nodes: dict[NodeId, SimulatedEngine] = {}
        self._setup = setup
        self._trace = trace
        self._names = PrefixNames(setup.engine.block_size, trace.block_len)
        self._fleet = Fleet(setup.node_timeout_s, node_stall_s=float("inf"))
        self._choices: dict[str, Choice] = {}
        self._left = len(trace.requests)
        self._events_sent: dict[NodeId, int] = {}
        machine = setup.machine(self.clock)
        for number in range(setup.split.mixed):
            id = NodeId(f"mixed-{number}", 1)
            self.nodes[id] = SimulatedEngine(id, setup, self.clock, machine, self._progress)
            self._fleet.register(id, register_message(Role.PREFILL, setup), 0.0)
            self._events_sent[id] = 0

    def run(self) -> list[RequestRecord]:
        """Until every request has ended."""
        self._arrive(0)
        for index, node in enumerate(self.nodes):
            phase = self._setup.heartbeat_s * (index + 1) / len(self.nodes)
            self.clock.at(phase, partial(self._beat, node))
        while self._left and self.clock.step():
            pass
        return self.records

    def _arrive(self, index: int) -> None:
        requests = self._trace.requests
        if index >= len(requests):
            return

        def act() -> None:
            self._submit(index, requests[index])
            self._arrive(index + 1)

        self.clock.at(requests[index].at + self._setup.overheads.front_s, act)

    def _beat(self, id: NodeId) -> None:
        engine = self.nodes[id]
        load = engine.load()
        changes = engine.take_cache_events()
        if changes:
            self._events_sent[id] += 1
            number = self._events_sent[id]
            events = CacheEvents(
                number, changes.added, changes.removed, changes.snapshot or number == 1
            )
            self._fleet[id].cache.apply(events)
        self._fleet.heartbeat(id, load, self.clock.now)
        self.clock.after(self._setup.heartbeat_s, partial(self._beat, id))

    def _submit(self, index: int, traced: TracedRequest) -> None:
        now = self.clock.now
        names = self._names.of(index, traced)
        work = request_work(index, traced, names, self._setup.engine.block_size)
        dispatch = Dispatch(work, self._fleet, DispatchLimits(), now)  # keeps the request only
        choice = Choice(index, traced.at, traced, work, dispatch)
        node = self._fleet.pick_prefill(work, Wishes(now=now))
        assert node is not None
        choice.prefill = node
        self._choices[work.request] = choice
        self._fleet.assign(node, work.request, work.num_tokens, 0)
        self.clock.after(2 * self._setup.hop_s, partial(self._start, node, choice))

    def _start(self, node: NodeId, choice: Choice) -> None:
        work = choice.work
        request = Request(
            request_id=work.request,
            tokens=list(work.prompt.tokens),
            num_prompt_tokens=work.num_tokens,
            sampling=work.sampling,
            max_num_tokens=work.max_num_tokens,
            block_hashes=list(work.block_hashes(FINGERPRINT, self._setup.engine.block_size)),
        )
        try:
            self.nodes[node].add(request)
        except (CapacityError, ValueError):
            self._ended(choice, "capacity")

    def _progress(self, progress: RequestProgress) -> None:
        choice = self._choices[progress.request_id]
        if progress.new_tokens and choice.first_at is None:
            choice.first_at = self.clock.now + self._setup.hop_s
            assert choice.prefill is not None
            self._fleet.assign(choice.prefill, progress.request_id, 0, 0)  # its prompt is done
        if progress.finish_reason is not None:
            self.clock.after(self._setup.hop_s, partial(self._ended, choice, None))

    def _ended(self, choice: Choice, error: str | None) -> None:
        assert choice.prefill is not None
        del self._choices[choice.work.request]
        self._fleet.unassign(choice.prefill, choice.work.request)
        self.records.append(record_of(choice, self.clock.now, error))
        self._left -= 1
