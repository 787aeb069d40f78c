"""One engine's speculation: asks for drafts before a step and accounts for them after it.

    control: how many for whom ──▶ drafter: which tokens ──▶ step ──▶ accepted? seconds? ──▶ control

Drafts are a service that a step does not depend on: a drafter that raises, or takes longer than
`stall_s`, is not asked again. There is no clock here; whoever makes this gives one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.drafting.control import Controller, Decoding, Drafted, Observed
from engine.drafting.drafter import Ask, Drafter
from engine.plan import DraftCounts, RequestProgress, ScheduledRequest, StepPlan
from engine.request import Request


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a step was given."""

    lengths: dict[str, int]
    began: float
    seconds: float  # that drafting took


class Speculation:
    """Used by one thread, between and around steps.

    Args:
        vocab_size: drafts end before a token that the model does not have.
        stall_s: a drafter that takes longer once is given up.
    """

    def __init__(
        self,
        drafter: Drafter,
        controller: Controller,
        *,
        vocab_size: int,
        clock: Callable[[], float],
        stall_s: float = 5.0,
    ) -> None:
        self._drafter: Drafter | None = drafter
        self._controller = controller
        self._vocab_size = vocab_size
        self._clock = clock
        self._stall_s = stall_s
        self._asked: _Asked | None = None
        self._failure = ""

    def propose(self, requests: Sequence[Request]) -> dict[str, Sequence[int]]:
        """Drafts by request, for those that decode in the coming step."""
        began = self._clock()
        lengths = self._controller.lengths([self._decoding(request) for request in requests])
        asks = [Ask(r, n) for r, n in zip(requests, lengths, strict=True)]
        drafts = self._drafts(asks) if any(lengths) or not requests else {}
        seconds = self._clock() - began
        if seconds > self._stall_s:
            self._give_up(f"it took {seconds:.1f} s")
        by_request = {ask.request.request_id: ask.num_tokens for ask in asks}
        self._asked = _Asked(by_request, began, seconds)
        return drafts

    def _decoding(self, request: Request) -> Decoding:
        """Nothing is drafted behind the last token that the request may have."""
        most = min(
            self._controller.num_speculative_tokens, request.max_kv_tokens - request.num_tokens
        )
        wanted = self._drafter is not None and request.sampling.speculate
        return Decoding(request.request_id, request.num_tokens, max(0, most) if wanted else 0)

    def _drafts(self, asks: Sequence[Ask]) -> dict[str, Sequence[int]]:
        """Of all who are asked for; an idle engine's drafter is told that nobody is left."""
        if self._drafter is None:
            return {}
        try:
            proposed = self._drafter.propose(asks)
            return {
                ask.request.request_id: sound
                for ask, draft in zip(asks, proposed, strict=True)
                if (sound := self._sound(draft, ask.num_tokens))
            }
        except Exception as error:  # whatever a drafter does, requests go on without it
            self._give_up(repr(error))
            return {}

    def _sound(self, draft: Sequence[int], num_asked: int) -> tuple[int, ...]:
        """No more than was asked for, up to the first token that there is not."""
        kept: list[int] = []
        for token in draft[:num_asked]:
            if not 0 <= token < self._vocab_size:
                break
            kept.append(int(token))
        return tuple(kept)

    def _give_up(self, reason: str) -> None:
        if self._drafter is not None:
            self._failure = f"the {self._drafter.method} drafter is switched off: {reason:.300}"
        self._drafter = None

    def committed(self, plan: StepPlan, progress: Sequence[RequestProgress]) -> DraftCounts | None:
        """The step that `propose` was called for is over; None if it had nothing to do with it."""
        asked, self._asked = self._asked, None
        failure, self._failure = self._failure, ""
        if asked is None:
            return None
        by_request = {item.request.request_id: item for item in plan.scheduled}
        decoded = [(by_request[p.request_id], p) for p in progress if p.request_id in by_request]
        drafts = [self._outcome(item, done, asked) for item, done in decoded]
        for item, done in decoded:
            if self._drafter is not None and item.draft_tokens:
                self._drafter.accepted(item.request, max(0, len(done.new_tokens) - 1))
        observed = _observed(plan, drafts, asked, self._clock())
        saved = 0.0
        if observed is not None:
            saved = self._saved(observed)
            self._controller.observe(observed)
        return DraftCounts(
            tuple((d.num_drafted, d.num_accepted) for d in drafts if d.num_drafted),
            asked.seconds,
            saved,
            failure,
        )

    def _outcome(self, item: ScheduledRequest, progress: RequestProgress, asked: _Asked) -> Drafted:
        num_drafted, num_new = len(item.draft_tokens), len(progress.new_tokens)
        num_accepted = max(0, num_new - 1)
        refused = num_accepted < num_drafted and progress.finish_reason is None
        return Drafted(
            progress.request_id,
            asked.lengths.get(progress.request_id, 0),
            num_drafted,
            num_accepted,
            num_accepted + refused,
        )

    def _saved(self, step: Observed) -> float:
        """Seconds that the step's tokens would have taken longer one by one, as was measured."""
        plain = self._controller.plain_seconds(step.context, step.num_requests)
        accepted = sum(drafted.num_accepted for drafted in step.drafts)
        if not plain or not step.num_drafted:
            return 0.0
        return plain * (1 + accepted / step.num_requests) - step.step_s - step.draft_s


def _observed(
    plan: StepPlan, drafts: Sequence[Drafted], asked: _Asked, now: float
) -> Observed | None:
    """The step as the control sees it; None where prompts were computed too."""
    items = plan.scheduled
    if any(item.num_new_tokens != 1 + len(item.draft_tokens) for item in items):
        return None
    return Observed(
        context=sum(item.start for item in items),
        num_requests=len(items),
        num_rows=plan.num_tokens,
        longest_draft=max(len(item.draft_tokens) for item in items),
        num_drafted=sum(len(item.draft_tokens) for item in items),
        draft_s=asked.seconds,
        step_s=now - asked.began - asked.seconds,
        drafts=drafts,
    )
