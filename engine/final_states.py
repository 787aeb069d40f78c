"""The states of a model's forward pass, for who pools them and for who drafts from them.

Those that the head is given (of the last layer, after the final norm), and those that layers are
given. Nothing of this is computed, or kept, in a step that nobody asks it of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine.fused_decoder import FusedDecoder
from engine.plan import StepPlan


class StateReader(Protocol):
    """Is shown the states of all rows of the steps that it reads."""

    def reads(self, plan: StepPlan) -> bool:
        """Whether it wants those of this step; it is asked before."""
        ...

    @property
    def layers(self) -> tuple[int, ...]:
        """Wants what these layers are given, side by side; none: what the head is given."""
        ...

    def saw(self, plan: StepPlan, states: Tensor) -> None:
        """The rows' states [T, S], in the order of the plan; its tokens are not sampled yet."""
        ...


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """What a model gave, and its states on the way."""

    output: Any  # of the model; it has the `logits`
    final: Tensor | None  # [rows, H]
    inputs: Tensor | None  # [T, layers * H]


def call_with_states(
    model: Any, call: Callable[..., Any], rows: Tensor | None, layers: tuple[int, ...]
) -> ForwardPass:
    """A forward pass, with the final states of `rows`, and of all rows what `layers` are given."""
    if isinstance(model, FusedDecoder):
        output = call(hidden_to_keep=rows, inputs_to_keep=layers)
        return ForwardPass(output, output.hidden, output.inputs)
    final: list[Tensor] = []
    inputs: list[Tensor] = []
    with ExitStack() as hooks:
        if rows is not None:
            hooks.enter_context(telling_states(model, final.append))
        if layers:
            hooks.enter_context(_telling_inputs(model, layers, inputs.append))
        output = call()
    return ForwardPass(
        output,
        final[-1][rows] if final else None,
        torch.cat(inputs, -1) if inputs else None,
    )


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


def layers_of(model: Any) -> Any:
    """The layers whose input can be read; None where the model has none that are known."""
    if isinstance(model, FusedDecoder):
        return model.layers
    return getattr(model.get_decoder(), "layers", None)


@contextmanager
def _telling_inputs(
    model: Any, layers: tuple[int, ...], tell: Callable[[Tensor], None]
) -> Iterator[None]:
    """Within it, `tell` gets what each of `layers` is given, [T, H], in order."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        tell(states.squeeze(0))

    modules = layers_of(model)
    handles = [modules[i].register_forward_pre_hook(hook, with_kwargs=True) for i in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
