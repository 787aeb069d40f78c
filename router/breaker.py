"""A circuit breaker per pair of nodes: who hands over badly to whom gets a pause.

    CLOSED ── failures in a row, within a time ──▶ OPEN ── the pause is over ──▶ HALF_OPEN
       ▲                                            ▲                                │ one trial
       └────────────── a handoff commits ───────────┴── it fails: twice the pause ───┘

Both nodes may be well while the way between them is not: so pairs are judged, not nodes, and only
by what a transfer can be blamed for (`OF_TRANSFERS`). A breaker forbids nothing: the placement
avoids open pairs as long as there is another one.

Pure: no clock, time is an argument. A pair is remembered while it has failures to its name, and the
number of pairs is bounded.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from wire.types import NodeId

OF_TRANSFERS = frozenset(
    {
        "transport",  # the bytes could not be sent, or did not all come
        "digest",  # they came as others than were sealed
        "stale",  # headers that name other generations than the grant
        "manifest",  # the two do not mean the same units
        "refused",  # nor the same lease
        "expired",  # neither units nor heartbeats came for a whole TTL
    }
)
_MAX_PAIRS = 4096


class Pair(NamedTuple):
    """Who hands over to whom: two lives of nodes."""

    prefill: NodeId
    decode: NodeId


class BreakerState(Enum):
    """Where a pair stands; see the picture above."""

    CLOSED = auto()
    OPEN = auto()
    HALF_OPEN = auto()


@dataclass(frozen=True, slots=True)
class BreakerLimits:
    """When a breaker opens, and for how long."""

    failures: int = 3  # in a row: a handoff that commits between them forgives
    within_s: float = 60.0
    pause_s: float = 5.0
    max_pause_s: float = 300.0


@dataclass(slots=True, eq=False)
class _Circuit:
    """A pair with failures."""

    failed_at: deque[float]
    state: BreakerState = BreakerState.CLOSED
    pause_s: float = 0.0
    next_trial: float = 0.0


class Breaker:
    """The circuits of all pairs."""

    def __init__(self, limits: BreakerLimits = BreakerLimits()) -> None:
        self._limits = limits
        self._circuits: OrderedDict[Pair, _Circuit] = OrderedDict()

    def __len__(self) -> int:
        """How many pairs are remembered."""
        return len(self._circuits)

    def __iter__(self) -> Iterator[Pair]:
        """The pairs that are remembered."""
        return iter(self._circuits)

    @property
    def num_open(self) -> int:
        """Pairs that are paused or on trial."""
        return sum(c.state is not BreakerState.CLOSED for c in self._circuits.values())

    def state(self, pair: Pair) -> BreakerState:
        circuit = self._circuits.get(pair)
        return BreakerState.CLOSED if circuit is None else circuit.state

    def allows(self, pair: Pair, now: float) -> bool:
        """Whether the pair may be chosen: it is closed, or may be tried."""
        if not self._circuits:
            return True  # as mostly, and nothing is hashed
        circuit = self._circuits.get(pair)
        if circuit is None or circuit.state is BreakerState.CLOSED:
            return True
        return now >= circuit.next_trial

    def began(self, pair: Pair, now: float) -> None:
        """The pair was chosen: on trial, if its pause is over.

        A trial of which nothing is heard (its client left, its node died) proves nothing; the next
        one may begin a pause later.
        """
        circuit = self._circuits.get(pair)
        if circuit is None or circuit.state is BreakerState.CLOSED or now < circuit.next_trial:
            return
        circuit.state = BreakerState.HALF_OPEN
        circuit.next_trial = now + circuit.pause_s

    def committed(self, pair: Pair) -> bool:
        """A handoff came through: all is forgiven. True if the pair was not closed."""
        circuit = self._circuits.pop(pair, None)
        return circuit is not None and circuit.state is not BreakerState.CLOSED

    def failed(self, pair: Pair, now: float) -> bool:
        """A handoff failed for one of `OF_TRANSFERS`; True if that has opened the pair again.

        Failures of a paused pair are of handoffs that had begun before, or had no other pair: they
        prolong nothing.
        """
        circuit = self._circuit(pair)
        circuit.failed_at.append(now)
        limits = self._limits
        if circuit.state is BreakerState.HALF_OPEN:
            self._open(circuit, min(2 * circuit.pause_s, limits.max_pause_s), now)
            return True
        enough = len(circuit.failed_at) == limits.failures
        recent = now - circuit.failed_at[0] <= limits.within_s
        if circuit.state is BreakerState.CLOSED and enough and recent:
            self._open(circuit, limits.pause_s, now)
            return True
        return False

    def forget(self, node: NodeId) -> None:
        """This life of a node is over; the next one begins anew."""
        for pair in [pair for pair in self._circuits if node in pair]:
            del self._circuits[pair]

    def _circuit(self, pair: Pair) -> _Circuit:
        """The pair's own; the one that has not failed for longest makes room."""
        if pair not in self._circuits:
            self._circuits[pair] = _Circuit(deque(maxlen=self._limits.failures))
        self._circuits.move_to_end(pair)
        if len(self._circuits) > _MAX_PAIRS:
            self._circuits.popitem(last=False)
        return self._circuits[pair]

    def _open(self, circuit: _Circuit, pause_s: float, now: float) -> None:
        circuit.state = BreakerState.OPEN
        circuit.pause_s = pause_s
        circuit.next_trial = now + pause_s
