"""The prefill node's end of the handoff: begins it, has its units sent, asks for the commit.

Runs in the event loop. Units are sealed when they are computed (`unit_pump`), and the commit waits
until all of them are.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence

from kvtransfer.block_memory import BlockMemory
from kvtransfer.choice import TransportChoice
from kvtransfer.digest import UnitSealer
from kvtransfer.handoff import OPEN, Handoff, HandoffState
from kvtransfer.outgoing import Outgoing, own_units
from kvtransfer.transport import TransferStats, UnitSender
from kvtransfer.unit_pump import UnitPump
from kvtransfer.units import bounds
from telemetry.causes import known_cause
from wire.errors import ConfigError, TransferError, WireError
from wire.fleet_messages import Gone
from wire.handoff_messages import (
    Committed,
    LeaseClaim,
    LeaseEnded,
    ReleaseLease,
    RenewLeases,
    UnitsReceived,
)
from wire.logprobs import Logprobs
from wire.messages import Message
from wire.request_messages import Grant
from wire.types import AttemptId, BlockHandle, NodeId, TransportAddress


class KVSender:
    """All outgoing handoffs of one prefill node.

    Args:
        transports: the sending ends this node has, by name; see TransportChoice.
        send: sends a message to a decode node; may raise WireError, or ConfigError where a grant's
            address is none, and is then asked again later.
        on_ended: called once per handoff, in the loop, when it is DONE or ABORTED.
        window_bytes: unacknowledged bytes per handoff.
        max_sending_bytes: see UnitPump.
    """

    def __init__(
        self,
        *,
        memory: BlockMemory,
        transports: dict[str, UnitSender],
        send: Callable[[Grant, Message], None],
        on_ended: Callable[[Handoff], None],
        model_fingerprint: str,
        stats: TransferStats,
        window_bytes: int = 32 << 20,
        max_sending_bytes: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._memory = memory
        self._send = send
        self._on_ended = on_ended
        self._fingerprint = model_fingerprint
        self._stats = stats
        self._window_bytes = window_bytes
        self._clock = clock
        self._choice = TransportChoice(transports, stats, clock=clock)
        self._pump = UnitPump(
            memory,
            transports,
            stats,
            on_sealed=self._ask_first_commit,
            on_unsent=self._not_sent,
            on_room=self._pump_all,
            max_sending_bytes=max_sending_bytes,
            clock=clock,
        )
        self._outgoing: dict[AttemptId, Outgoing] = {}

    def __len__(self) -> int:
        return len(self._outgoing)

    def num_by_state(self) -> dict[str, int]:
        """How many handoffs are in each state that is not an end."""
        counts = Counter(out.handoff.state for out in self._outgoing.values())
        return {state.name.lower(): counts[state] for state in OPEN}

    # ------------------------------------------------------------ for the prefill role

    def start(
        self,
        id: AttemptId,
        grant: Grant,
        *,
        tokens: Sequence[int],
        cache_salt: str,
        deadline_s: float,
    ) -> None:
        """Begin a handoff under `grant`.

        Raises:
            TransferError: the two nodes cannot exchange blocks; the text says why.
        """
        assert id not in self._outgoing, f"{id} is handed over already"
        layout, address = self._memory.layout, self._choice.choose(grant)
        self._outgoing[id] = Outgoing(
            Handoff(
                id,
                grant,
                units=own_units(grant, len(tokens), layout),
                window_bytes=self._window_bytes,
                deadline=self._clock() + deadline_s,
            ),
            UnitSealer(
                key=grant.digest_key,
                id=id,
                lease=grant.lease,
                tokens=tokens,
                block_size=grant.layout.block_size,
                model_fingerprint=self._fingerprint,
                cache_salt=cache_salt,
            ),
            address,
            layout,
            self._pump.reads_devices(address.transport),
        )

    @property
    def layer_marks(self) -> frozenset[int]:
        """After how many layers of a forward pass some handoff has something to send."""
        num_layers = self._memory.layout.num_layers
        cuts = {out.handoff.grant.geometry.num_layer_groups for out in self._outgoing.values()}
        return frozenset(mark for cut in cuts for mark in bounds(0, num_layers, cut)[1:-1])

    def blocks_finished(
        self,
        id: AttemptId,
        blocks: Iterable[tuple[int, BlockHandle]],
        num_layers: int | None = None,
    ) -> None:
        """Blocks of the request are computed: (index in its block table, local handle) each.

        Args:
            num_layers: only so many layers are, the step goes on; None: all, the step is done.
        """
        out = self._outgoing.get(id)
        if out is None:
            return
        if num_layers is None:
            out.meter.pass_over(self._clock())
            num_layers = self._memory.layout.num_layers
        self._pump.seal(out, out.ready_units(blocks, num_layers))

    def first_token(
        self, id: AttemptId, output_tokens: Sequence[int], logprobs: Logprobs | None = None
    ) -> None:
        """The prompt is done and the request goes on: ask for the commit."""
        out = self._outgoing.get(id)
        if out is not None:
            out.meter.first_token(self._clock())
            out.outputs = (tuple(output_tokens), logprobs)
            self._ask_first_commit(out)

    def _ask_first_commit(self, out: Outgoing) -> None:
        """Once the first token is known and all units are sealed."""
        if out.outputs is None or out.sealing or out.handoff.ended:
            return
        outputs, out.outputs = out.outputs, None
        out.handoff.finish(*outputs)
        self._pump.pump(out)
        self._ask_commit(out.handoff)

    def fail(self, id: AttemptId, cause: str) -> None:
        """End a handoff that this node cannot go on with. The router may rebind its lease."""
        out = self._outgoing.get(id)
        if out is not None:
            self._end(out, cause)

    def abort(self, id: AttemptId, cause: str) -> None:
        """End a handoff that nobody waits for and give the lease back."""
        out = self._outgoing.get(id)
        if out is not None:
            grant = out.handoff.grant
            self._try_send(grant, ReleaseLease(id, grant.lease, grant.capability, cause))
            self._end(out, cause)

    def lost(self, address: TransportAddress, error: TransferError) -> None:
        """A transport lost its way to a decode node; no unit that it carried is sure to be there.

        The handoffs on that way end, their attempts are retried by the router, and new handoffs
        take another transport for a while.
        """
        ids = [out.handoff.id for out in self._outgoing.values() if out.address == address]
        if ids:
            self._choice.failed(address, error)
        for id in ids:
            self.abort(id, error.cause)

    def tick(self) -> None:
        """Let time pass: ask again for commits, renew leases, end what is past its deadline."""
        now = self._clock()
        for out in list(self._outgoing.values()):
            if now >= out.handoff.deadline:
                self.abort(out.handoff.id, "expired")
            else:
                self._ask_commit(out.handoff)

    def renew_leases(self) -> None:
        """Tell every decode node which leases are still worked on; call well within their TTL."""
        claims: defaultdict[NodeId, list[LeaseClaim]] = defaultdict(list)
        grants: dict[NodeId, Grant] = {}
        for out in self._outgoing.values():
            grant = out.handoff.grant
            grants[grant.decode] = grant
            claims[grant.decode].append(LeaseClaim(grant.lease, grant.capability))
        for decode, grant in grants.items():
            self._try_send(grant, RenewLeases(tuple(claims[decode])))

    # ------------------------------------------------------------ messages of decode nodes

    def handle(self, sender: NodeId, message: Message) -> None:
        """One message of a decode node; others are ignored."""
        if isinstance(message, Gone):
            self._end_all(message.meant_for)
        elif isinstance(message, UnitsReceived | Committed | LeaseEnded):
            out = self._find(sender, message.lease)
            if out is not None:
                self._advance(out, message)

    def _advance(self, out: Outgoing, message: UnitsReceived | Committed | LeaseEnded) -> None:
        if isinstance(message, UnitsReceived):
            out.handoff.acknowledged(message.num_bytes)
            self._pump.pump(out)
        elif isinstance(message, Committed):
            out.handoff.committed()
            if out.handoff.ended:
                self._finish(out)
        elif message.id == out.handoff.id or out.handoff.state is HandoffState.COMPUTING:
            # A late unit's answer must not overrule the commit's.
            self._end(out, known_cause(message.cause))

    def _find(self, decode: NodeId, lease: int) -> Outgoing | None:
        for out in self._outgoing.values():
            if out.handoff.grant.lease == lease and out.handoff.grant.decode == decode:
                return out
        return None

    def _end_all(self, decode: NodeId) -> None:
        for out in list(self._outgoing.values()):
            if out.handoff.grant.decode == decode:
                self._end(out, "gone")

    # ------------------------------------------------------------ inside

    def _pump_all(self) -> None:
        for out in list(self._outgoing.values()):
            self._pump.pump(out)

    def _not_sent(self, out: Outgoing, error: TransferError) -> None:
        self._choice.failed(out.address, error)
        self.fail(out.handoff.id, error.cause)

    def _ask_commit(self, handoff: Handoff) -> None:
        commit = handoff.next_commit(self._clock())
        if commit is not None:
            self._try_send(handoff.grant, commit)

    def _end(self, out: Outgoing, cause: str) -> None:
        self._pump.drop(out.handoff.abort(cause))
        self._finish(out)

    def _finish(self, out: Outgoing) -> None:
        handoff = out.handoff
        if self._outgoing.pop(handoff.id, None) is not None:
            done = handoff.state is HandoffState.DONE
            self._stats.handoffs["committed" if done else handoff.cause] += 1
            if done:
                handoff.transfer = out.meter.record(self._clock())
                self._stats.count_transfer(handoff.transfer)
            self._on_ended(handoff)

    def _try_send(self, grant: Grant, message: Message) -> None:
        try:
            self._send(grant, message)
        except (WireError, ConfigError):
            self._stats.messages_unsent += 1  # asked again by `tick`
