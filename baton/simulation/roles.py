"""What simulated prefill and decode nodes do with the router's messages.

The messages, the engine's decisions and the order of events are the real ones; bytes are time on
two links. A node sends and receives one transfer at a time, so handoffs wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from baton.simulation.clock import VirtualClock
from baton.simulation.machine import SharedMachine
from baton.simulation.node import SimulatedEngine
from baton.simulation.setup import Setup
from engine.plan import RequestProgress
from engine.request import Request
from engine.reservations import Reservation
from wire.errors import CapacityError
from wire.geometry import geometry_for
from wire.messages import Message
from wire.request_messages import (
    Abort,
    Ack,
    AttemptFailed,
    Generate,
    Grant,
    Granted,
    Prefill,
    Rebind,
    Refused,
    Reserve,
    TokenUpdate,
)
from wire.types import AttemptId, NodeId

SECRET = bytes(16)
RETRY_AFTER_S = 0.1
Hashes = Callable[[str], list[bytes]]
NodeMessage = Granted | Refused | TokenUpdate | AttemptFailed
Tell = Callable[[NodeId, NodeMessage], None]


@dataclass(slots=True)
class Link:
    """One direction of a node's network: what it has taken on keeps it busy until then."""

    free_at: float = 0.0


@dataclass(slots=True)
class _Held:
    """A reservation, and the request it is for."""

    reserve: Reserve
    id: AttemptId
    reservation: Reservation


class DecodeNode:
    """Reserves, adopts, decodes; serves whole requests where it is asked to, as mixed nodes do."""

    def __init__(
        self,
        id: NodeId,
        setup: Setup,
        clock: VirtualClock,
        machine: SharedMachine | None,
        hashes: Hashes,
        tell: Tell,
    ) -> None:
        self.id = id
        self.engine = SimulatedEngine(id, setup, clock, machine, self._progress)
        self.link = Link()
        self._layout = setup.layout
        self._hashes = hashes
        self._tell = tell
        self._held: dict[str, _Held] = {}
        self._running: dict[str, tuple[AttemptId, Request]] = {}
        self._computing: set[AttemptId] = set()  # of which the prompt is computed here

    @property
    def is_idle(self) -> bool:
        """Whether nothing is held, and nothing runs."""
        return not self._held and not self._running

    def handle(self, message: Message) -> None:
        match message:
            case Reserve():
                self._reserve(message)
            case Rebind():
                self._rebind(message)
            case Generate():
                self._generate(message)
            case Prefill():  # of a single token: there is nobody to hand over to
                self._generate(message)
            case Abort():
                self._abort(message.id)

    def _reserve(self, message: Reserve) -> None:
        most = message.num_prompt_tokens + message.sampling.max_tokens
        hashes = self._hashes(message.id.request)
        try:
            reservation = self.engine.reserve(message.tokens, most, hashes)
        except CapacityError as error:
            self._tell(self.id, Refused(message.id, "capacity", str(error), RETRY_AFTER_S))
            return
        self._grant(_Held(message, message.id, reservation))

    def _generate(self, message: Generate | Prefill) -> None:
        """Take the whole request, or say that there is no room."""
        id = message.id
        request = _request(message, message.tokens)
        request.block_hashes = self._hashes(id.request)
        try:
            self.engine.add(request, only_with_room=True)
        except CapacityError as error:
            self._tell(self.id, Refused(id, "capacity", str(error), RETRY_AFTER_S))
            return
        self._running[id.request] = (id, request)
        self._computing.add(id)
        self._tell(self.id, TokenUpdate(id, 0, tuple(request.output_tokens)))

    def _rebind(self, message: Rebind) -> None:
        held = self._held.get(message.id.request)
        if held is None:
            self._tell(self.id, Refused(message.id, "gone", "no such lease", RETRY_AFTER_S))
            return
        prompt = held.reserve.tokens[: held.reserve.num_prompt_tokens]
        tokens = prompt + message.output_tokens
        hashes = self._hashes(message.id.request)
        held.reservation = self.engine.rebind(held.reservation.id, tokens, hashes)
        held.id = message.id
        self._grant(held)

    def _grant(self, held: _Held) -> None:
        self._held[held.id.request] = held
        reservation = held.reservation
        grant = Grant(
            lease=reservation.id,
            capability=SECRET,
            digest_key=SECRET,
            decode=self.id,
            peer_url="simulated",
            transports=(),
            layout=self._layout,
            geometry=geometry_for(self._layout),
            handles=reservation.handles,
            num_cached_tokens=reservation.num_cached_tokens,
            ttl_s=10.0,
        )
        self._tell(self.id, Granted(held.id, grant))

    def _abort(self, id: AttemptId) -> None:
        held = self._held.get(id.request)
        if held is not None and held.id.attempt <= id.attempt:
            del self._held[id.request]
            self.engine.cancel_reservation(held.reservation.id)
        running = self._running.get(id.request)
        if running is not None and running[0].attempt <= id.attempt:
            del self._running[id.request]
            self._computing.discard(running[0])
            self.engine.abort(str(running[0]))

    def commit(self, id: AttemptId, output_tokens: tuple[int, ...]) -> bool:
        """All bytes are here: the request runs. False if its lease has ended."""
        held = self._held.get(id.request)
        if held is None or held.id != id:
            return False
        del self._held[id.request]
        message = held.reserve
        prompt = message.tokens[: message.num_prompt_tokens]
        request = _request(replace(message, id=id), (*prompt, *output_tokens))
        self._running[id.request] = (id, request)
        self.engine.adopt(held.reservation.id, request)
        self._tell(self.id, TokenUpdate(id, 0, output_tokens))
        return True

    def _progress(self, progress: RequestProgress) -> None:
        """The tokens between the first and the last are told with the last: nobody looks there."""
        name = progress.request_id.rpartition("/")[0]
        id, request = self._running[name]
        first = id in self._computing and bool(progress.new_tokens)
        if progress.finish_reason is None and not first:
            return
        self._computing.discard(id)
        if progress.finish_reason is not None:
            del self._running[name]
        output = tuple(request.output_tokens)
        self._tell(self.id, TokenUpdate(id, 0, output, progress.finish_reason))


