"""The questions of an attempt.

For room, for the room of another attempt, for a prompt's KV; or for the whole answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from router.work import Work
from wire.request_messages import Generate, Grant, Prefill, Rebind, Reserve
from wire.types import AttemptId, NodeId


@dataclass(frozen=True, slots=True)
class Asking:
    """One attempt of a choice, as it stands when it asks.

    Args:
        output: the tokens that the client has.
        deadline_s: what is left of the choice's time.
    """

    id: AttemptId
    work: Work
    output: Sequence[int]
    deadline_s: float

    def reserve(self, prefill: NodeId) -> Reserve:
        """To a decode node: room for what `prefill` will send."""
        return Reserve(
            id=self.id,
            tokens=self._tokens,
            num_prompt_tokens=self.work.num_tokens,
            sampling=self.work.sampling,
            prefill=prefill,
            cache_salt=self.work.prompt.cache_salt,
            deadline_s=self.deadline_s,
        )

    def rebind(self, lease: int, prefill: NodeId) -> Rebind:
        """To the decode node that granted `lease`: its room, for another prefill node."""
        return Rebind(
            id=self.id,
            lease=lease,
            prefill=prefill,
            output_tokens=tuple(self.output),
            deadline_s=self.deadline_s,
        )

    def prefill(self, grant: Grant | None) -> Prefill:
        """To a prefill node: compute; without a grant that ends with one token or embedding."""
        return Prefill(
            id=self.id,
            tokens=self._tokens,
            num_prompt_tokens=self.work.num_tokens,
            sampling=self.work.sampling,
            grant=grant,
            cache_salt=self.work.prompt.cache_salt,
            deadline_s=self.deadline_s,
            pooling=self.work.pooling,
        )

    def generate(self) -> Generate:
        """To a node that decodes: all of it, without a handoff."""
        return Generate(
            id=self.id,
            tokens=self._tokens,
            num_prompt_tokens=self.work.num_tokens,
            sampling=self.work.sampling,
            cache_salt=self.work.prompt.cache_salt,
        )

    @property
    def _tokens(self) -> tuple[int, ...]:
        return self.work.prompt.tokens + tuple(self.output)
