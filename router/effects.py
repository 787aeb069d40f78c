"""What the dispatch of a choice wants done; whoever drives it does so, in this order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from router.breaker import Pair
from router.errors import ApiError
from wire.messages import Message
from wire.types import FinishReason, Hypothesis, NodeId


@dataclass(frozen=True, slots=True)
class Send:
    """Send `message` to node `to`; call `cannot_send` if that fails."""

    to: NodeId
    message: Message


@dataclass(frozen=True, slots=True)
class Output:
    """New tokens in the log; with `finish` they were the last."""

    tokens: tuple[int, ...]
    finish: FinishReason | None
    rows: tuple[bytes, ...] = ()  # the tokens' logprobs, packed, where asked for


@dataclass(frozen=True, slots=True)
class Embedded:
    """The prompt's embedding; the choice is over."""

    vector: bytes


@dataclass(frozen=True, slots=True)
class Found:
    """What a beam search has found, best first; the choice is over."""

    hypotheses: tuple[Hypothesis, ...]


@dataclass(frozen=True, slots=True)
class NeedsCapacity:
    """Nobody takes it now; call `place` again when that may have changed."""

    retry_after_s: float


@dataclass(frozen=True, slots=True)
class AttemptEnded:
    """An attempt was given up (counted by cause)."""

    cause: str
    pair: Pair | None  # None: it had no decode node


@dataclass(frozen=True, slots=True)
class HandedOver:
    """A handoff has been committed."""

    pair: Pair


@dataclass(frozen=True, slots=True)
class Taken:
    """The node that was offered the request has it."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The choice is over without a result."""

    error: ApiError


Effect: TypeAlias = (
    Send | Output | Embedded | Found | NeedsCapacity | HandedOver | Taken | AttemptEnded | Failed
)
