"""Linears over weights that are packed once, by the compiled library (`kernels/cpu_linear.inc`).

packed[panel][input][PANEL outputs], in fp32, 16 or 8 bits. A row's result is one chain of additions
per output, so it has the same bits among any rows. At 16 rows MKL takes 1.6 times as long.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.huge_pages import Arena
from kernels.weights import STORAGES, StoredWeight

PANEL = 64  # as in cpu_ops.cpp


class LinearArgs(ctypes.Structure):
    """Mirrors cpu_ops.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weights", "scales", "bias", "y")),
        *((name, ctypes.c_int64) for name in ("num_rows", "x_stride", "in_", "out", "storage")),
    )


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [out, in] and its bias as the library reads them."""

    panels: Tensor  # [panels, in, PANEL]
    scales: Tensor | None  # fp32 [panels * PANEL]
    bias: Tensor | None
    out_features: int
    in_features: int
    storage: str

    def args(self, x: Tensor, y: Tensor) -> LinearArgs:
        """A call that fills y [rows, out] from x [rows, in], whose rows may be apart."""
        return LinearArgs(
            x=x.data_ptr(),
            weights=self.panels.data_ptr(),
            scales=None if self.scales is None else self.scales.data_ptr(),
            bias=None if self.bias is None else self.bias.data_ptr(),
            y=y.data_ptr(),
            num_rows=x.shape[0],
            x_stride=x.stride(0),
            in_=self.in_features,
            out=self.out_features,
            storage=STORAGES.index(self.storage),
        )


def pack(weight: StoredWeight, bias: Tensor | None, arena: Arena) -> PackedWeight:
    """Lay a weight out in panels, the last one filled up with zeros."""
    out_features, in_features = weight.values.shape
    num_panels = -(-out_features // PANEL)
    panels = arena.empty((num_panels, in_features, PANEL), weight.values.dtype)
    whole = out_features // PANEL
    rows = weight.values[: whole * PANEL].view(whole, PANEL, in_features)
    panels[:whole] = rows.transpose(1, 2)
    if whole < num_panels:
        panels[whole].zero_()
        panels[whole, :, : out_features % PANEL] = weight.values[whole * PANEL :].T
    return PackedWeight(
        panels=panels,
        scales=_filled_up(weight.scales),
        bias=_filled_up(bias),
        out_features=out_features,
        in_features=in_features,
        storage=weight.storage,
    )


def _filled_up(numbers: Tensor | None) -> Tensor | None:
    if numbers is None:
        return None
    filled = torch.zeros(-(-len(numbers) // PANEL) * PANEL)
    filled[: len(numbers)] = numbers
    return filled
