"""Linears whose weight is packed once, for fp32 on CPUs with MKL.

`F.linear` packs the weight at every call: two to three times slower at 4 to 64 rows. One packed
copy also serves every number of rows with the same bits per row, which `F.linear` does not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKED_FOR = 256  # rows that the layout is made for; it serves any number


class PackedLinear(nn.Module):
    """y = x W^T + b with the weight in MKL's own order; the plain weight is not kept."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._packed = torch.ops.mkl._mkl_reorder_linear_weight(weight.contiguous(), PACKED_FOR)
        self._shape_of = torch.empty(1).expand(weight.shape)  # no memory behind it
        self._bias = None if bias is None else bias.clone()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] → [..., out_features]."""
        num_rows = x.numel() // self.in_features
        if num_rows == 0:  # MKL takes that for an error
            return x.new_empty((*x.shape[:-1], self.out_features))
        y: Tensor = torch.ops.mkl._mkl_linear(x, self._packed, self._shape_of, self._bias, num_rows)
        return y


class PlainLinear(nn.Module):
    """The same by `F.linear`, for every other device and dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._weight, self._bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] → [..., out_features]."""
        return F.linear(x, self._weight, self._bias)


def can_pack(weight: Tensor) -> bool:
    """Whether MKL takes the weight."""
    is_plain = weight.device.type == "cpu" and weight.dtype is torch.float32
    return is_plain and bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]


def linear(weight: Tensor, bias: Tensor | None) -> PackedLinear | PlainLinear:
    """The fastest linear for a weight [out, in]."""
    return PackedLinear(weight, bias) if can_pack(weight) else PlainLinear(weight, bias)


def merged(linears: list[nn.Linear]) -> PackedLinear | PlainLinear:
    """One linear whose output is that of all `linears`, one after the other."""
    biases = [x.bias for x in linears]
    bias = None
    if any(b is not None for b in biases):
        zeros = [x.weight.new_zeros(x.out_features) for x in linears]
        bias = torch.cat([z if b is None else b for b, z in zip(biases, zeros, strict=True)])
    return linear(torch.cat([x.weight for x in linears]), bias)
