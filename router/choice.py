"""One choice of a request: its dispatch, its text and its trace, and who listens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from router.assignment import Assignment
from router.choice_text import ChoiceText
from router.dispatch import Dispatch
from router.echo import Echo
from router.errors import ApiError
from router.metrics import ModelMetrics
from router.tools.parsers import NamedParser
from router.tools.pieces import Called, Parser, Piece
from router.trace import ChoiceTrace
from router.work import Work
from wire.types import FinishReason


class Listener(Protocol):
    """Gets what a choice produces (a generation)."""

    def produced(self, choice: Choice, text: str) -> None:
        """New text, perhaps none; `choice.text.finish` is set with the last."""
        ...

    def failed(self, error: ApiError) -> None:
        """The choice ended without a result."""
        ...


@dataclass(slots=True, eq=False)
class Choice:
    """Everything that the router knows of one choice."""

    index: int
    work: Work
    dispatch: Dispatch
    text: ChoiceText
    trace: ChoiceTrace
    listener: Listener
    metrics: ModelMetrics
    assigned: Assignment
    followers: list[Choice] = field(default_factory=list)
    """Choices of the same prompt that start once its blocks are in both nodes' prefix caches."""
    arrival: int | None = None  # its place in the queue; a follower has that of its first choice
    beams: list[Choice] = field(default_factory=list)
    """Choices that this one's beam search answers too; they are never submitted."""
    echo: Echo | None = None  # the prompt comes back in front of the text
    priority: int = 0
    parser: Parser | None = None  # of what the text says; None: it is all text
    num_calls: int = 0
    num_cached_tokens: int = 0
    embedding: bytes | None = None  # little-endian fp32, where that was asked for

    def read(self, text: str) -> list[Piece]:
        """What new text says, and with the last all that was held back."""
        assert self.parser is not None
        pieces = self.parser.push(text)
        if self.text.finish is not None:
            pieces += self.parser.flush()
        self.num_calls += sum(isinstance(piece, Called) for piece in pieces)
        return pieces

    @property
    def finish_reason(self) -> str:
        """In OpenAI's words; a call that the client named itself ends with `stop`."""
        assert self.text.finish is not None
        if self.num_calls and self.text.finish is FinishReason.STOP:
            return "stop" if isinstance(self.parser, NamedParser) else "tool_calls"
        return self.text.finish.value
