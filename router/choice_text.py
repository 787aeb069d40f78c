"""One choice's text: from logged tokens to what the client may see, and why it ended.

The token that ended a choice (end of text, `stop_token_ids`) is counted and not shown. With stop
strings tokens are taken one at a time, so that the count does not depend on message boundaries.

Where a client wants to know the tokens too (their ids or logprobs), each token is told with the
text that completes it:

    tokens  | a | b1 | b2 | c |        b1 and b2 make one character
    shown   "a"  ""   "b"  ""          c could begin a stop string and is held back
    told     a   –   b1 b2  –          what is left is told with the end

Every counted token is told once, also the one that ended the choice and those of a stop string that
is cut away, as vLLM does; none behind it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from router.detokenizer import Detokenizer
from router.stops import StopMatcher
from wire.types import FinishReason


@dataclass(slots=True)
class Told:
    """One token of an answer."""

    token: int
    row: bytes | None  # its logprobs, packed; None where there are none
    offset: int  # characters of the choice's text before it


@dataclass(frozen=True, slots=True)
class TextRules:
    """What a client asked for concerning text."""

    stops: tuple[str, ...] = ()
    min_tokens: int = 0  # stop strings do not count before that many tokens
    include_stop: bool = False
    tells_tokens: bool = False
    is_mute: bool = False  # no output was asked for: the sampled token is neither shown nor counted


class ChoiceText:
    """Accumulates nothing but what is held back; `num_tokens` is the usage's count."""

    def __init__(self, detokenizer: Detokenizer, rules: TextRules) -> None:
        self._detokenizer = detokenizer
        self._rules = rules
        self._stops = StopMatcher(rules.stops, include=rules.include_stop) if rules.stops else None
        self._trail = _Trail() if rules.tells_tokens else None
        self._is_plain = not (rules.stops or rules.tells_tokens or rules.is_mute)
        self.num_tokens = 0
        self.finish: FinishReason | None = None

    def push(
        self, tokens: tuple[int, ...], finish: FinishReason | None, rows: tuple[bytes, ...] = ()
    ) -> str:
        """Text to show for new tokens; sets `finish` when the choice has ended."""
        if self._is_plain and finish is None:  # most calls
            self.num_tokens += len(tokens)
            return self._detokenizer.push(tokens)
        if self._rules.is_mute:
            self.finish = FinishReason.LENGTH if finish is not None else None
            return ""
        hides_last = finish is FinishReason.STOP and not self._rules.include_stop
        shown = tokens[:-1] if hides_last else tokens
        text = self._push_shown(shown, rows)
        if self.finish is None:
            self.num_tokens += len(tokens) - len(shown)
            if self._trail is not None and hides_last:
                self._trail.add(tokens[-1], rows[-1] if rows else None)
            if finish is not None:
                text += self._end(finish)
        if self._trail is not None:
            self._trail.shown(text, self.finish is not None)
        return text

    @property
    def stop(self) -> str | None:
        """The stop string that ended it."""
        return None if self._stops is None else self._stops.hit

    def take_told(self) -> list[Told]:
        """The tokens that belong to the text shown last."""
        return [] if self._trail is None else self._trail.take()

    def _push_shown(self, tokens: tuple[int, ...], rows: tuple[bytes, ...]) -> str:
        if self._stops is None and self._trail is None:
            self.num_tokens += len(tokens)
            return self._detokenizer.push(tokens)
        pieces = []
        for index, token in enumerate(tokens):
            self.num_tokens += 1
            text = self._detokenizer.push((token,))
            if self._trail is not None:
                self._trail.add(token, rows[index] if rows else None, text, self._detokenizer.holds)
            pieces.append(self._pass_stops(text))
            if self.finish is not None:
                break
        return "".join(pieces)

    def _pass_stops(self, text: str) -> str:
        if self._stops is None or self.num_tokens <= self._rules.min_tokens:
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


class _Trail:
    """Which tokens the client may know, given how far the text has been shown."""

    def __init__(self) -> None:
        self._open: deque[Told] = deque()  # their last character is not whole
        self._whole: deque[tuple[Told, int]] = deque()  # with where their text ends
        self._due: list[Told] = []
        self._num_decoded = 0
        self._num_shown = 0

    def add(self, token: int, row: bytes | None, text: str = "", open: bool = False) -> None:
        """`token` made the decoder give `text`; `open` if it still holds a part of a character."""
        self._open.append(Told(token, row, self._num_decoded))
        self._num_decoded += len(text)
        if not open:
            self._whole.extend((told, self._num_decoded) for told in self._open)
            self._open.clear()

    def shown(self, text: str, ended: bool) -> None:
        """The client sees `text`, and nothing after it if the choice has `ended`."""
        self._num_shown += len(text)
        if not text and not ended:
            return
        while self._whole and (ended or self._whole[0][1] <= self._num_shown):
            self._due.append(self._whole.popleft()[0])
        if ended:
            self._due.extend(self._open)
            self._open.clear()
            for told in self._due:  # text that a stop string cut away lies at the end
                told.offset = min(told.offset, self._num_shown)

    def take(self) -> list[Told]:
        due, self._due = self._due, []
        return due
