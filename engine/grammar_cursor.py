"""How far a request is in its grammar; a file of its own, as the scheduler loads no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from llguidance import LLMatcher


@dataclass(slots=True, eq=False)
class GrammarCursor:
    """Where one request is in its grammar."""

    matcher: LLMatcher | None = None
    tokens: list[int] = field(default_factory=list)  # that the matcher has taken
