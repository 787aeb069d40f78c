"""Messages of a handoff, between the prefill node and the decode node: units, then their commit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from wire.logprobs import Logprobs
from wire.types import U64, AttemptId, BlockHandle, Count, Digest, Name, Secret, TokenIds


@dataclass(frozen=True, slots=True)
class UnitHeader:
    """Precedes a unit's bytes on a transport.

    Which layers and heads it holds follows from its number and the grant; the digest binds them.
    """

    lease: U64
    capability: Secret
    unit: Count  # its number, see kvtransfer.units
    handle: BlockHandle
    token_start: Count
    token_end: Count
    num_bytes: Count


@dataclass(frozen=True, slots=True)
class UnitsReceived:
    """decode → prefill: bytes of this lease that left the wire; opens the sender's window."""

    lease: U64
    num_bytes: U64  # since the grant, so that one that got lost does no harm


@dataclass(frozen=True, slots=True)
class UnitSeal:
    """One line of a manifest: what the sender says that a unit holds."""

    unit: Count
    token_start: Count
    token_end: Count
    digest: Digest


@dataclass(frozen=True, slots=True)
class Commit:
    """prefill → decode: the manifest, and all output tokens so far. May overtake the data.

    Idempotent: asked again until it is answered, and answered the same each time.
    """

    id: AttemptId
    lease: U64
    capability: Secret
    units: Annotated[tuple[UnitSeal, ...], Field(max_length=1 << 20, fail_fast=True)]
    output_tokens: TokenIds
    logprobs: Logprobs | None = None  # what the decode node repeats beside the tokens


@dataclass(frozen=True, slots=True)
class Committed:
    """decode → prefill: verified; the decode node owns the request from here on."""

    id: AttemptId
    lease: U64


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    """decode → prefill: the lease will not be committed; stop sending and drop the references."""

    id: AttemptId
    lease: U64
    cause: Name  # as in AttemptFailed


@dataclass(frozen=True, slots=True)
class ReleaseLease:
    """prefill → decode: no handoff is needed; the first token ended the request, or its router did.

    A handoff that fails leaves the lease to the router, which may rebind it.
    """

    id: AttemptId
    lease: U64
    capability: Secret
    cause: Name


@dataclass(frozen=True, slots=True)
class LeaseClaim:
    """A lease and the proof that the sender belongs to it."""

    lease: U64
    capability: Secret


@dataclass(frozen=True, slots=True)
class RenewLeases:
    """prefill → decode: these requests still wait or compute here; do not expire their leases."""

    claims: Annotated[tuple[LeaseClaim, ...], Field(max_length=1 << 16, fail_fast=True)]
