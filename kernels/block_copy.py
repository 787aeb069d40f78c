"""Blocks of the pool to and from the canonical order in which units travel: the torch reference.

    pool     [num_blocks, num_layers, 2 (K, V), block_size, num_kv_heads, head_dim]
    units    [U, layers, 2, tokens, heads, head_dim], each contiguous, of any type

A unit's tokens are named by their slots, so that block sizes may differ on the two sides: slot s is
token s % block_size of block s // block_size, and none is -1. Layers and heads are a range each.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Part:
    """The layers and kv heads of a pool that units are cut from: half-open ranges."""

    layer_start: int
    layer_end: int
    head_start: int
    head_end: int

    @property
    def num_layers(self) -> int:
        return self.layer_end - self.layer_start

    @property
    def num_heads(self) -> int:
        return self.head_end - self.head_start


def gather_units(
    pool: Tensor,
    slots: Tensor,  # int64 [U, tokens]
    part: Part,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """The units in `dtype`, in `out` if that is given; zeros where a token has no slot."""
    units = _picked(pool, slots, part).permute(0, 2, 3, 1, 4, 5)
    there = (slots >= 0)[:, None, None, :, None, None]
    units = units.where(there, 0.0).to(dtype)
    return units if out is None else out.copy_(units)


def scatter_units(
    units: Tensor,
    pool: Tensor,
    slots: Tensor,  # int64 [U, tokens], none of them twice
    part: Part,
) -> None:
    """Put the units' tokens into their slots, in the pool's type."""
    there = slots >= 0
    block, offset = slots[there] // pool.shape[3], slots[there] % pool.shape[3]
    layers, heads = slice(part.layer_start, part.layer_end), slice(part.head_start, part.head_end)
    tokens = units.permute(0, 3, 1, 2, 4, 5)[there]  # [tokens, layers, 2, heads, dim]
    pool[block, layers, :, offset, heads] = tokens.to(pool.dtype)


def read_rows(rows: Tensor, addresses: Tensor) -> None:
    """Fill each row of int64 [U, words] from its address, int64 [U], in this process's memory.

    For memory that is no tensor's: another process's, which is mapped here.
    """
    for row, address in zip(rows, addresses.tolist(), strict=True):
        ctypes.memmove(row.data_ptr(), address, row.nbytes)


def _picked(pool: Tensor, slots: Tensor, part: Part) -> Tensor:
    """[U, tokens, layers, 2, heads, dim]"""
    slots = slots.clamp(min=0)
    layers, heads = slice(part.layer_start, part.layer_end), slice(part.head_start, part.head_end)
    return pool[slots // pool.shape[3], layers, :, slots % pool.shape[3], heads]
