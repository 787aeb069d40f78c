"""What every Triton kernel here goes by."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Kernels run as Python on the CPU: TRITON_INTERPRET was set when triton was first imported."""

_F = TypeVar("_F", bound=Callable[..., Any])

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def on_this_device(*tensors: Tensor) -> bool:
    """Whether Triton can read them all: on a GPU, or anywhere in the interpreter."""
    return INTERPRETED or all(tensor.is_cuda for tensor in tensors)


def dots_as_float32(dtype: torch.dtype) -> bool:
    """Triton's interpreter multiplies the bit patterns of bf16 as integers."""
    return INTERPRETED and dtype is torch.bfloat16


@cache
def num_processors(device: torch.device) -> int:
    """Streaming multiprocessors; the interpreter plays a small GPU."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def power_of_2(number: int) -> int:
    """The first power of 2 from `number` on."""
    return 1 << max(0, number - 1).bit_length()


def on_its_device(function: _F) -> _F:
    """Run it with its first tensor's device as the current one, on which Triton launches."""

    @wraps(function)
    def guarded(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
            return function(first, *args, **kwargs)

    return cast(_F, guarded)
