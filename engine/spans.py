"""Where a step's time goes: named spans, and the parts of the forward pass by kind of module.

    schedule | batch | forward: linears, attention, norms, … | sample | read | commit

On a device `read`, which waits for the sampled tokens, is where the step itself shows.

Off, a span is one call that does nothing. On, torch's hooks and a stand-in for the operations note
every part; that costs a few microseconds per part, so totals come out a little long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast

from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from engine.packed_linear import Linear
from kernels.ops import LayerOps

MAX_SPANS = 1_000_000
_OFF: AbstractContextManager[None] = nullcontext()
_OPS = {
    "attention": "attention",
    "add_norm": "norm",
    "rotary": "rotary, cache write",
    "silu_mul": "activation",
    "gelu_mul": "activation",
}


class Spans(Protocol):
    """Makes a context whose time counts under `name`."""

    def __call__(self, name: str) -> AbstractContextManager[None]: ...


def no_spans(name: str) -> AbstractContextManager[None]:
    """Notes nothing."""
    return _OFF


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took from `start` for `seconds`, on the recorder's clock."""

    name: str
    start: float
    seconds: float


class Recorder:
    """Spans in the order of their ends, at most MAX_SPANS."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.spans: list[Span] = []

    def __call__(self, name: str) -> AbstractContextManager[None]:
        return self._open(name)

    @contextmanager
    def _open(self, name: str) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self._add(name, start)

    def _add(self, name: str, start: float) -> None:
        if len(self.spans) < MAX_SPANS:
            self.spans.append(Span(name, start, self._clock() - start))

    @contextmanager
    def modules(self) -> Iterator[None]:
        """Note the calls of all modules whose kind is known, in this process, meanwhile."""
        open_calls: list[float] = []

        def begin(module: nn.Module, _inputs: Any) -> None:
            if kind_of(module):
                open_calls.append(self._clock())

        def end(module: nn.Module, _inputs: Any, _output: Any) -> None:
            if kind := kind_of(module):
                self._add(kind, open_calls.pop())

        hooks = [register_module_forward_pre_hook(begin), register_module_forward_hook(end)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def watched(self, ops: LayerOps) -> LayerOps:
        """The same operations, noted."""
        watched: Any = _WatchedOps(ops, self)
        return cast(LayerOps, watched)


class _WatchedOps:
    """Passes everything on; what `_OPS` names is noted."""

    def __init__(self, ops: LayerOps, spans: Spans) -> None:
        self._ops = ops
        self._spans = spans

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._ops, name)
        if name not in _OPS:
            return found

        def noted(*args: Any, **kwargs: Any) -> Any:
            with self._spans(_OPS[name]):
                return found(*args, **kwargs)

        return noted


def kind_of(module: nn.Module) -> str | None:
    """The group that a module's time counts to; None for one that is made of others."""
    if isinstance(module, Linear | nn.Linear):
        return "linears"
    if isinstance(module, nn.Embedding):
        return "embedding"
    name = type(module).__name__
    if name.endswith(("Norm", "LayerNorm")):
        return "norm"
    if "Rotary" in name:
        return "angles"
    if name.endswith(("Activation", "SiLU", "GELU")):
        return "activation"
    return None