def _request(message: Reserve | Generate | Prefill, tokens: tuple[int, ...]) -> Request:
    return Request(
        request_id=str(message.id),
        tokens=list(tokens),
        num_prompt_tokens=message.num_prompt_tokens,
        sampling=message.sampling,
        max_num_tokens=message.num_prompt_tokens + message.sampling.max_tokens,
    )


@dataclass(slots=True)
class _Work:
    """One prefill with its handoff."""

    message: Prefill
    request: Request
    sent_at: float = 0.0  # when the last byte so far arrives


class PrefillNode:
    """Computes prompts and hands them off, chunk by chunk."""

    def __init__(
        self,
        id: NodeId,
        setup: Setup,
        clock: VirtualClock,
        machine: SharedMachine | None,
        hashes: Hashes,
        tell: Tell,
        decode_nodes: dict[NodeId, DecodeNode],
    ) -> None:
        self.id = id
        self.engine = SimulatedEngine(id, setup, clock, machine, self._progress)
        self.link = Link()
        self._setup = setup
        self._clock = clock
        self._hashes = hashes
        self._tell = tell
        self._decode_nodes = decode_nodes
        self._work: dict[str, _Work] = {}

    @property
    def is_idle(self) -> bool:
        """Whether no prompt is computed or handed over."""
        return not self._work

    def handle(self, message: Message) -> None:
        match message:
            case Prefill():
                self._start(message)
            case Abort():
                self._drop(message.id)
            case Ack():
                pass

    def _start(self, message: Prefill) -> None:
        request = Request(
            request_id=str(message.id),
            tokens=list(message.tokens),
            num_prompt_tokens=message.num_prompt_tokens,
            sampling=message.sampling,
            max_num_tokens=message.num_prompt_tokens + message.sampling.max_tokens,
            prefill_only=True,
            block_hashes=self._hashes(message.id.request),
        )
        self._work[message.id.request] = _Work(message, request)
        try:
            self.engine.add(request)
        except CapacityError as error:
            del self._work[message.id.request]
            self._tell(self.id, AttemptFailed(message.id, "capacity", str(error), True))

    def _progress(self, progress: RequestProgress) -> None:
        work = self._work.get(progress.request_id.rpartition("/")[0])
        if work is None:
            return
        if work.message.grant is not None:
            self._send(work, work.message.grant, progress)
        if not progress.new_tokens:
            return
        index, finish = progress.index, progress.finish_reason
        id = work.message.id
        self._tell(self.id, TokenUpdate(id, index, progress.new_tokens, finish))
        if finish is not None or work.message.grant is None:
            self._drop(id)
            return
        at = max(self._clock.now, work.sent_at)
        at += self._setup.hop_s + self._setup.overheads.handoff_s
        self._clock.at(at, partial(self._commit, work))

    def _send(self, work: _Work, grant: Grant, progress: RequestProgress) -> None:
        """Put the blocks that the decode node lacks on both links.

        They leave in slices, one per group of layers, while the step computes the next group: the
        last byte arrives when the links have taken all of it, and no sooner than the first slice,
        or the last one, with what comes after it.
        """
        cached = grant.num_cached_tokens // self._setup.engine.block_size
        missing = len([index for index, _ in progress.finished_blocks if index >= cached])
        if not missing:
            return
        seconds = self._setup.model.transfer_s(missing * self._setup.layout.block_bytes)
        groups = grant.geometry.num_layer_groups
        there = self._decode_nodes[grant.decode].link
        now, began = self._clock.now, self.engine.step_began
        first_at = began + (now - began) / groups
        begin = max(first_at, self.link.free_at, there.free_at)
        end = max(begin + seconds, now + seconds / groups)
        self.link.free_at = there.free_at = work.sent_at = end

    def _commit(self, work: _Work) -> None:
        grant, id = work.message.grant, work.message.id
        if self._work.get(id.request) is not work or grant is None:
            return  # aborted meanwhile
        node = self._decode_nodes.get(grant.decode)
        if node is not None and not node.engine.stopped:
            node.commit(id, tuple(work.request.output_tokens))
        self._clock.after(self._setup.hop_s, partial(self._drop, id))

    def _drop(self, id: AttemptId) -> None:
        work = self._work.get(id.request)
        if work is None or work.message.id.attempt > id.attempt:
            return
        del self._work[id.request]
        self.engine.abort(work.request.request_id)  # held or not
