"""Reads calls that a grammar has asked for, while they are written.

    [{"name": "f", "parameters": {…}}, {"name": "g", "parameters": {…}}]
     └─ head: held until whole ──┘└ arguments: told as they come

Here a call may be told before it is complete, for the grammar leaves no other end; one that a limit
has cut is a call with a part of its arguments, as OpenAI tells it.
"""

from __future__ import annotations

import json
import re

from router.tools.pieces import Arguments, Called, Piece, Said

MAX_HEAD_CHARS = 4096  # a name has 128
_STRING = r'"(?:[^"\\]|\\.)*"'
_CALL = rf'\{{\s*"name"\s*:\s*({_STRING})\s*,\s*"parameters"\s*:\s*(?=\{{)'
_FIRST = re.compile(rf"\s*\[\s*{_CALL}")
_NEXT = re.compile(rf"\s*\}}\s*,\s*{_CALL}")


class ArrayParser:
    """The whole text is an array of calls; from where it is none, it is text."""

    def __init__(self) -> None:
        self._held = ""
        self._head = _FIRST
        self._object: _Object | None = None  # the arguments that are being written
        self._is_text = False

    def push(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        while text:
            if self._is_text:
                pieces.append(Said(text))
                return pieces
            text = (
                self._push_head(text, pieces) if self._object is None else self._push(text, pieces)
            )
        return pieces

    def flush(self) -> list[Piece]:
        """What is held is text, but not what closes a call or the array."""
        held, self._held = self._held, ""
        closes = self._head is _NEXT and held.lstrip()[:1] in ("", "}")
        return [Said(held)] if held and not closes else []

    def _push_head(self, text: str, pieces: list[Piece]) -> str:
        """Hold `text` until a call begins; what follows is given back."""
        self._held += text
        found = self._head.match(self._held)
        name = None if found is None or found.end() >= MAX_HEAD_CHARS else _name(found[1])
        if found is not None and name is not None:
            rest, self._held = self._held[found.end() :], ""
            self._head, self._object = _NEXT, _Object()
            pieces.append(Called(name))
            return rest
        if found is not None or len(self._held) >= MAX_HEAD_CHARS or self._begins_otherwise():
            rest, self._held, self._is_text = self._held, "", True
            return rest
        return ""

    def _begins_otherwise(self) -> bool:
        return self._held.lstrip()[:1] not in ("", "[" if self._head is _FIRST else "}")

    def _push(self, text: str, pieces: list[Piece]) -> str:
        assert self._object is not None
        end = self._object.end_in(text)
        pieces.append(Arguments(text[:end]))
        if self._object.is_whole:
            self._object = None
        return text[end:]


class _Object:
    """Follows the text of a JSON object to its end."""

    _MARKS = re.compile(r'[{}"\\]')

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self.is_whole = False

    def end_in(self, text: str) -> int:
        """How much of `text` belongs to it."""
        place = 0
        while place < len(text):
            if self._escaped:
                self._escaped, place = False, place + 1
                continue
            found = self._MARKS.search(text, place)
            if found is None:
                return len(text)
            place = found.end()
            self._take(found[0])
            if self.is_whole:
                return place
        return len(text)

    def _take(self, mark: str) -> None:
        if mark == "\\":
            self._escaped = self._in_string
        elif mark == '"':
            self._in_string = not self._in_string
        elif not self._in_string:
            self._depth += 1 if mark == "{" else -1
            self.is_whole = self._depth == 0


def _name(quoted: str) -> str | None:
    try:
        name: str = json.loads(quoted)
        name.encode()
    except ValueError:  # UnicodeEncodeError too
        return None
    return name or None
