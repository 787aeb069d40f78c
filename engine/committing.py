"""Enters what a step computed into its requests, and says what came of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from engine.beams import Beams
from engine.block_pool import BlockPool, Owner
from engine.config import EngineConfig
from engine.plan import RequestProgress, ScheduledRequest, StepPlan
from engine.prefix_cache import PrefixCache
from engine.queues import Queues
from engine.request import Request
from engine.rows import accepted
from engine.stops import finish_reason
from engine.tails import Tails
from wire.logprobs import Logprobs
from wire.types import BlockHandle, FinishReason, Hypothesis

NO_LOGPROBS: Mapping[str, Logprobs] = {}
NO_EMBEDDINGS: Mapping[str, bytes] = {}


class Committer:
    """Advances requests, publishes their full blocks, and ends those that are done."""

    def __init__(
        self,
        config: EngineConfig,
        pool: BlockPool,
        cache: PrefixCache,
        queues: Queues,
        beams: Beams,
        eos_token_ids: frozenset[int],
    ) -> None:
        self._config = config
        self._pool = pool
        self._cache = cache
        self._queues = queues
        self._beams = beams
        self._tails = Tails(config, pool, cache)
        self._eos_token_ids = eos_token_ids

    def commit(
        self,
        plan: StepPlan,
        tokens: Sequence[int],
        logprobs: Mapping[str, Logprobs] = NO_LOGPROBS,
        corrupted: Collection[str] = (),
        embeddings: Mapping[str, bytes] = NO_EMBEDDINGS,
    ) -> tuple[RequestProgress, ...]:
        """Enter what a step computed; `tokens` are what its rows sampled, in the plan's order.

        `logprobs`, by request: of its new tokens and of the prompt tokens that its chunk told.
        `corrupted` requests end without progress, and what they computed is found by nobody.
        `embeddings`, by request: of those that end with one.
        """
        num_samples = [item.num_samples for item in plan.scheduled]
        assert sum(num_samples) == len(tokens), f"{len(tokens)} tokens for {sum(num_samples)} rows"
        sampled = iter(tokens)
        entered: set[str] = set()
        progress = []
        for item, count in zip(plan.scheduled, num_samples, strict=True):
            new_tokens = accepted(item.draft_tokens, tuple(islice(sampled, count)))
            request = item.request.owner
            if request.request_id in entered:
                continue  # all beams of a search are entered with the first
            entered.add(request.request_id)
            if request.request_id in corrupted:
                self._queues.discard(request)
            elif request.request_id in self._queues.leaving:
                continue
            elif request.beams is not None:
                progress.append(self._search(request, logprobs))
            else:
                done = self._advance(item, new_tokens, logprobs.get(request.request_id))
                progress.append(self._embedded(done, request, embeddings))
        self._queues.end_step()
        return tuple(progress)

    def _advance(
        self, item: ScheduledRequest, new_tokens: tuple[int, ...], logprobs: Logprobs | None
    ) -> RequestProgress:
        request = item.request
        request.num_in_flight, request.awaited_row = 0, None
        request.num_computed_tokens = item.end - len(item.draft_tokens)
        self._queues.copied(request)
        index = request.num_output_tokens
        finished = self._take_finished_blocks(request) if request.prefill_only else ()
        hypotheses: tuple[Hypothesis, ...] = ()
        if new_tokens and request.sampling.beam is not None:
            assert logprobs is not None
            self.publish(request, item.start)
            new_tokens, hypotheses = self._begin_search(request, new_tokens, logprobs.tokens[0])
        else:
            new_tokens = self._append(request, new_tokens)
            self.publish(request, item.start)
        if logprobs is not None:
            request.prompt_rows[item.start :] = logprobs.prompt  # a preempted prompt begins anew
            told = logprobs.tokens[: len(new_tokens)]
            logprobs = Logprobs(told, () if index else tuple(request.prompt_rows))
        if new_tokens:
            self._leave_if_done(request)
        return RequestProgress(
            request_id=request.request_id,
            num_computed_tokens=request.num_computed_tokens,
            index=index,
            new_tokens=new_tokens,
            finish_reason=request.finish_reason,
            num_cached_tokens=request.num_cached_tokens,
            finished_blocks=finished,
            logprobs=logprobs if new_tokens else None,
            hypotheses=hypotheses,
        )

    def _begin_search(
        self, request: Request, new_tokens: tuple[int, ...], row: bytes
    ) -> tuple[tuple[int, ...], tuple[Hypothesis, ...]]:
        """Its new tokens, of which a search has none before its end, and what it has found."""
        if not request.prefill_only:
            return (), self._beams.begin(request, row)
        # Where the search goes on it begins again, with the same row.
        search = self._beams.first(request, row)
        request.tokens += new_tokens
        if not search.over:
            return new_tokens, ()
        request.finish_reason = search.finished[0].finish
        return new_tokens, tuple(search.finished)

    def _search(self, request: Request, logprobs: Mapping[str, Logprobs]) -> RequestProgress:
        """A step of a search that has begun."""
        num_beams = len(request.rows)
        return RequestProgress(
            request_id=request.request_id,
            num_computed_tokens=request.num_computed_tokens,
            index=0,
            new_tokens=(),
            finish_reason=None,
            num_cached_tokens=request.num_cached_tokens,
            hypotheses=self._beams.advance(request, logprobs),
            num_beams=num_beams,
        )

    def _append(self, request: Request, new_tokens: tuple[int, ...]) -> tuple[int, ...]:
        """The tokens that the request takes: none behind the one that ends it.

        The last one's KV is still to be computed, that of accepted draft tokens is there.
        """
        for count, token in enumerate(new_tokens, start=1):
            request.tokens.append(token)
            request.num_computed_tokens += count > 1
            request.finish_reason = finish_reason(request, self._eos_token_ids)
            if request.finish_reason is not None:
                return new_tokens[:count]
        return new_tokens

    def _embedded(
        self, progress: RequestProgress, request: Request, embeddings: Mapping[str, bytes]
    ) -> RequestProgress:
        """Ends the request if it has its embedding now."""
        embedding = embeddings.get(request.request_id)
        if embedding is None:
            return progress
        self._queues.drop(request)
        return replace(progress, embedding=embedding)

    def publish(self, request: Request, start: int) -> None:
        """Make the blocks that became full since `start` findable."""
        size = self._config.block_size
        old, new = start // size, request.num_computed_tokens // size
        if new > len(request.block_hashes):
            self._cache.extend(request.block_hashes, request.tokens, request.cache_salt)
        self._cache.publish(request.block_table[old:new], request.block_hashes[old:new])

    def end_at_limit(self, request: Request, num_new_tokens: int) -> RequestProgress:
        """End a request whose last tokens have come without a plan."""
        request.finish_reason = FinishReason.LENGTH
        self._leave_if_done(request)
        return RequestProgress(
            request_id=request.request_id,
            num_computed_tokens=request.num_computed_tokens,
            index=request.num_output_tokens - num_new_tokens,
            new_tokens=tuple(request.tokens[-num_new_tokens:]),
            finish_reason=request.finish_reason,
            num_cached_tokens=request.num_cached_tokens,
        )

    def _take_finished_blocks(self, request: Request) -> tuple[tuple[int, BlockHandle], ...]:
        """Blocks that will not change any more and were not reported; call before sampling."""
        finished = self._finished_blocks(request, request.num_computed_tokens)
        request.num_reported_blocks += len(finished)
        return finished

    def _finished_blocks(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[tuple[int, BlockHandle], ...]:
        """Not reported blocks that do not change once so much is computed."""
        if num_computed_tokens < request.num_tokens:
            end = num_computed_tokens // self._config.block_size
        else:
            end = len(request.block_table)
        start = request.num_reported_blocks
        handles = self._pool.handles(request.block_table[start:end])
        return tuple(enumerate(handles, start))

    def blocks_to_finish(
        self, plan: StepPlan
    ) -> tuple[tuple[str, tuple[tuple[int, BlockHandle], ...]], ...]:
        """By request, the blocks that the planned step will report as finished."""
        return tuple(
            (item.request.request_id, finished)
            for item in plan.scheduled
            if item.request.prefill_only
            and (finished := self._finished_blocks(item.request, item.end))
        )

    def _leave_if_done(self, request: Request) -> None:
        """Free the seat of a request that sampled its last token here."""
        if request.prefill_only:
            self._tails.publish(request)
            self._pool.hand_over(request.block_table, Owner.RUNNING, Owner.LEASED)
            self._queues.held[request.request_id] = request
            self._queues.running.remove(request)
            del self._queues.requests[request.request_id]
        elif request.finish_reason is not None:
            self._queues.end(request)
