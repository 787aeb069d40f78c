"""Stop strings in streamed text: nothing of one is shown, nothing after it, nothing twice.

Text is held back only while it could be the beginning of a stop string. Which stop wins does not
depend on how the text is cut into pieces: the one that is complete first, of two the longer one.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Looks for the first of several stop strings in text that comes in pieces.

    With `include` the stop string is shown; still nothing that follows it.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.hit: str | None = None  # the stop string that was found

    def push(self, text: str) -> tuple[str, bool]:
        """Text that may be shown, and whether a stop string ends it there."""
        if not self._stops:
            return text, False
        text = self._held + text
        match = _first_match(text, self._stops)
        if match is not None:
            end, start = match
            self._held, self.hit = "", text[start:end]
            return text[: end if self._include else start], True
        keep = _possible_start(text, self._stops)
        self._held = text[keep:]
        return text[:keep], False

    def flush(self) -> str:
        """What was held back, now that no text follows."""
        held, self._held = self._held, ""
        return held


def _first_match(text: str, stops: Sequence[str]) -> tuple[int, int] | None:
    """(end, start) of the stop string that is complete first."""
    ends = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    return min(ends, default=None)


def _possible_start(text: str, stops: Sequence[str]) -> int:
    """Start of the longest end of `text` with which a stop string begins; its length if none."""
    return min(_possible_start_of(text, stop) for stop in stops)


def _possible_start_of(text: str, stop: str) -> int:
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(text[start:]):
            return start
        start = text.find(stop[0], start + 1)
    return len(text)
