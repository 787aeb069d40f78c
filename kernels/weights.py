"""A linear's weight as it is stored: in fp32, or narrower and widened where it is multiplied.

Weight-only: sums are in fp32 whatever the storage. 16 bits halve what a step reads and lose nothing
of a checkpoint that has them; int8 takes one scale per output, symmetric about zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STORAGES = ("float32", "bfloat16", "float16", "int8")  # numbered as in cpu_ops.cpp
INT8_MAX = 127


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """What is left of a weight [out, in]."""

    values: Tensor  # [out, in], of the storage's dtype
    scales: Tensor | None = None  # fp32 [out], of int8

    @property
    def storage(self) -> str:
        return str(self.values.dtype).removeprefix("torch.")

    def widened(self) -> Tensor:
        """fp32 [out, in]: what is multiplied."""
        wide = self.values.float()
        return wide if self.scales is None else wide * self.scales.unsqueeze(1)


def store(weight: Tensor, storage: str) -> StoredWeight:
    """Round a finite fp32 weight [out, in]. Raises OverflowError where float16 cannot hold it."""
    if storage == "int8":
        return _int8(weight)
    if storage == "float16" and float(weight.abs().max()) > torch.finfo(torch.float16).max:
        raise OverflowError("a weight is beyond float16")
    return StoredWeight(weight.to(getattr(torch, storage)))


def _int8(weight: Tensor) -> StoredWeight:
    largest = weight.abs().amax(dim=1)
    scales = torch.where(largest > 0, largest, 1.0) / INT8_MAX
    return StoredWeight((weight / scales.unsqueeze(1)).round().to(torch.int8), scales)
