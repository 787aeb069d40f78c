"""One engine's speculation: asks for drafts before a step and accounts for them after it.

    control: how many for whom ──▶ drafter: which tokens ──▶ step ──▶ accepted? seconds? ──▶ control

Drafts are a service that a step does not depend on: a drafter that raises, or takes longer than
`stall_s`, is not asked again. There is no clock here; whoever makes this gives one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor

from engine.drafting.control import Controller, Decoding, Drafted, Observed
from engine.drafting.drafter import Ask, Drafter, Guide, ReadingDrafter
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
        self._reading = drafter if isinstance(drafter, ReadingDrafter) else None
        self._controller = controller
        self._vocab_size = vocab_size
        self._clock = clock
        self._stall_s = stall_s
        self._asked: _Asked | None = None
        self._failure = ""
        self._replaced: dict[str, tuple[int, ...]] = {}  # drafts that a grammar has changed
        self.guide: Guide | None = None

    def propose(self, requests: Sequence[Request]) -> dict[str, Sequence[int]]:
        """Drafts by request, for those that decode in the coming step."""
        if self._drafter is None:
            return {}
        began = self._clock()
        if requests and self._controller.pauses(len(requests)):
            self._asked = _Asked({}, began, 0.0)
            return {}
        lengths = self._controller.lengths([self._decoding(request) for request in requests])
        drafts = self._drafts(requests, lengths) if any(lengths) or not requests else {}
        seconds = self._clock() - began
        self._watch(seconds)
        names = [request.request_id for request in requests]
        self._asked = _Asked(dict(zip(names, lengths, strict=True)), began, seconds)
        return drafts

    def _decoding(self, request: Request) -> Decoding:
        """Nothing is drafted behind the last token that the request may have."""
        most = min(
            self._controller.num_speculative_tokens, request.max_kv_tokens - request.num_tokens
        )
        wanted = request.sampling.speculate
        return Decoding(request.request_id, request.num_tokens, max(0, most) if wanted else 0)

    def _drafts(
        self, requests: Sequence[Request], lengths: Sequence[int]
    ) -> dict[str, Sequence[int]]:
        """Of all who are asked for; an idle engine's drafter is told that nobody is left."""
        assert self._drafter is not None
        self._replaced.clear()
        asks = [Ask(request, length) for request, length in zip(requests, lengths, strict=True)]
        try:
            proposed = self._drafter.propose(asks)
            return {
                ask.request.request_id: sound
                for ask, draft in zip(asks, proposed, strict=True)
                if (sound := self._guided(ask, self._sound(draft, ask.num_tokens)))
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

    def _guided(self, ask: Ask, draft: tuple[int, ...]) -> tuple[int, ...]:
        """What its grammar makes of a draft: what it forbids would be computed for nothing."""
        if self.guide is None or not ask.request.sampling.grammar or not ask.num_tokens:
            return draft
        guided = self.guide.guided(ask.request, draft, ask.num_tokens)
        if guided != draft:
            self._replaced[ask.request.request_id] = draft
        return guided

    def _watch(self, seconds: float) -> None:
        if seconds > self._stall_s:
            self._give_up(f"it took {seconds:.1f} s")

    def _give_up(self, reason: str) -> None:
        if self._drafter is not None:
            self._failure = f"the {self._drafter.method} drafter is switched off: {reason:.300}"
        self._drafter = self._reading = None

    # ------------------------------------------------------------ engine.final_states.StateReader

    def reads(self, plan: StepPlan) -> bool:
        """Whether the drafter goes on from this step's states."""
        return self._reading is not None and self._reading.reads(plan)

    @property
    def layers(self) -> tuple[int, ...]:
        """See StateReader."""
        return self._reading.layers if self._reading is not None else ()

    def saw(self, plan: StepPlan, states: Tensor) -> None:
        """The drafter's, within a step that does not depend on it either."""
        if self._reading is None:
            return
        began = self._clock()
        try:
            self._reading.saw(plan, states)
        except Exception as error:  # see above
            self._give_up(repr(error))
        self._watch(self._clock() - began)

    # ------------------------------------------------------------ after the step

    def committed(self, plan: StepPlan, progress: Sequence[RequestProgress]) -> DraftCounts | None:
        """The step that `propose` was called for is over; None if it had nothing to do with it."""
        asked, self._asked = self._asked, None
        failure, self._failure = self._failure, ""
        if asked is None:
            return None
        drafts = self._outcomes(plan, progress, asked) if any(asked.lengths.values()) else []
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

    def _outcomes(
        self, plan: StepPlan, progress: Sequence[RequestProgress], asked: _Asked
    ) -> list[Drafted]:
        """Of the requests that were to be drafted; the drafter is told, too."""
        items = {item.request.request_id: item for item in plan.scheduled}
        drafts = []
        for done in progress:
            num_asked = asked.lengths.get(done.request_id, 0)
            if not num_asked:
                continue
            item = items[done.request_id]
            drafts.append(_outcome(item, done, num_asked))
            if self._drafter is not None and item.draft_tokens:
                self._drafter.accepted(item.request, self._num_right(done, drafts[-1]))
        return drafts

    def _num_right(self, done: RequestProgress, drafted: Drafted) -> int:
        """Of the drafter's own tokens, where a grammar put others in their place."""
        own = self._replaced.get(done.request_id)
        if own is None:
            return drafted.num_accepted
        pairs = zip(own, done.new_tokens[: drafted.num_accepted], strict=False)
        return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))

    def _saved(self, step: Observed) -> float:
        """Seconds that the step's tokens would have taken longer one by one, as was measured."""
        if not step.num_drafted:
            return 0.0
        plain = self._controller.plain_seconds(step.context, step.num_requests)
        accepted = sum(drafted.num_accepted for drafted in step.drafts)
        saved = plain * (1 + accepted / step.num_requests) - step.step_s - step.draft_s
        return saved if plain else 0.0


def _outcome(item: ScheduledRequest, progress: RequestProgress, num_asked: int) -> Drafted:
    num_drafted = len(item.draft_tokens)
    num_accepted = max(0, len(progress.new_tokens) - 1)
    refused = num_accepted < num_drafted and progress.finish_reason is None
    return Drafted(
        progress.request_id, num_asked, num_drafted, num_accepted, num_accepted + refused
    )


def _observed(
    plan: StepPlan, drafts: Sequence[Drafted], asked: _Asked, now: float
) -> Observed | None:
    """The step as the control sees it; None where prompts were computed too."""
    items, num_rows = plan.scheduled, plan.num_tokens
    lengths = [len(item.draft_tokens) for item in items]
    num_drafted = sum(lengths)
    if num_rows != len(items) + num_drafted:
        return None
    return Observed(
        context=sum([item.start for item in items]),
        num_requests=len(items),
        num_rows=num_rows,
        longest_draft=max(lengths),
        num_drafted=num_drafted,
        draft_s=asked.seconds,
        step_s=now - asked.began - asked.seconds,
        drafts=drafts,
    )
