"""How many tokens to draft for each request of a step: as many as pay.

With probability p of acceptance per token, a draft of k tokens yields 1 + p + ... + p^k tokens in a
step (Leviathan et al. 2023, section 3.1). Each costs a row of the target's step, and some time to
draft. Both are measured, p per request and the costs per node, and the lengths are those that give
the batch the most tokens per second; none, where that is most.

    learning    few steps measured: without drafts, with long ones and short ones in turn
    speculating
    off         no length pays; now and then two requests are drafted for a step, in case it would

Requests that speculate pay for the others' time too, so lengths are decided for the batch: a token
is drafted if it comes at a better rate than the batch's own. Going off and on takes a margin.
This is a pure state machine: time comes with what is observed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.drafting.costs import LinearCosts

ON_MARGIN = 1.05  # the gain that begins speculation
OFF_MARGIN = 1.02  # the gain that keeps it
PRIOR_TRIES = 3.0  # how many tries the node's acceptance counts for in a new request
DECAY = 0.93  # of what was tried, per step of a request
NODE_DECAY = 0.998
FIRST_ACCEPTANCE = 0.6
LEARNING_STEPS = 12
FIRST_PAUSE, LONGEST_PAUSE = 16, 512  # steps between probes
PROBED = 2  # requests that a probe drafts for, and its tokens
PLAIN_EVERY = 48  # steps, while on: what drafts are compared with must not be what it once was
LOOK_EVERY = 16  # steps, while off: costs change slowly, and looking costs a tenth of a millisecond
HOLD = 4  # steps, while on, that lengths are kept for if the batch stays the same


class Decoding(NamedTuple):  # these two are made for each request of each step, so they are cheap
    """A request as the decision sees it."""

    request_id: str
    num_tokens: int
    most: int  # tokens that may be drafted for it


class Drafted(NamedTuple):
    """What came of one request's draft."""

    request_id: str
    num_asked: int
    num_drafted: int  # and computed
    num_accepted: int
    num_tried: int  # up to the first wrong one


@dataclass(frozen=True, slots=True)
class Observed:
    """A step in which requests only decoded."""

    context: int  # tokens of all its requests
    num_requests: int
    num_rows: int
    longest_draft: int
    num_drafted: int
    draft_s: float
    step_s: float  # without the drafting
    drafts: Sequence[Drafted] = ()  # of the requests that were to be drafted


@dataclass(slots=True)
class _Rate:
    """A share of tries, of which old ones fade."""

    hits: float
    tries: float

    def observe(self, hits: int, tries: int, decay: float) -> None:
        self.hits = self.hits * decay + hits
        self.tries = self.tries * decay + tries

    @property
    def share(self) -> float:
        return self.hits / self.tries


