"""The scenarios, and what may happen in each: the model's nodes, the wire, the clock.

The wire is a set that only grows. Any packet that was ever sent may arrive at any time, any number
of times, or never: this is loss, duplication, delay and reordering between sockets in one, and a
superset of what FIFO sockets do. What the router may ask for is on the wire from the beginning.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

from kvtransfer import handoff, receiver
from tests.proof.decode_model import DecodeModel
from tests.proof.packets import DEADLINE_S, ROUTER, TTL, Packet, tokens_of
from tests.proof.prefill_model import PrefillModel
from wire.geometry import Geometry
from wire.handoff_messages import Commit, ReleaseLease, RenewLeases, UnitHeader
from wire.messages import Message
from wire.request_messages import Abort, Rebind, Reserve
from wire.types import AttemptId, BlockHandle, NodeId, SamplingParams

Node = DecodeModel | PrefillModel
DECODE = NodeId("d", 1)
A, B = NodeId("a", 1), NodeId("b", 1)
STRANGER = NodeId("z", 9)
TIMELESS = (0.0,)
PAST_TTL = (0.0, TTL + 10)
RENEWABLE = (0.0, 0.6 * TTL, 1.2 * TTL)  # a lease outlives one step, and two only if renewed
PAST_DEADLINE = (*RENEWABLE, 1.8 * TTL)


def reborn(node: NodeId) -> NodeId:
    """The next life of a node."""
    return NodeId(node.name, node.incarnation + 1)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt that the router may make."""

    id: AttemptId
    prefill: NodeId
    decode: NodeId = DECODE
    rebinds: int = 0  # the lease whose room it asks for; 0: it reserves
    output_tokens: tuple[int, ...] = ()  # that the client has by then


@dataclass(frozen=True, slots=True)
class Scenario:
    """What may happen.

    Args:
        num_tokens: of every prompt; a block holds two.
        aborts: what the router may abort, on every node.
        restarts: nodes that may die and come back once.
        times: what the clock may show, in turn.
        confused: packets may also name another lease, generation, block or sender than is right.
        table_supersedes: a new grant ends the older lease, as LeaseTable promises; else the role
            ends it before, because its room is needed.
        narrow: windows have room for one unit, and every unit is acknowledged.
    """

    name: str
    attempts: tuple[Attempt, ...]
    num_tokens: int = 2
    num_decode_blocks: int = 2
    num_prefill_blocks: int = 2
    num_layer_groups: int = 1
    aborts: tuple[AttemptId, ...] = ()
    restarts: tuple[NodeId, ...] = ()
    times: tuple[float, ...] = RENEWABLE
    ways_to_land: tuple[str, ...] = ("land",)
    confused: bool = False
    table_supersedes: bool = False
    narrow: bool = False

    @property
    def nodes(self) -> list[NodeId]:
        """The first lives: the decode node, then the prefill nodes."""
        prefills = {attempt.prefill for attempt in self.attempts}
        return [DECODE, *sorted((n for n in prefills if n.incarnation == 1), key=str)]

    def build(self, node: NodeId) -> Node:
        """A node as it starts."""
        if node.name == DECODE.name:
            return DecodeModel(
                node,
                self.num_decode_blocks,
                self.ways_to_land,
                self.table_supersedes,
                Geometry(self.num_layer_groups),
            )
        if self.narrow:
            return PrefillModel(node, self.num_prefill_blocks, window_bytes=1)
        return PrefillModel(node, self.num_prefill_blocks)

    @contextmanager
    def credit(self) -> Iterator[None]:
        """How much must arrive before it is acknowledged."""
        with ExitStack() as stack:
            for module in (handoff, receiver) if self.narrow else ():
                stack.enter_context(patch.object(module, "CREDIT_BYTES", 1))
            yield

    def first_packets(self) -> list[Packet]:
        """What the router may say as long as nobody has restarted."""
        asked = [a for a in self.attempts if a.prefill.incarnation == a.decode.incarnation == 1]
        aborts = [Packet(ROUTER, node, Abort(id)) for id in self.aborts for node in self.nodes]
        return [*map(self.ask, asked), *aborts]

    def packets_after_restart(self, node: NodeId) -> list[Packet]:
        """What the router may say from the restart on; `node` is the new life."""
        return [self.ask(a) for a in self.attempts if node in (a.prefill, a.decode)]

    def ask(self, attempt: Attempt) -> Packet:
        """The router's question for room."""
        if not attempt.rebinds:
            return self.reserve(attempt)
        message = Rebind(attempt.id, attempt.rebinds, attempt.prefill, attempt.output_tokens)
        return Packet(ROUTER, attempt.decode, replace(message, deadline_s=DEADLINE_S))

    def reserve(self, attempt: Attempt) -> Packet:
        message = Reserve(
            attempt.id,
            tokens_of(attempt.id.request, self.num_tokens),
            self.num_tokens,
            SamplingParams(),
            attempt.prefill,
            deadline_s=DEADLINE_S,
        )
        return Packet(ROUTER, attempt.decode, message)

    def with_confusion(self, packet: Packet) -> list[Packet]:
        """The packet, and what confused senders make of it."""
        if not self.confused or packet.receiver.name != DECODE.name:
            return [packet]
        return [packet, *_forgeries(packet), *self._mistakes(packet)]

    def _mistakes(self, packet: Packet) -> list[Packet]:
        """The right sender names the wrong content: an older generation, another block."""
        header = packet.message
        if not isinstance(header, UnitHeader):
            return []
        epoch, at, generation = (
            header.handle.epoch,
            header.handle.block_id,
            header.handle.generation,
        )
        wrong = [
            BlockHandle(epoch, at, generation - 1),
            BlockHandle(epoch, (at + 1) % self.num_decode_blocks, 1),
        ]
        return [replace(packet, message=replace(header, handle=handle)) for handle in wrong]


