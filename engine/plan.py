"""What the scheduler decided for one step, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from engine.request import Request
from engine.rows import Ahead, Row
from wire.logprobs import Logprobs
from wire.types import BlockHandle, FinishReason, Hypothesis, Pooling


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """Compute `num_new_tokens` tokens of `request`, from `start` on; the last are `draft_tokens`.

    Draft tokens stand behind the request's last token; nobody knows yet whether they are its next.
    """

    request: Request
    start: int
    num_new_tokens: int
    draft_tokens: tuple[int, ...] = ()
    is_last: bool = field(init=False)
    """Whether this step reaches the last known token. The request may be looked upon as further
    before the step is over, so this is noted when the step is planned."""

    def __post_init__(self) -> None:
        is_last = self.end - len(self.draft_tokens) == self.request.num_tokens
        object.__setattr__(self, "is_last", is_last)

    @property
    def end(self) -> int:
        return self.start + self.num_new_tokens

    @property
    def new_tokens(self) -> list[int]:
        """What is computed; -1 - r for the token that row r of the step before samples."""
        tokens, row = self.request.tokens, self.request.awaited_row
        if row is not None and self.start == len(tokens):
            return [-1 - row]
        return [*tokens[self.start : self.end], *self.draft_tokens]

    @property
    def samples(self) -> bool:
        """Whether the next token is sampled then; an embedding ends there instead."""
        return self.is_last and self.request.pooling is None

    @property
    def num_logits(self) -> int:
        """Rows at the chunk's end whose logits are needed."""
        if self.request.wants_prompt_logprobs:
            return self.num_new_tokens
        return self.num_samples

    @property
    def num_samples(self) -> int:
        """Rows that are sampled: the last token's and each draft token's."""
        return (1 + len(self.draft_tokens)) if self.samples else 0

    @property
    def sampled_rows(self) -> list[Row]:
        """What they belong to."""
        if not self.samples:
            return []
        draft = self.draft_tokens
        return [self.request, *(Ahead(self.request, draft[:n]) for n in range(1, 1 + len(draft)))]

    @property
    def num_hidden(self) -> int:
        """Rows at the chunk's end whose hidden states are pooled."""
        if self.request.pooling is Pooling.MEAN:
            return self.num_new_tokens
        return int(self.is_last and self.request.pooling is Pooling.LAST)


class StepShape(NamedTuple):
    """What a step computes, as far as its time depends on it."""

    prefill_tokens: int = 0
    prefill_squares: int = 0  # Σ(end² - start²)
    decode_batch: int = 0
    decode_context: int = 0  # tokens whose KV the decoding requests read


NO_SHAPE = StepShape()


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The rows of one forward pass, in batch order."""

    scheduled: tuple[ScheduledRequest, ...]
    num_preempted: int = 0

    @property
    def sampling(self) -> list[Row]:
        """What is sampled, in the order of the rows; true until the commit."""
        return [row for item in self.scheduled for row in item.sampled_rows]

    @property
    def num_samples(self) -> int:
        return sum(item.num_samples for item in self.scheduled)

    @property
    def copied_blocks(self) -> list[tuple[int, int]]:
        """Blocks whose content must be in others before anything is computed: (from, to)."""
        copied = (item.request.copied_block for item in self.scheduled)
        return [pair for pair in copied if pair is not None]

    @property
    def hidden_rows(self) -> list[int]:
        """Of the batch's rows, those whose hidden states are pooled."""
        rows: list[int] = []
        if all(item.request.pooling is None for item in self.scheduled):
            return rows  # most steps
        end = 0
        for item in self.scheduled:
            end += item.num_new_tokens
            rows += range(end - item.num_hidden, end)
        return rows

    @property
    def num_tokens(self) -> int:
        return sum(item.num_new_tokens for item in self.scheduled)

    @property
    def shape(self) -> StepShape:
        tokens = squares = batch = context = 0
        for item in self.scheduled:
            if item.num_new_tokens == 1 and item.start:
                batch += 1
                context += item.end
            else:
                tokens += item.num_new_tokens
                squares += item.end**2 - item.start**2
        return StepShape(tokens, squares, batch, context)


MAX_PROMPT_LOGITS = 256
"""Rows of logits per step for prompt logprobs: with a vocabulary of 150 k they take 150 MB."""


