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


@dataclass(frozen=True, slots=True)
class Decoding:
    """A request as the decision sees it."""

    request_id: str
    num_tokens: int
    most: int  # tokens that may be drafted for it


@dataclass(frozen=True, slots=True)
class Drafted:
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
    drafts: Sequence[Drafted] = ()


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
    """See above. `lengths` before a step and `observe` after it."""

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

    @property
    def speculating(self) -> bool:
        return self._on

    def lengths(self, batch: Sequence[Decoding]) -> list[int]:
        """Tokens to draft for each request of the batch."""
        most = np.array([request.most for request in batch])
        if not batch or not most.any():
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
        lengths, gain = self._best(batch, most)
        self._on = gain >= (OFF_MARGIN if self._on else ON_MARGIN)
        if self._on:
            self._pause = FIRST_PAUSE
            self._since_plain = (self._since_plain + 1) % PLAIN_EVERY
            return lengths if self._since_plain else [0] * len(batch)
        self._since_look, self._looked_at = 0, len(batch)
        return self._probe(batch)

    def _rests(self, num_requests: int) -> bool:
        """Whether it is off, and nothing has happened that would change that."""
        self._since_look += 1
        same = self._looked_at == num_requests
        return not self._on and same and self._since_look < LOOK_EVERY

    def _forget_others(self, batch: Sequence[Decoding]) -> None:
        known = self._requests
        share = self._node.share
        self._requests = {}
        for request in batch:
            rate = known.get(request.request_id) or _Rate(share * PRIOR_TRIES, PRIOR_TRIES)
            self._requests[request.request_id] = rate

    def _probe(self, batch: Sequence[Decoding]) -> list[int]:
        """Mostly nothing; from time to time a short draft for the requests that are shortest."""
        self._since_probe += 1
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

    def _best(self, batch: Sequence[Decoding], most: NDArray[np.int64]) -> tuple[list[int], float]:
        """The lengths with the most tokens per second, and by how much that is more."""
        depths = np.arange(1.0, int(most.max()) + 1)
        share = np.array([self._requests[r.request_id].share for r in batch])
        found = min(1.0, self._found.share)
        # [B, K]: how likely the k-th drafted token of a request is right; none beyond its most
        likely = share[:, None] ** depths * (depths <= most[:, None])
        context = sum(r.num_tokens for r in batch) / 1000
        plain_s, row_s = self._plain(context, len(batch))
        plain_rate = len(batch) / plain_s
        rate, lengths = plain_rate, np.zeros(len(batch), np.int64)
        for _ in range(2):  # what is worth a row depends on the rate, which depends on that
            worth: NDArray[np.bool_] = likely > row_s * rate
            chosen, rates = self._rates(likely * worth, worth, found, plain_s, row_s)
            if rates[chosen] > rate:
                rate, lengths = float(rates[chosen]), worth[:, : chosen + 1].sum(1)
        return lengths.tolist(), rate / plain_rate

    def _plain(self, context: float, num_requests: int) -> tuple[float, float]:
        """Seconds of a step without drafts, and of one row more in it."""
        points = np.array([[context, num_requests], [context, num_requests + 1]])
        plain, more = self._step_costs.seconds(points).tolist()
        return max(plain, 1e-9), max(more - plain, 0.0)

    def _rates(
        self,
        likely: NDArray[np.float64],
        worth: NDArray[np.bool_],
        found: float,
        plain_s: float,
        row_s: float,
    ) -> tuple[int, NDArray[np.float64]]:
        """Tokens per second if drafts are at most 1, 2, ... long; the best one's index."""
        tokens = len(likely) + found * likely.sum(0).cumsum()
        drafted = worth.sum(0).cumsum()
        longest = np.arange(1, likely.shape[1] + 1)
        draft_s = self._draft_costs.seconds(self._draft_features(longest, drafted))
        rates = tokens / (plain_s + found * row_s * drafted + draft_s)
        return int(rates.argmax()), rates

    def _draft_features(
        self, longest: NDArray[np.int64], drafted: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        if not self.cost_per_token:
            longest, drafted = np.zeros_like(longest), np.zeros_like(drafted)
        return np.stack([longest, drafted], axis=-1).astype(np.float64)

    # ------------------------------------------------------------ what came of it

    def observe(self, step: Observed) -> None:
        """A step of nothing but decoding is over."""
        self._step_costs.observe(
            step.num_rows, (step.context / 1000, float(step.num_rows)), step.step_s
        )
        if any(drafted.num_asked for drafted in step.drafts):
            features = self._draft_features(
                np.array(step.longest_draft), np.array(step.num_drafted)
            )
            self._draft_costs.observe(
                step.longest_draft + 100 * step.num_requests, features.tolist(), step.draft_s
            )
        for drafted in step.drafts:
            self._observe_draft(drafted)

    def _observe_draft(self, drafted: Drafted) -> None:
        if drafted.num_asked:
            self._found.observe(drafted.num_drafted, drafted.num_asked, NODE_DECAY)
        if not drafted.num_tried:
            return
        self._node.observe(drafted.num_accepted, drafted.num_tried, NODE_DECAY)
        rate = self._requests.get(drafted.request_id)
        if rate is not None:
            rate.observe(drafted.num_accepted, drafted.num_tried, DECAY)

    def plain_seconds(self, context: int, num_requests: int) -> float:
        """What a step without drafts would take; 0 as long as nothing was measured."""
        if not self._step_costs.num_kinds:
            return 0.0
        return self._plain(context / 1000, num_requests)[0]