def _forgeries(packet: Packet) -> list[Packet]:
    """The same for another lease, under this one's capability; the same from a stranger."""
    message = packet.message
    if not isinstance(message, UnitHeader | Commit | ReleaseLease | RenewLeases):
        return []
    stolen = replace(packet, sender=STRANGER, forged=True)
    return [stolen, replace(packet, message=_other_lease(message), forged=True)]


def _other_lease(message: UnitHeader | Commit | ReleaseLease | RenewLeases) -> Message:
    if isinstance(message, RenewLeases):
        return RenewLeases(tuple(replace(c, lease=3 - c.lease) for c in message.claims))
    return replace(message, lease=3 - message.lease)


def _attempts(*prefills: NodeId, request: str = "r") -> tuple[Attempt, ...]:
    """Attempts 1, 2, … of one request."""
    return tuple(
        Attempt(AttemptId(request, number), node) for number, node in enumerate(prefills, 1)
    )


def _rebinding(first: NodeId, second: NodeId, *output_tokens: int) -> tuple[Attempt, ...]:
    """The second attempt asks for the room of the first one's lease."""
    rebind = Attempt(AttemptId("r", 2), second, rebinds=1, output_tokens=output_tokens)
    return (*_attempts(first), rebind)


R1, R2 = AttemptId("r", 1), AttemptId("r", 2)
ANYTHING = ("land", "land flipped", "land short")

SCENARIOS = (
    Scenario(
        "one attempt, two units, damage",
        _attempts(A),
        num_tokens=3,
        aborts=(R1,),
        times=PAST_TTL,
        ways_to_land=ANYTHING,
    ),
    Scenario("two attempts on two prefill nodes", _attempts(A, B), table_supersedes=True),
    Scenario(
        "two attempts, one unit of room",
        _attempts(A, B),
        num_decode_blocks=1,
        aborts=(R1,),
        times=PAST_TTL,
    ),
    Scenario(
        "two attempts, two units each",
        _attempts(A, B),
        num_tokens=3,
        num_decode_blocks=4,
        times=TIMELESS,
    ),
    Scenario(
        "one attempt, two layer groups, damage",
        _attempts(A),
        num_decode_blocks=1,
        num_layer_groups=2,
        aborts=(R1,),
        times=PAST_TTL,
        ways_to_land=ANYTHING,
    ),
    Scenario(
        "two attempts, two layer groups each",
        _attempts(A, B),
        num_layer_groups=2,
        times=TIMELESS,
    ),
    Scenario("two attempts on one prefill node", _attempts(A, A), times=PAST_TTL),
    Scenario(
        "two requests, one unit of room",
        (*_attempts(A), *_attempts(B, request="s")),
        num_decode_blocks=1,
        times=PAST_TTL,
    ),
    Scenario("the prefill node restarts", _attempts(A, reborn(A)), restarts=(A,), times=PAST_TTL),
    Scenario(
        "the decode node restarts",
        (*_attempts(A), Attempt(R2, A, reborn(DECODE))),
        restarts=(DECODE,),
    ),
    Scenario("one attempt, past its deadline", _attempts(A), aborts=(R1,), times=PAST_DEADLINE),
    Scenario(
        "a confused sender",
        _attempts(A, A),
        num_decode_blocks=1,
        num_prefill_blocks=1,
        confused=True,
        table_supersedes=True,
        times=TIMELESS,
    ),
    Scenario(
        "a confused sender, two units",
        _attempts(A),
        num_tokens=3,
        confused=True,
        times=TIMELESS,
    ),
    Scenario(
        "one attempt, a window of one unit",
        _attempts(A),
        num_tokens=5,
        num_decode_blocks=3,
        num_prefill_blocks=3,
        aborts=(R1,),
        times=PAST_TTL,
        narrow=True,
    ),
    Scenario(
        "two attempts, windows of one unit",
        _attempts(A, A),
        num_tokens=3,
        num_decode_blocks=4,
        num_prefill_blocks=4,
        times=TIMELESS,
        narrow=True,
    ),
    Scenario("rebound to another prefill node", _rebinding(A, B)),
    Scenario(
        "rebound with more tokens, one block to spare",
        _rebinding(A, B, 7),
        num_decode_blocks=3,
        times=PAST_TTL,
    ),
    Scenario(
        "rebound or reserved anew, one unit of room",
        (*_rebinding(A, B), *_attempts(A, B)[1:]),
        num_decode_blocks=1,
        times=PAST_TTL,
    ),
    Scenario(
        "rebound to the restarted prefill node",
        _rebinding(A, reborn(A)),
        restarts=(A,),
    ),
    Scenario(
        "a confused sender after a rebind",
        _rebinding(A, A),
        num_prefill_blocks=1,
        confused=True,
        times=TIMELESS,
    ),
)
