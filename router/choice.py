"""One choice of a request: its dispatch, its text and its trace, and who listens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from router.choice_text import ChoiceText
from router.dispatch import Dispatch
from router.echo import Echo
from router.errors import ApiError
from router.metrics import ModelMetrics
from router.trace import ChoiceTrace
from router.work import Work
from wire.types import NodeId


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
    followers: list[Choice] = field(default_factory=list)
    """Choices of the same prompt that start once its blocks are in both nodes' prefix caches."""
    echo: Echo | None = None  # the prompt comes back in front of the text
    priority: int = 0
    num_cached_tokens: int = 0
    embedding: bytes | None = None  # little-endian fp32, where that was asked for
    assigned_prefill: NodeId | None = None
    assigned_decode: NodeId | None = None
