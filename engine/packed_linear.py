"""Linears whose weight is packed once, in fp32 or narrower, for CPUs.

`F.linear` packs the weight at every call: two to three times slower at 4 to 64 rows. One packed
copy also serves every number of rows with the same bits per row, which `F.linear` does not. The
compiled library packs best; MKL does without it, and where neither is, `F.linear` has to do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.cpu_linear import pack
from kernels.cpu_ops import CpuOps
from kernels.huge_pages import Arena
from kernels.ops import LayerOps
from kernels.weights import StoredWeight, store

PACKED_FOR = 256  # rows that MKL's layout is made for; it serves any number

Multiply = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""x, weight and bias, as `F.linear` takes them."""


class CompiledLinear(nn.Module):
    """y = x W^T + b by the compiled library, with a weight of any storage."""

    def __init__(
        self, ops: CpuOps, weight: StoredWeight, bias: Tensor | None, arena: Arena
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.values.shape
        self._ops = ops
        self._weight = pack(weight, bias, arena)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] → [..., out_features]."""
        rows = x.reshape(-1, self.in_features)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        return self._ops.linear(rows, self._weight).view(*x.shape[:-1], self.out_features)


class MklLinear(nn.Module):
    """The same with an fp32 weight in MKL's own order."""

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


class NarrowLinear(nn.Module):
    """The same with a narrow weight, widened at every call: for CPUs without the library."""

    def __init__(self, weight: StoredWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.values.shape
        self._weight, self._bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] → [..., out_features]."""
        return F.linear(x, self._weight.widened(), self._bias)


class PlainLinear(nn.Module):
    """The same by `F.linear`, for every other device and dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._weight, self._bias = weight, bias
        self._multiply: Multiply = F.linear
        self.is_invariant = False  # a row has the same bits among any other rows

    def make_invariant(self, multiply: Multiply) -> None:
        """Multiply so from now on."""
        self._multiply, self.is_invariant = multiply, True

    @property
    def weight(self) -> Tensor:
        return self._weight

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] → [..., out_features]."""
        return self._multiply(x, self._weight, self._bias)


Linear = CompiledLinear | MklLinear | NarrowLinear | PlainLinear


class Linears:
    """Makes a model's linears, the fastest that there are here.

    Args:
        storage: what weights are rounded to, see `kernels.weights`; of fp32 weights on a CPU.
    """

    def __init__(self, ops: LayerOps, storage: str = "float32") -> None:
        self._ops = ops
        self._arena = Arena()
        self.storage = storage

    @property
    def rounds(self) -> bool:
        """Whether weights lose digits."""
        return self.storage != "float32"

    def exact(self) -> Linears:
        """The same without rounding."""
        return Linears(self._ops)

    def can_pack(self, weight: Tensor) -> bool:
        """Whether anything is better here than `F.linear`."""
        is_plain = weight.device.type == "cpu" and weight.dtype is torch.float32
        return is_plain and (isinstance(self._ops, CpuOps) or self.rounds or has_mkl())

    def linear(self, weight: Tensor, bias: Tensor | None) -> Linear:
        """y = x W^T + b for a weight [out, in]."""
        if not self.can_pack(weight):
            return PlainLinear(weight, bias)
        if isinstance(self._ops, CpuOps):
            return CompiledLinear(self._ops, store(weight, self.storage), bias, self._arena)
        if self.rounds:
            return NarrowLinear(store(weight, self.storage), bias)
        return MklLinear(weight, bias)

    def merged(self, linears: list[nn.Linear]) -> Linear:
        """One linear whose output is that of all `linears`, one after the other."""
        biases = [x.bias for x in linears]
        bias = None
        if any(b is not None for b in biases):
            zeros = [x.weight.new_zeros(x.out_features) for x in linears]
            bias = torch.cat([z if b is None else b for b, z in zip(biases, zeros, strict=True)])
        return self.linear(torch.cat([x.weight for x in linears]).detach(), bias)


def has_mkl() -> bool:
    """Whether this torch can pack weights with MKL."""
    return bool(torch.backends.mkl.is_available())  # type: ignore[no-untyped-call]
