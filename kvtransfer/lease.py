"""A lease: the right of one sender to fill certain blocks, and what has come under it so far.

    GRANTED → RECEIVING → COMMITTING → COMMITTED   the request owns the blocks
       │          │            │
       └──────────┴────────────┴─▶ REJECTED   a digest, generation, length or manifest contradicts
                                   EXPIRED    its deadline has passed
                                   REVOKED    abort, rebind or a new attempt
                                   RELEASED   the sender needs it no more

What moves it along that picture is the table of all leases (`lease_table`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from hmac import compare_digest

from kvtransfer.units import Unit
from wire.handoff_messages import UnitSeal
from wire.logprobs import Logprobs
from wire.types import AttemptId, BlockHandle, NodeId


class LeaseState(Enum):
    """Where a lease is in its life; see the picture above."""

    GRANTED = auto()
    RECEIVING = auto()
    COMMITTING = auto()
    COMMITTED = auto()
    REJECTED = auto()
    EXPIRED = auto()
    REVOKED = auto()
    RELEASED = auto()


LIVE = frozenset({LeaseState.GRANTED, LeaseState.RECEIVING, LeaseState.COMMITTING})


@dataclass(slots=True, eq=False)
class Lease:
    """The right of one sender to fill the blocks of one attempt."""

    number: int
    id: AttemptId
    sender: NodeId
    capability: bytes
    digest_key: bytes
    units: dict[int, Unit]  # what must arrive, by index
    handles: tuple[BlockHandle, ...]  # of the whole block table
    ttl_s: float
    hard_deadline: float  # renewals never go past the request's own deadline
    deadline: float
    state: LeaseState = LeaseState.GRANTED
    cause: str = ""  # why it ended, where it was not committed
    landing: set[int] = field(default_factory=set)  # units whose bytes are being written now
    landed: dict[int, bytes] = field(default_factory=dict)  # unit: digest of what arrived
    seals: dict[int, UnitSeal] = field(default_factory=dict)  # of the commits so far
    manifest: dict[int, UnitSeal] | None = None  # the seals of all units, once they are known
    output_tokens: tuple[int, ...] = ()
    logprobs: Logprobs | None = None  # what came with them; nothing here looks into it

    @property
    def live(self) -> bool:
        state = self.state  # asked twice per unit, and an Enum's hash is Python code
        return (
            state is LeaseState.RECEIVING
            or state is LeaseState.COMMITTING
            or state is LeaseState.GRANTED
        )

    @property
    def complete(self) -> bool:
        return not self.landing and self.landed.keys() == self.units.keys()

    def proves(self, capability: bytes) -> bool:
        """Whether who knows this is the lease's sender."""
        return compare_digest(self.capability, capability)

    def agrees(self, seals: dict[int, UnitSeal], output_tokens: tuple[int, ...]) -> bool:
        """Whether a commit names all units of one or more ranks, and contradicts no other."""
        heads = {self.units[index].head_start for index in seals if index in self.units}
        part = {index: unit for index, unit in self.units.items() if unit.head_start in heads}
        first = self.manifest is None and not self.seals
        return (
            bool(seals) == bool(self.units)
            and _covers(seals, part)
            and all(self.seals.get(index, seal) == seal for index, seal in seals.items())
            and (first or output_tokens == self.output_tokens)
        )


def _covers(manifest: dict[int, UnitSeal], units: dict[int, Unit]) -> bool:
    """Whether the manifest names exactly the units, each with its token range."""
    return manifest.keys() == units.keys() and all(
        (seal.token_start, seal.token_end) == (units[index].token_start, units[index].token_end)
        for index, seal in manifest.items()
    )
