"""How many tokens a step may hold: fewer for a while after one that did not fit into memory."""

from __future__ import annotations

PATIENCE = 200  # steps that fit, before twice as many tokens are tried


class StepBudget:
    """`now` is the limit of the next step, never above `most`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._num_good = 0
        self.now = most

    @property
    def is_full(self) -> bool:
        return self.now == self._most

    def did_not_fit(self, num_tokens: int, least: int = 1) -> bool:
        """A step of so many tokens ran out of memory; False if there is nothing less to try.

        Args:
            least: tokens that must go together.
        """
        if num_tokens <= least:
            return False
        self.now = max(least, num_tokens // 2)
        self._num_good = 0
        return True

    def fitted(self) -> None:
        """A step was computed."""
        if self.is_full:
            return
        self._num_good += 1
        if self._num_good >= PATIENCE:
            self.now = min(self._most, 2 * self.now)
            self._num_good = 0
