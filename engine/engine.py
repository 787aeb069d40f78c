"""The engine: requests in, tokens out, one step at a time; safe to call from two threads.

One lock guards queues and blocks. It is held while a step is planned and committed, never during
the forward pass, so that requests, aborts and reservations do not wait for the model. Meanwhile the
blocks of the requests in the step are theirs: an abort of one of them takes effect at the commit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from threading import Lock

from torch import Tensor

from engine.block_pool import BlockCounts, BlockPool
from engine.config import EngineConfig
from engine.device import give_back_memory, is_out_of_memory, synchronize
from engine.drafting.speculation import Speculation
from engine.grammar import Grammars, begin_masks
from engine.in_flight import InFlight, Outcome, Runner
from engine.logprobs import sampling_logits
from engine.lookahead import can_look_beyond
from engine.plan import (
    LayerProgress,
    OnLayers,
    StepPlan,
    StepResult,
)
from engine.planning import NO_DRAFTS
from engine.prefix_cache import CacheChanges, PrefixCache
from engine.request import Request
from engine.reservations import Reservation
from engine.sampler import Sampler
from engine.scheduler import Scheduler
from engine.spans import Spans, no_spans
from kernels.ops import LayerOps
from wire.types import BlockHandle, NodeLoad

log = logging.getLogger(__name__)


class Engine:
    """One model's scheduler, block pool and sampler around one runner."""

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        *,
        epoch: int,
        model_fingerprint: str,
        eos_token_ids: frozenset[int],
        ops: LayerOps | None = None,
        grammars: Grammars | None = None,
        spans: Spans = no_spans,
        speculation: Speculation | None = None,
    ) -> None:
        self._spans = spans
        self._speculation = speculation
        self.config = config
        self._runner = runner
        self._sampler = Sampler(eos_token_ids, ops)
        self._grammars = grammars
        if speculation is not None:
            speculation.guide = grammars
        self._pool = BlockPool(config.num_blocks, epoch)
        self._cache = PrefixCache(
            self._pool,
            config.block_size,
            model_fingerprint,
            enabled=config.enable_prefix_caching,
        )
        self._scheduler = Scheduler(config, self._pool, self._cache, eos_token_ids)
        self._lock = Lock()
        self._num_steps = 0
        self._step_request_ids: tuple[str, ...] = ()
        self._looks_ahead = config.lookahead and speculation is None  # drafts begin with the token
        self._ahead: InFlight | None = None  # launched, and what the next call of `step` tells of
        self.layer_marks: frozenset[int] = frozenset()
        """After how many layers a prefill step reports progress; none costs nothing."""

    # ------------------------------------------------------------ the step

    def step(self, on_layers: OnLayers | None = None) -> StepResult | None:
        """Draft → schedule → run → sample → read → commit; None if nothing can be computed now.

        With lookahead the next step is launched before this one's tokens are read.
        `on_layers` is called from the forward pass after the layers that `layer_marks` names.

        An error of the runner or the sampler comes through. The step has then not happened: its
        requests (`step_request_ids`) are as before and may be tried again or aborted.
        A request whose logits are broken ends alone: the result names it. A step that does not fit
        into memory is tried again with half as much in it.
        """
        num_retries = 0
        while True:
            plan = self._ahead.plan if self._ahead else self._plan(drafting=not num_retries)
            if not plan.scheduled:
                return None
            result = self._try(plan, on_layers)
            if result is not None:
                return replace(result, num_retries=num_retries)
            give_back_memory()
            num_retries += 1

    def _try(self, plan: StepPlan, on_layers: OnLayers | None) -> StepResult | None:
        """Run → sample → read → commit; None if it did not fit and a smaller step may."""
        step, self._ahead = self._ahead, None
        was_ahead = step is not None
        self._step_request_ids = _owners(plan)
        try:
            step = step or self._launch(plan, on_layers)
            self._ahead = self._look_ahead(step, on_layers)
            with self._spans("read"):
                outcome = step.outcome()
        except BaseException as error:
            if not is_out_of_memory(error):
                self._abandon(plan)
                raise
            if not self._shrink(plan):
                raise
            return None
        return replace(self._finish(plan, outcome), was_ahead=was_ahead)

    def _launch(
        self, plan: StepPlan, on_layers: OnLayers | None, sampled: Tensor | None = None
    ) -> InFlight:
        """Run → sample; on a device both may still be going on when this returns."""
        masks = begin_masks(plan, self._grammars)
        hidden: list[Tensor] = []
        wanted = hidden.append if plan.hidden_rows else None
        logits = self._runner.run(plan, self._layer_report(plan, on_layers), wanted, sampled)
        with self._spans("sample"):
            rows = sampling_logits(plan, logits)
            sampled = self._sampler.draw(rows, plan.sampling, masks)
        followed = self._looks_ahead and can_look_beyond(plan)
        return InFlight(plan, None if followed else logits, hidden, sampled)

    def _look_ahead(self, step: InFlight, on_layers: OnLayers | None) -> InFlight | None:
        """The step after a launched one, launched too; None where that one must end first."""
        if step.logits is not None:
            return None
        with self._spans("schedule"), self._lock:
            plan = self._scheduler.plan_ahead(step.plan)
        if not plan.scheduled:
            return None
        try:
            return self._launch(plan, on_layers, step.sampled)
        except Exception as error:  # planned again after this step; what is wrong shows there
            log.warning("a step could not be launched ahead: %r", error)
            try:
                synchronize(step.sampled.device)  # it must not write to blocks that get others
            finally:
                self._abandon(plan)
            return None

    def _finish(self, plan: StepPlan, outcome: Outcome) -> StepResult:
        with self._spans("commit"), self._lock:
            self._num_steps += 1
            corrupted = self._scheduler.still_here(outcome.corrupted)
            progress = self._scheduler.commit(
                plan, outcome.tokens, outcome.logprobs, outcome.corrupted, outcome.embeddings
            )
        counts = self._speculation.committed(plan, progress) if self._speculation else None
        return StepResult(
            self._num_steps,
            progress,
            plan.num_tokens,
            plan.num_preempted,
            tuple(sorted(corrupted)),
            counts,
            shape=plan.shape,
        )

    def _shrink(self, plan: StepPlan) -> bool:
        self._give_up_ahead()
        with self._lock:
            return self._scheduler.did_not_fit(plan)

    def _abandon(self, plan: StepPlan) -> None:
        self._give_up_ahead()
        with self._lock:
            self._scheduler.abandon(plan)

    def _give_up_ahead(self) -> None:
        """The step that was launched ahead counts on one that failed."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            with suppress(RuntimeError):  # the error that is on its way tells enough
                ahead.arriving.wait()  # as above
            with self._lock:
                self._scheduler.abandon(ahead.plan)

    def _draft(self) -> Mapping[str, Sequence[int]]:
        """Tokens that may follow; nobody but this thread adds tokens to requests that decode."""
        if self._speculation is None:
            return NO_DRAFTS
        with self._lock:
            decoding = self._scheduler.decoding()
        with self._spans("draft"):
            return self._speculation.propose(decoding)

    def _plan(self, *, drafting: bool) -> StepPlan:
        drafts = self._draft() if drafting else NO_DRAFTS
        with self._spans("schedule"), self._lock:
            return self._scheduler.plan(drafts)

    def _layer_report(
        self, plan: StepPlan, on_layers: OnLayers | None
    ) -> Callable[[int], None] | None:
        """What tells `on_layers` of the plan's blocks; None where there is nothing to tell."""
        marks = self.layer_marks
        if on_layers is None or not marks:
            return None
        with self._lock:
            finished = self._scheduler.blocks_to_finish(plan)
        if not finished:
            return None

        def report(num_layers: int) -> None:
            if num_layers in marks:
                on_layers(LayerProgress(num_layers, finished))

        return report

    @property
    def step_request_ids(self) -> tuple[str, ...]:
        """The requests of the step that `step` runs or ran last; one that is ahead is not meant."""
        return self._step_request_ids

    def has_work(self) -> bool:
        """Whether any request is unfinished; `step` still returns None if all wait for blocks."""
        with self._lock:
            return self._scheduler.has_work

    # ------------------------------------------------------------ requests

    @property
    def num_seats(self) -> int:
        """Rows that a step decodes at most."""
        return min(self.config.max_num_seqs, self.config.max_num_batched_tokens)

    def grammar_mistake(self, grammar: str) -> str | None:
        """Why no request can have this grammar; None if one can. Empty is none."""
        if not grammar:
            return None
        if self._grammars is None:
            return "this model's tokenizer does not allow structured output"
        return self._grammars.mistake(grammar)

    def add(self, request: Request, *, only_with_room: bool = False) -> None:
        """Queue a request; raises CapacityError or ValueError and takes nothing.

        With `only_with_room` it is not queued for blocks that others have: it would fit now.
        """
        hashes = self._cache.hashes(request.tokens, request.cache_salt)
        with self._lock:
            request.block_hashes = hashes
            self._scheduler.add(request, only_with_room=only_with_room)

    def abort(self, request_id: str) -> bool:
        """End a request and free what it holds; False if it is not here.

        If it is in the running step, that step's commit frees it. No later result mentions it.
        """
        with self._lock:
            return self._scheduler.abort(request_id)

    def release_held(self, request_id: str) -> bool:
        """Prefill side: the handoff needs a prefilled request's blocks no more."""
        with self._lock:
            return self._scheduler.release_held(request_id)

    # ------------------------------------------------------------ reservations

    def reserve(
        self, tokens: Sequence[int], max_num_tokens: int, cache_salt: str = "", width: int = 1
    ) -> Reservation:
        """Decode side: hold blocks for tokens that are computed elsewhere; raises CapacityError.

        `max_num_tokens` is the most that the request can come to, output included, and each of the
        `width` beams of a search.
        """
        if not tokens or not len(tokens) <= max_num_tokens <= self.config.max_model_len:
            raise ValueError(f"cannot reserve {len(tokens)} tokens of at most {max_num_tokens}")
        hashes = self._cache.hashes(tokens, cache_salt)
        with self._lock:
            return self._scheduler.reserve(tuple(tokens), max_num_tokens, hashes, width)

    def rebind(
        self, reservation_id: int, tokens: Sequence[int], cache_salt: str = ""
    ) -> Reservation:
        """Decode side: hold a reservation's room for another sender; the old reservation ends.

        Raises CapacityError or KeyError, and then nothing has changed.
        """
        hashes = self._cache.hashes(tokens, cache_salt)
        with self._lock:
            return self._scheduler.rebind(reservation_id, tuple(tokens), hashes)

    def adopt(self, reservation_id: int, request: Request, row: bytes = b"") -> None:
        """Decode side: all blocks were received and verified; run the request on them.

        A beam search begins with the `row` of logprobs that came with its prompt's last token.
        Raises KeyError if the reservation is not known, ValueError if the request contradicts it.
        """
        with self._lock:
            self._scheduler.adopt(reservation_id, request, row)

    def cancel_reservation(self, reservation_id: int) -> bool:
        """Decode side: the request will not come; blocks under transfer are quarantined."""
        with self._lock:
            return self._scheduler.cancel_reservation(reservation_id)

    # ------------------------------------------------------------ transfers

    def begin_io(self, handle: BlockHandle) -> bool:
        """Let a transfer read or write a block until `end_io`; False if its content is not held."""
        with self._lock:
            return self._pool.begin_io(handle)

    def end_io(self, handle: BlockHandle) -> None:
        """The transfer will not touch the block any more."""
        with self._lock:
            self._pool.end_io(handle.block_id)

    def is_current(self, handle: BlockHandle) -> bool:
        """Whether the block still has the content that the handle names."""
        with self._lock:
            return self._pool.is_current(handle)

    # ------------------------------------------------------------ what others may know

    def take_cache_events(self) -> CacheChanges:
        """Prefix blocks that became findable or were evicted since the last call."""
        with self._lock:
            return self._cache.take_events()

    def cached_hashes(self) -> tuple[bytes, ...]:
        """All findable prefix blocks."""
        with self._lock:
            return self._cache.snapshot()

    def load(self) -> NodeLoad:
        with self._lock:
            return self._scheduler.load(self._num_steps)

    def block_counts(self) -> BlockCounts:
        with self._lock:
            return self._pool.counts()

    def check_integrity(self) -> None:
        """Raise AssertionError where the engine's books contradict each other. O(blocks)."""
        with self._lock:
            self._scheduler.check_integrity()


def _owners(plan: StepPlan) -> tuple[str, ...]:
    return tuple(dict.fromkeys(item.request.owner.request_id for item in plan.scheduled))
