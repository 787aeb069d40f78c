"""A request as the engine sees it: tokens, how many are computed, and the blocks that hold them.

    tokens:   | prompt .................... | output ......... |
              0            num_computed_tokens          num_tokens
              ◄── KV is in block_table ──►  ◄─ to compute ─►

There are no phases. A request is behind (`num_computed_tokens < num_tokens`) and catches up; when a
step reaches its last token, one more is sampled.

While a step is looked beyond (`engine.lookahead`), what it does counts already: its tokens are
computed, and the token that it samples, the awaited one, is the last. It is not in `tokens` yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine.beam_search import BeamSearch
from engine.grammar_cursor import GrammarCursor
from wire.types import FinishReason, Pooling, SamplingParams


@dataclass(slots=True, eq=False)
class Request:
    """One choice of one client request, in one attempt, on one node."""

    request_id: str
    tokens: list[int]  # the prompt, then output tokens (of earlier attempts too)
    num_prompt_tokens: int  # the client's own prompt: limits and penalties count from here
    sampling: SamplingParams
    max_num_tokens: int  # prompt and output together may not exceed this
    cache_salt: str = ""
    prefill_only: bool = False  # end after one sampled token; blocks stay held for the handoff
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of full computed or known blocks
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # found in the prefix cache, or received, when first scheduled
    num_reported_blocks: int = 0  # prefill-only: blocks already given to the handoff
    num_preemptions: int = 0
    prompt_rows: list[bytes] = field(default_factory=list)  # logprobs of prompt tokens 1, 2, …
    grammar_cursor: GrammarCursor = field(default_factory=GrammarCursor)
    finish_reason: FinishReason | None = None
    pooling: Pooling | None = None  # prefill-only: end with an embedding instead of a token
    pooled: Any = None  # the sum of its hidden states so far; see engine/pooling.py
    num_continuations: int = 0  # best next tokens that its beam search is told of each beam
    beams: BeamGroup | None = None  # its search, once its prompt is computed; see engine/beams.py
    beam_of: Request | None = None  # it is one row of that request's search, in no queue
    copied_block: tuple[int, int] | None = None  # the content of the first is to be in the second
    num_in_flight: int = 0  # of its computed tokens, those of a step that is not committed
    awaited_row: int | None = None  # of that step's sampled tokens, which is its next token

    @property
    def owner(self) -> Request:
        """What others know: the request itself, or the one whose beam it is."""
        return self.beam_of or self

    @property
    def rows(self) -> list[Request]:
        """What holds its blocks: it, or the beams of its search."""
        return [self] if self.beams is None else self.beams.rows

    @property
    def width(self) -> int:
        """Rows of a step that it comes to need, which is also how many seats it takes."""
        beam = self.sampling.beam
        return 1 if beam is None or self.prefill_only else beam.width

    @property
    def num_tokens(self) -> int:
        return len(self.tokens) + (self.awaited_row is not None)

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_behind(self) -> int:
        """Tokens whose KV is not computed yet; at least one until the request ends."""
        return len(self.tokens) + (self.awaited_row is not None) - self.num_computed_tokens

    @property
    def token_limit(self) -> int:
        """The request ends when it has this many tokens."""
        return min(self.max_num_tokens, self.num_prompt_tokens + self.sampling.max_tokens)

    @property
    def max_kv_tokens(self) -> int:
        """Slots that the request can come to need: the last token's KV is never computed."""
        return self.num_tokens if self.prefill_only else self.token_limit - 1

    @property
    def num_top_logprobs(self) -> int | None:
        """How many alternatives go with each new token; None: its logprob is not wanted."""
        return self.num_continuations or self.sampling.logprobs

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Logits are needed at every position of the prompt."""
        return self.sampling.prompt_logprobs is not None and not self.num_output_tokens

    @property
    def needs_every_row(self) -> bool:
        """Whether something is asked of every position, so that no cached block is of use."""
        return self.wants_prompt_logprobs or self.pooling is Pooling.MEAN

    @property
    def goes_on(self) -> bool:
        """Whether it is not over with the awaited token, whichever that is."""
        return self.num_tokens < self.token_limit

    @property
    def output_tokens(self) -> list[int]:
        return self.tokens[self.num_prompt_tokens :]

    def check(self) -> None:
        """Raise AssertionError where the lengths contradict each other."""
        assert 0 <= self.num_cached_tokens <= self.num_tokens
        assert 0 <= self.num_computed_tokens <= self.num_tokens
        assert self.num_prompt_tokens <= self.num_tokens <= self.max_num_tokens


@dataclass(slots=True, eq=False)
class BeamGroup:
    """A request's beam search and the rows that compute it; they live and end together.

    Args:
        parents: a fork that is still to be made: for each beam of the search, the row that it
            continues. None: `rows` are the search's beams.
    """

    search: BeamSearch
    rows: list[Request]
    parents: list[int] | None
