"""One choice's text: from logged tokens to what the client may see, and why it ended.

The token that ended a choice (end of text, `stop_token_ids`) is counted and not shown. With stop
strings tokens are taken one at a time, so that the count does not depend on message boundaries.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.detokenizer import Detokenizer
from router.stops import StopMatcher
from wire.types import FinishReason


class ChoiceText:
    """Accumulates nothing but what is held back; `num_tokens` is the usage's count."""

    def __init__(
        self, detokenizer: Detokenizer, stops: Sequence[str] = (), min_tokens: int = 0
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = StopMatcher(stops) if stops else None
        self._min_tokens = min_tokens  # stop strings do not count before that many tokens
        self.num_tokens = 0
        self.finish: FinishReason | None = None

    def push(self, tokens: tuple[int, ...], finish: FinishReason | None) -> str:
        """Text to show for new tokens; sets `finish` when the choice has ended."""
        shown = tokens[:-1] if finish is FinishReason.STOP else tokens
        if self._stops is None:
            text = self._detokenizer.push(shown)
            self.num_tokens += len(tokens)
        else:
            text = self._push_with_stops(shown)
            if self.finish is not None:
                return text
            self.num_tokens += len(tokens) - len(shown)
        if finish is not None:
            text += self._end(finish)
        return text

    def _push_with_stops(self, tokens: tuple[int, ...]) -> str:
        pieces = []
        for token in tokens:
            self.num_tokens += 1
            pieces.append(self._pass_stops(self._detokenizer.push((token,))))
            if self.finish is not None:
                break
        return "".join(pieces)

    def _pass_stops(self, text: str) -> str:
        assert self._stops is not None
        if self.num_tokens <= self._min_tokens:
            return text
        text, hit = self._stops.push(text)
        if hit:
            self.finish = FinishReason.STOP
        return text

    def _end(self, finish: FinishReason) -> str:
        text = self._detokenizer.flush()
        if self._stops is not None:
            text = self._pass_stops(text)
            if self.finish is None:
                text += self._stops.flush()
        self.finish = finish if self.finish is None else self.finish
        return text
