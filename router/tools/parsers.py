"""Finds calls in a stream of text.

A call is given out when it is complete, not before: then what turns out to be no call can still
become text, and nothing that a client was told is ever taken back.

    text ──▶ marker? ──▶ hold until its end ──▶ decode ──▶ call
                                                  └─ no ──▶ text
"""

from __future__ import annotations

from router.tools.formats import Calls, Decode
from router.tools.pieces import Arguments, Called, Parser, Piece, Said, Thought


class TaggedParser:
    """Calls stand between two markers, anywhere in the text.

    Args:
        end: None: a call ends where the next one begins, or with the text.
    """

    def __init__(self, begin: str, end: str | None, decode: Decode) -> None:
        self._begin, self._end, self._decode = begin, end, decode
        self._held = ""
        self._space = ""  # before a call; shown if it is none
        self._inside = False
        self._searched = 0
        self._has_called = False

    def push(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return pieces

    def flush(self) -> list[Piece]:
        pieces: list[Piece] = []
        if self._inside and self._end is None:
            self._close(len(self._held), 0, pieces)
        elif self._inside:
            pieces.append(Said(self._space + self._begin + self._held))
        elif self._held and (self._held.strip() or not self._has_called):
            pieces.append(Said(self._held))
        self._held = ""
        return pieces

    def _step(self, pieces: list[Piece]) -> bool:
        """Take one marker from what is held; False where there is none (yet)."""
        marker = (self._end or self._begin) if self._inside else self._begin
        start = self._held.find(marker, max(0, self._searched - len(marker)))
        if start < 0:
            self._searched = len(self._held)
            if not self._inside:
                self._show(_possible_start(self._held, marker), pieces)
            return False
        if self._inside:
            self._close(start, len(self._end or ""), pieces)
            return True
        self._show(start, pieces)
        self._space = self._held[: self._held.find(marker)]
        self._held = self._held[len(self._space) + len(marker) :]
        self._inside, self._searched = True, 0
        return True

    def _show(self, end: int, pieces: list[Piece]) -> None:
        """The text before `end`, without the space at its end: a call may follow."""
        text = self._held[:end].rstrip()
        if text:
            pieces.append(Said(text))
        self._held = self._held[len(text) :]
        self._searched = max(0, self._searched - len(text))

    def _close(self, end: int, marker: int, pieces: list[Piece]) -> None:
        """What is held up to `end` was meant as a call."""
        body, raw = self._held[:end], self._held[: end + marker]
        calls = self._decode(body)
        self._has_called |= bool(calls)
        pieces += _as_pieces(calls) if calls else [Said(self._space + self._begin + raw)]
        self._held, self._space = self._held[end + marker :], ""
        self._inside, self._searched = False, 0


class WholeParser:
    """The whole text is calls or none; which, its first character tells."""

    def __init__(self, starts: tuple[str, ...], ends: tuple[str, ...], decode: Decode) -> None:
        self._starts, self._ends, self._decode = starts, ends, decode
        self._held = ""
        self._is_text = False

    def push(self, text: str) -> list[Piece]:
        if self._is_text:
            return [Said(text)] if text else []
        self._held += text
        head = self._held[:64].lstrip()
        if not head or any(
            start.startswith(head) or head.startswith(start) for start in self._starts
        ):
            return []
        self._is_text = True
        text, self._held = self._held, ""
        return [Said(text)]

    def flush(self) -> list[Piece]:
        text, self._held = self._held, ""
        if not text:
            return []
        calls = self._decode(self._stripped(text))
        return _as_pieces(calls) if calls else [Said(text)]

    def _stripped(self, text: str) -> str:
        text = text.strip()
        for start in self._starts:
            if len(start) > 1:  # a marker, not the beginning of the call itself
                text = text.removeprefix(start)
        for end in self._ends:
            text = text.removesuffix(end)
        return text.strip()


class UnwrappedParser:
    """Leaves markers out that stand around all calls."""

    def __init__(self, markers: tuple[str, ...], inner: Parser) -> None:
        self._markers = markers
        self._inner = inner
        self._held = ""

    def push(self, text: str) -> list[Piece]:
        self._held += text
        for marker in self._markers:
            self._held = self._held.replace(marker, "")
        shown = min(_possible_start(self._held, marker) for marker in self._markers)
        text, self._held = self._held[:shown], self._held[shown:]
        return self._inner.push(text) if text else []

    def flush(self) -> list[Piece]:
        held, self._held = self._held, ""
        return [*(self._inner.push(held) if held else []), *self._inner.flush()]


class NamedParser:
    """The whole text is the arguments of one call, because the grammar says so."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._began = False

    def push(self, text: str) -> list[Piece]:
        if not text:
            return []
        head: list[Piece] = [] if self._began else [Called(self._name)]
        self._began = True
        return [*head, Arguments(text)]

    def flush(self) -> list[Piece]:
        return []


class ThinkParser:
    """Reasoning comes first, between `<think>` and `</think>`; then the answer.

    Args:
        began: the prompt ends with the first of these.
    """

    _BEGIN, _END = "<think>", "</think>"

    def __init__(self, began: bool, answer: Parser) -> None:
        self._answer = answer
        self._thinking = began
        self._undecided = not began
        self._skip_space = began
        self._held = ""

    def push(self, text: str) -> list[Piece]:
        if not self._undecided and not self._thinking:
            return self._to_answer(text)
        self._held += text
        if self._undecided:
            head = self._held.lstrip()
            if not head or (self._BEGIN.startswith(head) and head != self._BEGIN):
                return []
            self._undecided = False
            if not head.startswith(self._BEGIN):
                return self._to_answer(self._take(len(self._held)))
            self._held = head[len(self._BEGIN) :]
            self._thinking = self._skip_space = True
        return self._think()

    def flush(self) -> list[Piece]:
        held = self._take(len(self._held))
        if self._thinking:
            return [Thought(held)] if held.strip() else []
        return [*self._answer.push(held), *self._answer.flush()]

    def _think(self) -> list[Piece]:
        if self._skip_space:
            self._held = self._held.lstrip()
            self._skip_space = not self._held
        end = self._held.find(self._END)
        limit = _possible_start(self._held, self._END) if end < 0 else end
        shown = self._held[:limit].rstrip()
        thought: list[Piece] = [Thought(shown)] if shown else []
        if end < 0:
            self._take(len(shown))
            return thought
        self._take(end + len(self._END))
        rest = self._take(len(self._held))
        self._thinking, self._skip_space = False, True
        return [*thought, *self._to_answer(rest)]

    def _to_answer(self, text: str) -> list[Piece]:
        if self._skip_space:
            text = text.lstrip()
            self._skip_space = not text
        return self._answer.push(text) if text else []

    def _take(self, end: int) -> str:
        text, self._held = self._held[:end], self._held[end:]
        return text


def _as_pieces(calls: Calls) -> list[Piece]:
    return [piece for name, text in calls for piece in (Called(name), Arguments(text))]


def _possible_start(text: str, marker: str) -> int:
    """Where the longest end of `text` begins that could become `marker`."""
    for start in range(max(0, len(text) - len(marker) + 1), len(text)):
        if marker.startswith(text[start:]):
            return start
    return len(text)