class PlanDraft:
    """A step plan in the making: what is scheduled so far and what is left of the token budget."""

    def __init__(self, budget: int, max_chunk: int = 0, *, ahead: bool = False) -> None:
        self.budget = budget
        self.ahead = ahead  # the step before it is not over, so nobody can be preempted
        self.lacks_room = False  # somebody would have to be
        self._max_chunk = max_chunk or budget
        self.prompt_logits = MAX_PROMPT_LOGITS  # what is left of these
        self.items: dict[str, ScheduledRequest] = {}
        self.num_preempted = 0

    def room_for(self, request: Request) -> int:
        """Tokens of `request` that this step may still compute."""
        room = min(self.budget, self._max_chunk)
        if request.wants_prompt_logprobs:
            return min(room, self.prompt_logits)
        return room

    def add(self, request: Request, num_new_tokens: int) -> None:
        item = ScheduledRequest(request, request.num_computed_tokens, num_new_tokens)
        self.items[request.request_id] = item
        self.budget -= num_new_tokens
        if request.wants_prompt_logprobs:
            self.prompt_logits -= num_new_tokens

    def add_draft(self, request: Request, tokens: tuple[int, ...]) -> None:
        """Let a scheduled request be computed beyond its last token."""
        item = self.items[request.request_id]
        self.items[request.request_id] = replace(
            item, num_new_tokens=item.num_new_tokens + len(tokens), draft_tokens=tokens
        )
        self.budget -= len(tokens)

    def remove_preempted(self, request: Request) -> None:
        self.num_preempted += 1
        for row in request.rows:
            item = self.items.pop(row.request_id, None)
            if item is not None:
                self.budget += item.num_new_tokens

    @property
    def request_ids(self) -> frozenset[str]:
        return frozenset(item.request.owner.request_id for item in self.items.values())

    def finish(self) -> StepPlan:
        return StepPlan(tuple(self.items.values()), self.num_preempted)


@dataclass(frozen=True, slots=True)
class RequestProgress:
    """What one step did for one request.

    A prefill-only request is over with its first new token. Its `finish_reason` is None where the
    request goes on elsewhere.
    """

    request_id: str
    num_computed_tokens: int
    index: int  # output index of the first of `new_tokens`
    new_tokens: tuple[int, ...]
    finish_reason: FinishReason | None
    num_cached_tokens: int
    finished_blocks: tuple[tuple[int, BlockHandle], ...] = ()
    """Prefill-only requests: (index in the block table, handle) of blocks that this step filled;
    the last, partly filled one with the step that samples. Cached blocks come with the request's
    first step; after a preemption all blocks come again, with other handles."""
    logprobs: Logprobs | None = None
    """Of `new_tokens`, and with the first output token of the whole prompt; where asked for."""
    embedding: bytes | None = None
    """With the last step of a request that asks for one, which ends it; little-endian fp32."""
    hypotheses: tuple[Hypothesis, ...] = ()
    """With the last step of a beam search, best first; a step before that brings no tokens."""
    num_beams: int = 0  # a search's rows in this step


@dataclass(frozen=True, slots=True)
class LayerProgress:
    """In the middle of a step: in its first `num_layers` layers, these blocks are as they will be.

    The step may still fail; then nobody may use what comes of it.
    """

    num_layers: int
    finished_blocks: tuple[tuple[str, tuple[tuple[int, BlockHandle], ...]], ...]
    """Request id, and what will be `RequestProgress.finished_blocks` of this step."""


@dataclass(frozen=True, slots=True)
class DraftCounts:
    """What speculation did in one step."""

    drafts: tuple[tuple[int, int], ...] = ()  # (drafted, accepted) tokens of each request with any
    draft_s: float = 0.0  # that drafting took
    saved_s: float = 0.0  # what the step's tokens would have taken longer one by one
    failure: str = ""  # why the drafter is not asked any more


OnLayers = Callable[[LayerProgress], None]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step produced."""

    step: int
    progress: tuple[RequestProgress, ...]
    num_tokens: int
    num_preempted: int
    corrupted: tuple[str, ...] = ()  # requests that ended because their logits are not finite
    speculation: DraftCounts | None = None
    num_retries: int = 0  # larger steps before it that did not fit into memory
    was_ahead: bool = False  # launched before the step before it was read
    seconds: float = 0.0  # what it took, or from the result before; who has a clock fills it in
    shape: StepShape = NO_SHAPE