@dataclass(slots=True)
class Controller:
    """See above. Before a step `pauses` and, if it does not, `lengths`; after it `observe`."""

    num_speculative_tokens: int
    cost_per_token: bool = True
    adaptive: bool = True  # else always as many as may be
    _step_costs: LinearCosts = field(default_factory=LinearCosts)
    _draft_costs: LinearCosts = field(default_factory=LinearCosts)
    _node: _Rate = field(default_factory=lambda: _Rate(FIRST_ACCEPTANCE * 4, 4.0))
    _found: _Rate = field(default_factory=lambda: _Rate(4.0, 4.0))  # drafted of asked
    _requests: dict[str, _Rate] = field(default_factory=dict)
    _num_learning: int = 0  # steps in which drafts were possible, up to all of these
    _on: bool = True
    _pause: int = FIRST_PAUSE
    _since_probe: int = 0
    _since_plain: int = 0
    _since_look: int = 0
    _looked_at: int = 0  # requests in the batch when it was last decided that nothing pays
    _held: dict[str, int] = field(default_factory=dict)  # the lengths that were decided last

    @property
    def speculating(self) -> bool:
        return self._on

    def pauses(self, num_requests: int) -> bool:
        """Whether the coming step goes without drafts whatever is in it, so that nobody looks."""
        if self._on or not self.adaptive:
            return False
        self._since_look += 1
        self._since_probe += 1
        return self._rests(num_requests) and self._since_probe < self._pause

    def _rests(self, num_requests: int) -> bool:
        """Whether it is off, and nothing has happened that would change that."""
        same = self._looked_at == num_requests
        return not self._on and same and self._since_look < LOOK_EVERY

    def lengths(self, batch: Sequence[Decoding]) -> list[int]:
        """Tokens to draft for each request of the batch."""
        if not any(request.most for request in batch):
            return [0] * len(batch)
        self._forget_others(batch)
        if not self.adaptive:
            return [request.most for request in batch]
        if self._num_learning < LEARNING_STEPS:
            halves = (2, 0, 1, 0)[self._num_learning % 4]
            self._num_learning += 1
            return [(request.most * halves + 1) // 2 for request in batch]
        if self._rests(len(batch)):
            return self._probe(batch)
        if not self._decided(batch):
            lengths, gain = self._best(batch)
            self._on = gain >= (OFF_MARGIN if self._on else ON_MARGIN)
            self._since_look, self._looked_at = 0, len(batch)
            self._held = dict(zip(self._requests, lengths, strict=True))
        if not self._on:
            return self._probe(batch)
        self._pause, self._since_probe = FIRST_PAUSE, 0
        self._since_plain = (self._since_plain + 1) % PLAIN_EVERY
        if not self._since_plain:
            return [0] * len(batch)
        return [min(request.most, self._held[request.request_id]) for request in batch]

    def _decided(self, batch: Sequence[Decoding]) -> bool:
        """Whether it is on, and the lengths of a moment ago hold for this batch too."""
        self._since_look += 1
        return self._on and self._since_look < HOLD and self._held.keys() == self._requests.keys()

    def _forget_others(self, batch: Sequence[Decoding]) -> None:
        known = self._requests
        if [*known] == [request.request_id for request in batch]:
            return
        prior = self._node.share * PRIOR_TRIES
        self._requests = {
            request.request_id: known.get(request.request_id) or _Rate(prior, PRIOR_TRIES)
            for request in batch
        }

    def _probe(self, batch: Sequence[Decoding]) -> list[int]:
        """Mostly nothing; from time to time a short draft for the requests that are shortest."""
        lengths = [0] * len(batch)
        if self._since_probe < self._pause:
            return lengths
        self._since_probe = 0
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        order = sorted(range(len(batch)), key=lambda i: batch[i].num_tokens)
        for index in order[:PROBED]:
            lengths[index] = min(PROBED, batch[index].most)
        return lengths

    # ------------------------------------------------------------ what pays

    def _best(self, batch: Sequence[Decoding]) -> tuple[list[int], float]:
        """The lengths with the most tokens per second, and by how much that is more."""
        most = np.array([request.most for request in batch])
        depths = np.arange(1.0, int(most.max()) + 1)
        share = np.array([rate.share for rate in self._requests.values()])
        found = min(1.0, self._found.share)
        # [B, K]: how likely the k-th drafted token of a request is right; none beyond its most
        likely = share[:, None] ** depths * (depths <= most[:, None])
        context = sum(r.num_tokens for r in batch) / 1000
        plain_s, row_s = self._plain(context, len(batch))
        plain_rate = len(batch) / plain_s
        rate, lengths = plain_rate, np.zeros(len(batch), np.int64)
        for _ in range(2):  # what is worth a row depends on the rate, which depends on that
            worth: NDArray[np.bool_] = likely > row_s * rate
            chosen, reached = self._rates(likely * worth, worth, found, plain_s, row_s)
            if reached <= rate:
                break
            rate, lengths = reached, worth[:, : chosen + 1].sum(1)
        return lengths.tolist(), rate / plain_rate

    def _plain(self, context: float, num_requests: int) -> tuple[float, float]:
        """Seconds of a step without drafts, and of one row more in it."""
        constant, of_context, of_row = self._step_costs.coefficients(2)
        return max(constant + of_context * context + of_row * num_requests, 1e-9), of_row

    def _rates(
        self,
        likely: NDArray[np.float64],
        worth: NDArray[np.bool_],
        found: float,
        plain_s: float,
        row_s: float,
    ) -> tuple[int, float]:
        """Of drafts that are at most 1, 2, ... long, the best and its tokens per second."""
        tokens = len(likely) + found * likely.sum(0).cumsum()
        drafted = worth.sum(0).cumsum()
        constant, of_longest, of_token = self._draft_costs.coefficients(2)
        row_s = found * row_s + of_token
        longest = np.arange(1, len(drafted) + 1)
        rates = tokens / (plain_s + constant + of_longest * longest + row_s * drafted)
        chosen = int(rates.argmax())
        return chosen, float(rates[chosen])

    # ------------------------------------------------------------ what came of it

    def observe(self, step: Observed) -> None:
        """A step of nothing but decoding is over."""
        self._step_costs.observe(
            step.num_rows, (step.context / 1000, float(step.num_rows)), step.step_s
        )
        if step.drafts:
            longest, num_drafted = step.longest_draft, step.num_drafted
            features = (longest, num_drafted) if self.cost_per_token else (0, 0)
            self._draft_costs.observe(longest + 100 * step.num_requests, features, step.draft_s)
            self._observe_drafts(step.drafts)

    def _observe_drafts(self, drafts: Sequence[Drafted]) -> None:
        _, *numbers = zip(*drafts, strict=True)
        asked, drafted, accepted, tried = map(sum, numbers)
        decay = NODE_DECAY ** len(drafts)
        self._found.observe(drafted, asked, decay)
        if not tried:
            return
        self._node.observe(accepted, tried, decay)
        for draft in drafts:
            rate = self._requests.get(draft.request_id)
            if rate is not None and draft.num_tried:
                rate.observe(draft.num_accepted, draft.num_tried, DECAY)

    def plain_seconds(self, context: int, num_requests: int) -> float:
        """What a step without drafts would take; 0 as long as nothing was measured."""
        if not self._step_costs.num_kinds:
            return 0.0
        return self._plain(context / 1000, num_requests)[0]
