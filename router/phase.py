"""Where a choice stands on its way over the fleet; the picture is in `dispatch`."""

from __future__ import annotations

from enum import Enum, auto


class Phase(Enum):
    """Where a choice stands."""

    WAITING = auto()
    RESERVING = auto()
    PREFILLING = auto()
    REBINDING = auto()
    DECODING = auto()
    OFFERING = auto()
    GENERATING = auto()
    ENDED = auto()


ASKING = (Phase.RESERVING, Phase.REBINDING, Phase.OFFERING)
WORKING = (Phase.PREFILLING, Phase.DECODING, Phase.OFFERING, Phase.GENERATING)
"""Tokens may come: who is offered a request answers with some."""
ON_NODES = (*ASKING, Phase.PREFILLING, Phase.DECODING, Phase.GENERATING)
