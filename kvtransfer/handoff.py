"""The prefill side of one handoff.

    COMPUTING → SENDING → AWAITING_COMMIT → DONE
        any state → ABORTED   (cancelled, lease lost, deadline)

COMPUTING: the prompt is still being computed, finished units leave meanwhile. SENDING: the first
token is known and the commit was asked, units still wait for the window. AWAITING_COMMIT: all units
left. The commit is asked as soon as the first token is known (it may overtake the data) and asked
again until it is answered; silence is never taken as failure.

Pure: time is an argument, sends are taken out by the caller.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

from kvtransfer.units import Unit, unit_bytes
from wire.handoff_messages import Commit, UnitHeader, UnitSeal
from wire.logprobs import Logprobs
from wire.request_messages import Grant, TransferRecord
from wire.types import AttemptId, BlockHandle

CREDIT_BYTES = 16 << 20
"""The receiver gathers acknowledgements up to this size; so many bytes may stay unacknowledged.

Half of the usual window: each one is a message on a busy loop, and costs as much as several units
(`docs/log.md`).
"""

MAX_ASK_S = 8.0
"""The wait for an answer doubles up to this: what a dead node never reads piles up in an outbox."""


class HandoffState(Enum):
    """Where a handoff is in its life; see the picture above."""

    COMPUTING = auto()
    SENDING = auto()
    AWAITING_COMMIT = auto()
    DONE = auto()
    ABORTED = auto()


OPEN = (HandoffState.COMPUTING, HandoffState.SENDING, HandoffState.AWAITING_COMMIT)


@dataclass(frozen=True, slots=True)
class ReadyUnit:
    """A sealed unit that waits for the window, and the local blocks that hold it."""

    unit: Unit
    sources: tuple[BlockHandle, ...]


class Handoff:
    """One request's way from this node to the decode node that granted it.

    Args:
        units: what this node sends: of the grant's units those whose heads it has.
        window_bytes: unacknowledged bytes that may be on the way; one unit always may.
    """

    def __init__(
        self,
        id: AttemptId,
        grant: Grant,
        *,
        units: Iterable[Unit],
        window_bytes: int,
        deadline: float,
        ask_again_s: float = 0.5,
    ) -> None:
        self.id = id
        self.grant = grant
        self.deadline = deadline
        self.state = HandoffState.COMPUTING
        self.cause = ""
        self.transfer: TransferRecord | None = None  # once it is DONE, for metrics
        self.units = {unit.index: unit for unit in units}
        self.bytes_sent = 0
        self._window_bytes = window_bytes
        self._ask_again_s = ask_again_s
        self._next_ask = 0.0
        self._ready: deque[ReadyUnit] = deque()
        self._seals: dict[int, UnitSeal] = {}
        self._acked_bytes = 0
        self._output_tokens: tuple[int, ...] | None = None
        self._logprobs: Logprobs | None = None

    @property
    def ended(self) -> bool:
        return self.state in (HandoffState.DONE, HandoffState.ABORTED)

    def wants(self, index: int) -> bool:
        """Whether the unit at this index must be sent and was not offered yet."""
        return not self.ended and index in self.units and index not in self._seals

    def offer(self, index: int, sources: tuple[BlockHandle, ...], digest: bytes) -> None:
        """A unit is computed and sealed; `sources` are the local blocks that hold it."""
        assert self.wants(index), f"unit {index} is offered twice or not wanted"
        unit = self.units[index]
        self._seals[index] = UnitSeal(index, unit.token_start, unit.token_end, digest)
        self._ready.append(ReadyUnit(unit, sources))

    def unit_bytes(self, unit: Unit) -> int:
        """As it travels."""
        return unit_bytes(unit, self.grant.layout, self.grant.geometry)

    def has_room(self, num_bytes: int) -> bool:
        """Whether the window has room for so many bytes more than have been sent."""
        return self.bytes_sent - self._acked_bytes + num_bytes <= self._window_bytes

    def next_send(self) -> tuple[UnitHeader, ReadyUnit] | None:
        """The next unit that the window admits; the caller sends it now."""
        if self.ended or not self._ready:
            return None
        size = self.unit_bytes(self._ready[0].unit)
        unacked = self.bytes_sent - self._acked_bytes
        if not self.has_room(size) and unacked >= CREDIT_BYTES:
            return None
        ready = self._ready.popleft()
        self.bytes_sent += size
        self._update_state()
        return self._header(ready.unit, size), ready

    def acknowledged(self, num_bytes: int) -> None:
        """The receiver has taken this many bytes off the wire, of all that were sent."""
        self._acked_bytes = max(self._acked_bytes, min(num_bytes, self.bytes_sent))

    def finish(self, output_tokens: tuple[int, ...], logprobs: Logprobs | None = None) -> None:
        """The prompt is computed and the next token sampled; the commit is due from now on."""
        assert self.state is HandoffState.COMPUTING
        assert self._seals.keys() == self.units.keys(), "units are missing"
        self._output_tokens = output_tokens
        self._logprobs = logprobs
        self.state = HandoffState.SENDING
        self._update_state()

    def next_commit(self, now: float) -> Commit | None:
        """The commit, if it is time to ask (again)."""
        if self._output_tokens is None or self.ended or now < self._next_ask:
            return None
        self._next_ask = now + self._ask_again_s
        self._ask_again_s = min(2 * self._ask_again_s, MAX_ASK_S)
        return Commit(
            self.id,
            self.grant.lease,
            self.grant.capability,
            tuple(self._seals[index] for index in sorted(self._seals)),
            self._output_tokens,
            self._logprobs,
        )

    def committed(self) -> None:
        """The decode node owns the request now; it cannot before all units left for it."""
        if self.state is HandoffState.AWAITING_COMMIT:
            self.state = HandoffState.DONE

    def abort(self, cause: str) -> list[ReadyUnit]:
        """Nothing more is sent; what is on the way may still read its blocks.

        Returns the units that will not be sent.
        """
        if self.ended:
            return []
        self.state = HandoffState.ABORTED
        self.cause = cause
        unsent = list(self._ready)
        self._ready.clear()
        return unsent

    def _update_state(self) -> None:
        if self.state is HandoffState.SENDING and not self._ready:
            self.state = HandoffState.AWAITING_COMMIT

    def _header(self, unit: Unit, size: int) -> UnitHeader:
        return UnitHeader(
            lease=self.grant.lease,
            capability=self.grant.capability,
            unit=unit.index,
            handle=self.grant.handles[unit.block],
            token_start=unit.token_start,
            token_end=unit.token_end,
            num_bytes=size,
        )
