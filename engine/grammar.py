"""Which tokens a request's grammar allows next: masks, computed while the forward pass runs.

A mask depends on the tokens before the step alone, so it needs no logits: `begin` starts the work
in a thread of its own (the library lets go of the interpreter's lock), and the sampler takes the
masks when it has the logits.

    compile once ──▶ matcher at the beginning ──copy──▶ one per request ──tokens──▶ mask

A request's matcher follows its output tokens. It is never shipped: whoever has the tokens makes it
anew, so another attempt, on whatever node, a preemption and a failed step change nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from engine.grammar_cursor import GrammarCursor
from engine.plan import StepPlan
from engine.request import Request
from wire.grammar import mistake_of, new_matcher

MAX_COMPILED = 256
"""Grammars that are kept; the one that was used longest ago goes first."""


class GrammarError(ValueError):
    """Requests whose grammar took too much, or contradicts the tokens that they have."""

    def __init__(self, request_ids: tuple[str, ...], reason: str) -> None:
        super().__init__(f"the grammar of {', '.join(request_ids)}: {reason}")
        self.request_ids = request_ids


@dataclass(frozen=True, slots=True)
class Constrained:
    """What `begin` needs of a request, as it is before the step."""

    request_id: str
    grammar: str
    output_tokens: list[int]
    cursor: GrammarCursor
    draft_tokens: tuple[int, ...] = ()

    @classmethod
    def of(cls, request: Request, draft_tokens: tuple[int, ...] = ()) -> Constrained:
        """A request as it is, and tokens that may follow."""
        return cls(
            request.request_id,
            request.sampling.grammar,
            request.output_tokens,
            request.grammar_cursor,
            draft_tokens,
        )


class Masks:
    """Forbidden tokens of some rows of a step, perhaps still being computed."""

    def __init__(self, rows: list[int], forbidden: Future[Tensor]) -> None:
        self._rows = rows
        self._forbidden = forbidden

    def apply(self, logits: Tensor) -> None:
        """Forbid in `logits` [R, V] what is not allowed. Raises GrammarError.

        Where other rules have forbidden all that is allowed (`min_tokens`, at the end of the
        output), the grammar wins.
        """
        forbidden = self._forbidden.result().to(logits.device)
        first, last = self._rows[0], self._rows[-1]
        if self._rows == list(range(first, last + 1)):  # nearly always: then nothing is copied
            _forbid(logits[first : last + 1], forbidden)
            return
        rows = torch.tensor(self._rows, device=logits.device)
        chosen = logits[rows]
        _forbid(chosen, forbidden)
        logits[rows] = chosen


def _forbid(logits: Tensor, forbidden: Tensor) -> None:
    logits.masked_fill_(forbidden, -torch.inf)
    stuck = logits.amax(-1) == -torch.inf
    if stuck.any():
        logits[stuck] = torch.zeros_like(logits[stuck]).masked_fill_(forbidden[stuck], -torch.inf)


class Grammars:
    """Compiles grammars for one model and follows requests through them.

    Args:
        tokenizer_json: the content of the tokenizer's file.
        vocab_size: columns of the logits, perhaps more than the tokenizer has tokens.

    Raises ValueError for a tokenizer that the library cannot read.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        try:
            self._tokenizer = LLTokenizer(
                tokenizer_json, n_vocab=vocab_size, eos_token=list(eos_token_ids)
            )
        except ValueError:  # the tokenizer has more tokens than the model
            self._tokenizer = LLTokenizer(tokenizer_json, eos_token=list(eos_token_ids))
        self._vocab_size = vocab_size
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = Lock()
        self._thread = ThreadPoolExecutor(1, "grammar")

    def mistake(self, grammar: str) -> str | None:
        """Why `grammar` cannot be followed; None if it can, and then it is compiled."""
        return mistake_of(self._beginning(grammar))

    def begin(self, rows: list[int], requests: list[Constrained]) -> Masks:
        """Start to compute masks for the rows `rows` of the logits.

        They belong to `requests` in their order: one row to each, and one to each draft token.
        """
        return Masks(rows, self._thread.submit(self._masks, requests))

    def guided(self, request: Request, draft: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
        """See engine.drafting.drafter.Guide: `num_tokens` at most.

        What must follow is known as text; the model may cut it into other tokens, and then this
        was a wrong draft.
        """
        constrained = Constrained.of(request)
        return self._thread.submit(self._guided, constrained, draft, num_tokens).result()

    def _guided(
        self, request: Constrained, draft: tuple[int, ...], num_tokens: int
    ) -> tuple[int, ...]:
        try:
            matcher = self._advanced(request).deep_copy()
        except GrammarError:
            return ()  # the step will say so
        forced = tuple(matcher.compute_ff_tokens()[:num_tokens])
        allowed = draft[: matcher.validate_tokens(list(draft))]
        return allowed if len(allowed) >= len(forced) else forced

    def _masks(self, requests: list[Constrained]) -> Tensor:
        """bool [R, V]: what is forbidden."""
        allowed = [mask for request in requests for mask in self._masks_of(request)]
        return torch.stack(allowed).logical_not_()

    def _masks_of(self, request: Constrained) -> list[Tensor]:
        """bool [V] each: of the request as it is, and behind each of its draft tokens.

        A row behind a token that is not allowed is of no use, so anything goes; nothing goes where
        the grammar fails, which is an error only if it does so behind known tokens.
        """
        matcher = self._advanced(request)
        masks = [self._mask(matcher)]
        if matcher.is_error():
            raise GrammarError((request.request_id,), matcher.get_error()[:200])
        if not request.draft_tokens:
            return masks
        matcher = matcher.deep_copy()
        for token in request.draft_tokens:
            if not masks[-1][token] or not matcher.consume_token(token):
                break
            mask = self._mask(matcher)
            masks.append(torch.zeros_like(mask) if matcher.is_error() else mask)
        useless = torch.ones(self._vocab_size, dtype=torch.bool)
        return masks + [useless] * (1 + len(request.draft_tokens) - len(masks))

    def _mask(self, matcher: LLMatcher) -> Tensor:
        packed = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        bits = np.unpackbits(packed, bitorder="little", count=self._vocab_size)
        return torch.from_numpy(bits.view(np.bool_))

    def _advanced(self, request: Constrained) -> LLMatcher:
        """The request's matcher behind its output tokens; usually one token is new."""
        cursor, tokens = request.cursor, request.output_tokens
        num_taken = len(cursor.tokens)
        if cursor.matcher is None or tokens[:num_taken] != cursor.tokens:
            cursor.matcher, num_taken = self._beginning(request.grammar), 0
        cursor.tokens = tokens
        if num_taken < len(tokens) and not cursor.matcher.consume_tokens(tokens[num_taken:]):
            error = cursor.matcher.get_error()[:200]
            cursor.matcher = None
            raise GrammarError((request.request_id,), error)
        return cursor.matcher

    def _beginning(self, grammar: str) -> LLMatcher:
        """A matcher at the start of an output."""
        with self._lock:
            matcher = self._compiled.get(grammar)
            if matcher is not None:
                self._compiled.move_to_end(grammar)
                return matcher.deep_copy()
        matcher = new_matcher(self._tokenizer, grammar)
        with self._lock:
            self._compiled[grammar] = matcher
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        return matcher.deep_copy()


def begin_masks(plan: StepPlan, grammars: Grammars | None) -> Masks | None:
    """Work that goes on beside the forward pass; None if no request of the step has a grammar."""
    rows: list[int] = []
    constrained = []
    end = 0
    for item in plan.scheduled:
        start, end = end, end + item.num_samples
        if item.samples and item.request.sampling.grammar:
            rows += range(start, end)
            constrained.append(Constrained.of(item.request, item.draft_tokens))
    if not rows or grammars is None:
        return None
    return grammars.begin(rows, constrained)
