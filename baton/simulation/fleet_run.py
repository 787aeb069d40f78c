"""One simulated run of a fleet: arrivals, the router's part, and the records.

The router's decisions are `router.node_chooser`, `router.admission` and `router.dispatch`
themselves; what stands here only carries their effects, as `router.requests` does on a network.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from baton.simulation.clock import VirtualClock
from baton.simulation.names import PrefixNames
from baton.simulation.node import FINGERPRINT
from baton.simulation.roles import DecodeNode, NodeMessage, PrefillNode
from baton.simulation.setup import Setup
from baton.simulation.tuned import Mover, SimulatedTuner, Tuning
from router.admission import Admission
from router.assignment import Assignment
from router.dispatch import Dispatch, DispatchLimits
from router.effects import AttemptEnded, Effect, Failed, NeedsCapacity, Output, Send, Taken
from router.errors import ApiError
from router.fleet import Fleet
from router.judge import Judge, Told
from router.node_chooser import NodeChooser
from router.work import Prompt, Work
from tuner.record import RequestRecord
from tuner.trace import Trace, TracedRequest
from wire.fleet_messages import CacheEvents, ModelInfo, Register
from wire.messages import Message
from wire.request_messages import (
    AttemptFailed,
    Generate,
    Granted,
    Prefill,
    Rebind,
    Refused,
    Reserve,
    TokenUpdate,
)
from wire.types import NodeId, Role, SamplingParams


@dataclass(slots=True, eq=False)
class Choice:
    """One request on its way."""

    index: int
    due: float
    traced: TracedRequest
    work: Work
    dispatch: Dispatch
    assigned: Assignment
    first_at: float | None = None


def register_message(role: Role, setup: Setup) -> Register:
    limit, seats = setup.engine.max_model_len, setup.engine.max_num_seqs
    model = ModelInfo("simulated", FINGERPRINT, "simulated", limit, 1 << 30, ())
    num_blocks = setup.engine.num_blocks
    return Register(role, model, setup.layout, num_blocks, "-", (), "-", num_seats=seats)


def request_work(index: int, traced: TracedRequest, names: list[bytes], block_size: int) -> Work:
    """Every token of a request is its number: no two requests agree by accident."""
    hashes = {(FINGERPRINT, block_size): names}
    prompt = Prompt((index + 1,) * traced.input_len, "", hashes)
    sampling = SamplingParams(max_tokens=traced.output_len, ignore_eos=True)
    return Work(str(index), prompt, sampling)


class FleetRun:
    """Everything of one run."""

    def __init__(self, setup: Setup, trace: Trace) -> None:
        self.records: list[RequestRecord] = []
        self.clock = VirtualClock()
        self._setup = setup
        self._trace = trace
        self._names = PrefixNames(setup.engine.block_size, trace.block_len)
        judge = Judge(setup.rules, Told(setup.pace(trace) if trace.requests else None))
        self._fleet = Fleet(setup.node_timeout_s, float("inf"))
        self._chooser = NodeChooser(self._fleet, judge)
        self._admission: Admission[str] = Admission(setup.max_streams, setup.max_waiting)
        self._choices: dict[str, Choice] = {}
        self._left = len(trace.requests)
        self.decode_nodes: dict[NodeId, DecodeNode] = {}
        self.prefill_nodes: dict[NodeId, PrefillNode] = {}
        self._machine = setup.machine(self.clock)
        self._events_sent: dict[NodeId, int] = {}
        for number in range(setup.split.decode):
            self._make_node(NodeId(f"decode-{number}", 1), Role.DECODE)
        for number in range(setup.split.mixed):
            self._make_node(NodeId(f"mixed-{number}", 1), Role.MIXED)
        for number in range(setup.split.prefill):
            self._make_node(NodeId(f"prefill-{number}", 1), Role.PREFILL)
        self.mover: Mover | None = None
        self.tuner = self._make_tuner()

    @property
    def nodes(self) -> dict[NodeId, DecodeNode | PrefillNode]:
        return {**self.prefill_nodes, **self.decode_nodes}

    def _node(self, id: NodeId) -> DecodeNode | PrefillNode:
        return self.prefill_nodes.get(id) or self.decode_nodes[id]

    def _make_node(self, id: NodeId, role: Role) -> None:
        setup, clock = self._setup, self.clock
        machine = self._machine
        if role.receives:
            node = DecodeNode(id, setup, clock, machine, self._hashes, self._tell)
            self.decode_nodes[id] = node
        else:
            self.prefill_nodes[id] = PrefillNode(
                id, setup, clock, machine, self._hashes, self._tell, self.decode_nodes
            )
        self._events_sent[id] = 0
        self._fleet.register(id, register_message(role, setup), clock.now)

    def _make_tuner(self) -> SimulatedTuner | None:
        """Nobody, who knows what comes, or the tuner."""
        setup, clock = self._setup, self.clock
        tuning = setup.tuning
        if tuning is None:
            return None
        self.mover = Mover(
            self._fleet,
            clock,
            tuning.switch_s,
            is_idle=lambda node: self._node(node).is_idle,
            change=self._change_role,
        )
        if isinstance(tuning, Tuning):
            waiting = self._admission
            return SimulatedTuner(
                tuning,
                setup.costs,
                self._fleet,
                clock,
                self.mover,
                lambda: waiting.num_waiting,
            )
        for at, role, count in tuning.moves:
            clock.at(at, partial(self.mover.begin, role, count, "it is known"))
        return None

    def _change_role(self, node: NodeId, role: Role) -> None:
        """It comes back as a new incarnation; the old one answers nobody."""
        self._node(node).engine.stop()
        successor = NodeId(node.name, node.incarnation + 1)
        self._make_node(successor, role)
        self.clock.after(self._setup.heartbeat_s, partial(self._beat, successor))
        self._pump()

    def _hashes(self, request: str) -> list[bytes]:
        """A new list each time: engines append to theirs."""
        choice = self._choices.get(request)
        size = self._setup.engine.block_size
        return list(choice.work.block_hashes(FINGERPRINT, size)) if choice else []

    # ------------------------------------------------------------ time

    def run(self) -> list[RequestRecord]:
        """Until every request has ended."""
        self._arrive(0)
        for index, node in enumerate(self.nodes):
            phase = self._setup.heartbeat_s * (index + 1) / len(self.nodes)
            self.clock.at(phase, partial(self._beat, node))
        self.clock.after(self._setup.heartbeat_s, self._tick)
        for failure in self._setup.failures:
            self.clock.at(failure.at, partial(self._kill, failure.node))
        while self._left and self.clock.step():
            pass
        return self.records

    def _arrive(self, index: int) -> None:
        """Take request `index`, and set the time of the next."""
        requests = self._trace.requests
        if index >= len(requests):
            return
        traced = requests[index]

        def act() -> None:
            self._submit(index, traced)
            self._arrive(index + 1)

        self.clock.at(traced.at + self._setup.overheads.front_s, act)

    def _beat(self, id: NodeId) -> None:
        """A node's heartbeat, with what its cache has gained and lost."""
        node = self._node(id)
        if node.engine.stopped or id not in self._fleet:
            return
        load = node.engine.load()
        changes = node.engine.take_cache_events()
        if changes:
            self._events_sent[id] += 1
            number = self._events_sent[id]
            first = number == 1  # a router knows a node's cache from a snapshot on
            events = CacheEvents(number, changes.added, changes.removed, changes.snapshot or first)
            self._fleet[id].cache.apply(events)
        self._fleet.heartbeat(id, load, self.clock.now)
        self._admission.unblock()
        self._pump()
        self.clock.after(self._setup.heartbeat_s, partial(self._beat, id))

    def _tick(self) -> None:
        for node in self._fleet.expire(self.clock.now):
            for choice in list(self._choices.values()):
                self._perform(choice, choice.dispatch.node_lost(node, self.clock.now))
        for choice in list(self._choices.values()):
            self._perform(choice, choice.dispatch.tick(self.clock.now))
        self._pump()
        self.clock.after(self._setup.heartbeat_s, self._tick)

    def _kill(self, name: str) -> None:
        for id, node in self.nodes.items():
            if id.name == name:
                node.engine.stop()

    # ------------------------------------------------------------ requests

    def _submit(self, index: int, traced: TracedRequest) -> None:
        now = self.clock.now
        names = self._names.of(index, traced)
        work = request_work(index, traced, names, self._setup.engine.block_size)
        if self.tuner is not None:
            self.tuner.arrived(work.num_tokens)
        dispatch = Dispatch(work, self._chooser, DispatchLimits(silence_s=float("inf")), now)
        choice = Choice(index, traced.at, traced, work, dispatch, Assignment(work))
        try:
            self._admission.check(1)
        except ApiError as error:
            self._ended(choice, error.code or "refused")
            return
        self._choices[work.request] = choice
        dispatch.enter_queue(now)
        if self._admission.enter(work.request):
            self._perform(choice, dispatch.place(now))

    def _pump(self) -> None:
        while (request := self._admission.next(self.clock.now)) is not None:
            choice = self._choices[request]
            self._perform(choice, choice.dispatch.place(self.clock.now))

    def _tell(self, sender: NodeId, message: NodeMessage) -> None:
        """A node's message is on its way to the router."""
        self.clock.after(self._setup.hop_s, partial(self._heard, sender, message))

    def _heard(self, sender: NodeId, message: NodeMessage) -> None:
        now = self.clock.now
        choice = self._choices.get(message.id.request)
        if choice is None:
            return
        dispatch = choice.dispatch
        match message:
            case Granted():
                self._perform(choice, dispatch.granted(sender, message, now))
                self._pump()
            case Refused():
                if message.id == dispatch.id and sender == choice.assigned.decode:
                    choice.assigned.end(self._fleet)
                self._perform(choice, dispatch.refused(sender, message, now))
            case TokenUpdate():
                self._perform(choice, dispatch.tokens(sender, message, now))
            case AttemptFailed():
                self._perform(choice, dispatch.attempt_failed(sender, message, now))

    # ------------------------------------------------------------ effects

    def _perform(self, choice: Choice, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send():
                    self._deliver(choice, effect)
                case Output():
                    self._output(choice, effect)
                case NeedsCapacity():
                    choice.assigned.end(self._fleet)
                    request = choice.work.request
                    self._admission.wait(request, self.clock.now, effect.retry_after_s)
                case AttemptEnded():
                    choice.assigned.end(self._fleet)
                case Taken():
                    self._admission.settle(choice.work.request)
                case Failed():
                    self._ended(choice, effect.error.code or "error")

    def _deliver(self, choice: Choice, send: Send) -> None:
        self._note(choice, send.to, send.message)
        self.clock.after(self._setup.hop_s, partial(self._arrived, send.to, send.message))

    def _note(self, choice: Choice, to: NodeId, message: Message) -> None:
        """Of work that begins, the load on its nodes, as `router.deliveries` remembers it."""
        match message:
            case Reserve():
                choice.assigned.answers(self._fleet, to)
                self._computes(choice, message.prefill, len(message.tokens))
            case Rebind():
                choice.assigned.answers(self._fleet, to, counted=True)
                num_tokens = choice.work.num_tokens + len(message.output_tokens)
                self._computes(choice, message.prefill, num_tokens)
            case Generate():
                choice.assigned.answers(self._fleet, to)
                self._computes(choice, to, len(message.tokens))
                if choice.dispatch.verdict is not None:
                    self._chooser.taken(to, choice.dispatch.verdict.taken_s, self.clock.now)
            case Prefill():
                self._admission.settle(choice.work.request)
                self._computes(choice, to, len(message.tokens))

    def _computes(self, choice: Choice, node: NodeId, num_tokens: int) -> None:
        choice.assigned.computes(self._fleet, node, num_tokens, choice.dispatch.near)

    def _arrived(self, to: NodeId, message: Message) -> None:
        node = self._node(to)
        if not node.engine.stopped:
            node.handle(message)

    def _output(self, choice: Choice, output: Output) -> None:
        if choice.first_at is None:
            choice.first_at = self.clock.now
        choice.assigned.prompt_done(self._fleet)
        if output.finish is not None:
            self._ended(choice, None)

    def _ended(self, choice: Choice, error: str | None) -> None:
        """Write the record; somebody else may have room now."""
        if self._choices.pop(choice.work.request, None) is not None:
            choice.assigned.end(self._fleet)
            self._admission.leave(choice.work.request)
        record = record_of(choice, self.clock.now, error)
        if self.tuner is not None and error is None:
            self.tuner.ended(choice.traced, record)
        self.records.append(record)
        self._left -= 1
        self._pump()


def record_of(choice: Choice, now: float, error: str | None) -> RequestRecord:
    """As a client would have seen it: times of the first and the last token."""
    times = () if choice.first_at is None else (choice.first_at, now)
    return RequestRecord(
        index=choice.index,
        due=choice.due,
        start=choice.due,
        end=now,
        chunk_times=times,
        prompt_tokens=choice.traced.input_len,
        output_tokens=choice.traced.output_len if error is None else 0,
        error=error,
    )
