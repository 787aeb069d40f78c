"""A runner that remembers logits, so that tests can compare their bits."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from engine.plan import StepPlan
from engine.runner import ModelRunner


class Watch:
    """Keeps each request's logits by the number of tokens that they follow."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.logits: dict[tuple[str, int], Tensor] = {}

    def run(
        self,
        plan: StepPlan,
        on_layers: Callable[[int], None] | None = None,
        on_hidden: Callable[[Tensor], None] | None = None,
        sampled: Tensor | None = None,
    ) -> Tensor:
        logits = self._runner.run(plan, on_layers, on_hidden, sampled).clone()  # a graph's buffer
        row = iter(logits)
        for item in plan.scheduled:
            for number in range(item.num_samples):
                known = item.request.num_tokens + number
                self.logits[item.request.request_id, known] = next(row)
        return logits
