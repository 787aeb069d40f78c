"""What every way to guess a request's next tokens offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from engine.plan import StepPlan
from engine.request import Request


class Ask(NamedTuple):
    """Wants up to `num_tokens` tokens that may follow `request`'s last one; 0: none now."""

    request: Request
    num_tokens: int


class Guide(Protocol):
    """Knows which tokens a request's grammar allows."""

    def guided(self, request: Request, draft: tuple[int, ...], num_tokens: int) -> tuple[int, ...]:
        """`draft` up to the first token that is forbidden; or what must follow, if that is more."""
        ...


class Drafter(Protocol):
    """Proposes tokens for a batch. A wrong proposal costs time, never a wrong token."""

    @property
    def method(self) -> str:
        """As `--speculative-config` names it."""
        ...

    @property
    def cost_per_token(self) -> bool:
        """Whether a longer draft takes longer: it is made token by token."""
        ...

    def propose(self, asks: Sequence[Ask]) -> list[Sequence[int]]:
        """One draft per ask, in order; it may be shorter than was asked, or empty.

        `asks` names every decoding request; what is kept for others may be forgotten.
        """
        ...

    def accepted(self, request: Request, num_tokens: int) -> None:
        """Of the last draft for `request` so many tokens were right, and are among its tokens."""
        ...


@runtime_checkable
class ReadingDrafter(Drafter, Protocol):
    """One that goes on from the target's own states; see engine.final_states.StateReader."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Of which it reads the input; none: what the target's head is given."""
        ...

    def reads(self, plan: StepPlan) -> bool:
        """Whether there is anything in a step that is to be drafted for, now or later."""
        ...

    def saw(self, plan: StepPlan, states: Tensor) -> None:
        """What the step that runs has computed."""
        ...
