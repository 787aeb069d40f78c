"""The states that a transformers model gives its head: of the last layer, after the final norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def telling_states(model: Any, tell: Callable[[Tensor], None]) -> Iterator[None]:
    """Within it, `tell` gets the states [T, H] of each forward pass, where the model has them.

    The decoder within the model returns them, and costs nothing more; asking for all hidden states
    would keep those of every layer.
    """

    def hook(module: nn.Module, args: object, output: Any) -> None:
        states = getattr(output, "last_hidden_state", None)
        if states is not None:
            tell(states.squeeze(0))

    handle = model.get_decoder().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
