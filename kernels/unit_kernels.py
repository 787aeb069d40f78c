"""What moves and digests many units at once on one device: Triton's kernels, or the references."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.block_copy import gather_units, read_rows, scatter_units
from kernels.xxh3 import accumulate


@dataclass(frozen=True, slots=True)
class UnitKernels:
    """See the functions of the same names in `block_copy` and `xxh3`."""

    gather_units: Callable[..., Tensor]  # pool, slots, part, dtype, out
    scatter_units: Callable[..., None]  # units, pool, slots, part
    read_rows: Callable[[Tensor, Tensor], None]  # rows, addresses
    accumulate: Callable[[Tensor, Tensor], Tensor]  # data, secret


REFERENCE = UnitKernels(gather_units, scatter_units, read_rows, accumulate)


def triton_kernels() -> UnitKernels:
    """Those of Triton, whose import takes a second."""
    from kernels import triton_blocks as blocks
    from kernels.triton_digest import accumulate_triton

    gather: Any = blocks.gather_units_triton
    return UnitKernels(
        gather, blocks.scatter_units_triton, blocks.read_rows_triton, accumulate_triton
    )


def kernels_for(device: torch.device) -> UnitKernels:
    """The ones that are fast there."""
    return triton_kernels() if device.type == "cuda" else REFERENCE
