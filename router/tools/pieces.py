"""What an answer consists of, once its text has been understood."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Said:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """Text of the model's reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class Called:
    """The beginning of a call; what follows up to the next piece of another kind is its."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A part of the arguments of the call that began last, as JSON text."""

    text: str


Piece = Said | Thought | Called | Arguments


class Parser(Protocol):
    """Understands one answer; what it gives does not depend on how the text is cut into pushes.

    It never raises: what cannot be understood is text.
    """

    def push(self, text: str) -> list[Piece]:
        """What is certain now."""
        ...

    def flush(self) -> list[Piece]:
        """What was held back, now that no text follows."""
        ...


class PlainParser:
    """All is text."""

    def push(self, text: str) -> list[Piece]:
        return [Said(text)] if text else []

    def flush(self) -> list[Piece]:
        return []


def merged(pieces: Iterable[Piece]) -> list[Piece]:
    """`pieces` with neighbours of one kind as one; calls stay apart."""
    result: list[Piece] = []
    for piece in pieces:
        last = result[-1] if result else None
        if not isinstance(piece, Called) and type(last) is type(piece):
            assert not isinstance(last, Called | None)
            result[-1] = replace(last, text=last.text + piece.text)
        else:
            result.append(piece)
    return result
