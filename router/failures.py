"""What went wrong with one choice so far: how often, whom it avoids since, when it is enough."""

from __future__ import annotations

from collections import Counter

from router import errors
from router.breaker import OF_TRANSFERS, Pair
from router.errors import ApiError
from wire.request_messages import AttemptFailed
from wire.types import NodeId

# A poison request must not walk through the fleet.
MAX_DEATHS = 2
MAX_DIGEST_FAILURES = 2
MAX_DIVERGENCES = 2
MAX_INTERNAL_FAILURES = 2
MAX_FAILURES = 6

# Nothing had begun, so the request is not at fault: a router that stood still loses all of its
# nodes one after the other when it goes on.
MAX_LOST_RESERVATIONS = 20

# Nodes that drain were told to, by an operator or a tuner that moves them: a long stream may meet
# many of them.
MAX_DRAINED = 100
MAX_REVOKED = 20  # a lease ends so with its draining node, or by the router's own word

_LIMITS = {
    "node_lost": MAX_DEATHS,
    "digest": MAX_DIGEST_FAILURES,
    "divergence": MAX_DIVERGENCES,
    "internal": MAX_INTERNAL_FAILURES,
    "reserve_lost": MAX_LOST_RESERVATIONS,
    "drained": MAX_DRAINED,
    "revoked": MAX_REVOKED,
}
_NOT_ITS_FAULT = ("reserve_lost", "drained", "revoked")  # not among the failures of any kind


class Failures:
    """Of one choice; bounded, because the choice ends when there are too many."""

    def __init__(self) -> None:
        self.avoid: set[NodeId] = set()  # nodes that another one should stand in for
        self.pairs: set[Pair] = set()  # whose transfer of this very choice has failed
        self._by_cause: Counter[str] = Counter()

    def count(self, cause: str, pair: Pair | None) -> None:
        """An attempt of `pair` (None: it had no decode node) has ended for `cause`."""
        self._by_cause[cause] += 1
        if pair is not None and cause in OF_TRANSFERS:
            self.pairs.add(pair)
        if pair is not None and cause == "expired":
            self.avoid.add(pair.prefill)  # it stands still, to whomever it would have to send

    @property
    def hopeless(self) -> bool:
        """Whether another attempt would do more harm than good."""
        counts = self._by_cause
        too_often = any(counts[cause] >= limit for cause, limit in _LIMITS.items())
        excused = sum(counts[cause] for cause in _NOT_ITS_FAULT)
        return too_often or counts.total() - excused >= MAX_FAILURES


def final_error(message: AttemptFailed) -> ApiError:
    """What a client is told of a failure that no other node would mend."""
    if message.cause in ("too_long", "capacity"):  # more than the node holds when it is empty
        return errors.bad_request(message.message, code="context_length_exceeded")
    if message.cause == "invalid":
        return errors.bad_request(message.message)
    text = f"The request failed on its node: {message.message}"
    return errors.server_error(text, message.cause)
