"""Output tokens on their way to the routers: one message per step and router, repeated on request.

An attempt's tokens stay here until the router has acknowledged its end, so a lost connection loses
no token. A router that does not read is given up with all its requests; tokens are never dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from node.router_link import RouterLink
from wire.logprobs import Logprobs
from wire.request_messages import BeamsFound, PrefillTiming, Tokens, TokenUpdate
from wire.types import AttemptId, FinishReason

_FINISHED_TTL_S = 120.0  # a router that has not acknowledged by then has failed or given up


@dataclass(slots=True)
class _Stream:
    link: RouterLink
    tokens: list[int] = field(default_factory=list)  # output tokens from index `base` on
    base: int = 0
    rows: list[bytes] = field(default_factory=list)  # the tokens' logprobs, or none
    prompt_rows: tuple[bytes, ...] = ()
    finish: FinishReason | None = None
    num_cached_tokens: int | None = None
    timing: PrefillTiming | None = None
    finished_at: float = 0.0
    found: BeamsFound | None = None  # what it ends with instead of tokens

    def logprobs_from(self, skipped: int) -> Logprobs | None:
        """What goes with the tokens from `skipped` on; the prompt's with the very first."""
        if not self.rows and not self.prompt_rows:
            return None
        return Logprobs(tuple(self.rows[skipped:]), () if skipped else self.prompt_rows)


class TokenOutbox:
    """What this node owes to its routers."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._streams: dict[AttemptId, _Stream] = {}
        self._pending: dict[RouterLink, list[TokenUpdate]] = {}

    def __len__(self) -> int:
        return len(self._streams)

    def __contains__(self, id: AttemptId) -> bool:
        return id in self._streams

    def open(self, id: AttemptId, link: RouterLink, base: int = 0) -> None:
        """Tokens of `id` will go to `link`; the first one has output index `base`."""
        self._streams[id] = _Stream(link, base=base)

    def add(
        self,
        id: AttemptId,
        tokens: tuple[int, ...],
        finish: FinishReason | None,
        num_cached_tokens: int | None = None,
        logprobs: Logprobs | None = None,
        timing: PrefillTiming | None = None,
    ) -> None:
        """Queue new tokens for the next `flush`; either all of a stream have logprobs or none."""
        stream = self._streams.get(id)
        if stream is None:
            return
        index = stream.base + len(stream.tokens)
        stream.tokens.extend(tokens)
        if logprobs is not None:
            stream.rows.extend(logprobs.tokens)
            stream.prompt_rows = stream.prompt_rows or logprobs.prompt
        stream.finish = finish
        if num_cached_tokens is not None:
            stream.num_cached_tokens, stream.timing = num_cached_tokens, timing
        if finish is not None:
            stream.finished_at = self._clock()
        update = TokenUpdate(id, index, tokens, finish, num_cached_tokens, logprobs, timing)
        self._pending.setdefault(stream.link, []).append(update)

    def end_with(self, found: BeamsFound) -> None:
        """A beam search is over; it has had no tokens."""
        stream = self._streams.get(found.id)
        if stream is None:
            return
        stream.found, stream.finish = found, FinishReason.STOP
        stream.finished_at = self._clock()
        stream.link.send(found)

    def flush(self) -> None:
        """Send what is queued: one message per router."""
        pending, self._pending = self._pending, {}
        for link, updates in pending.items():
            link.send(Tokens(tuple(updates)))

    def resend(self, id: AttemptId, index: int) -> bool:
        """Repeat the tokens of `id` from `index` on, with its end; False if it is not known."""
        stream = self._streams.get(id)
        if stream is None:
            return False
        if stream.found is not None:
            stream.link.send(stream.found)
            return True
        skipped = min(max(0, index - stream.base), len(stream.tokens))
        update = TokenUpdate(
            id,
            stream.base + skipped,
            tuple(stream.tokens[skipped:]),
            stream.finish,
            stream.num_cached_tokens,
            stream.logprobs_from(skipped),
            stream.timing,
        )
        stream.link.send(Tokens((update,)))
        return True

    def forget(self, id: AttemptId) -> None:
        """The router has everything, or nobody waits any more."""
        self._streams.pop(id, None)

    def forget_router(self, link: RouterLink) -> None:
        """This life of the router is over: what was for it is nobody's."""
        self._pending.pop(link, None)
        for id in [id for id, stream in self._streams.items() if stream.link is link]:
            self.forget(id)

    def expire(self) -> None:
        """Forget ends that nobody acknowledged for long."""
        horizon = self._clock() - _FINISHED_TTL_S
        late = [
            id
            for id, stream in self._streams.items()
            if stream.finish is not None and stream.finished_at < horizon
        ]
        for id in late:
            self.forget(id)
