"""The memory of the KV cache: one tensor of blocks, each contiguous, so that it is sent as it lies.

[num_blocks, num_layers, 2 (K, V), block_size, num_kv_heads, head_dim]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from mmap import mmap
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kernels.huge_pages import use_huge_pages
from wire.layout import KVLayout

Buffer: TypeAlias = mmap | memoryview | bytearray

SlotMapping = tuple[Tensor, Tensor]
"""Block [T] and offset within it [T] of each row's slot, int64."""


class KVStore:
    """K and V of `num_blocks` blocks; which block holds what is the block pool's business.

    Args:
        buffer: writable memory for all blocks, which other processes may see; else the store's own.
            On a device a tensor of bytes there.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        device: str | torch.device = "cpu",
        buffer: Buffer | Tensor | None = None,
    ) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self._block_bytes = layout.block_bytes
        shape = (
            num_blocks,
            layout.num_layers,
            2,
            layout.block_size,
            layout.num_kv_heads,
            layout.head_dim,
        )
        dtype = getattr(torch, layout.dtype)
        if isinstance(buffer, Tensor):
            self.blocks = buffer[: num_blocks * layout.block_bytes].view(dtype).view(shape)
        elif buffer is not None:
            self.blocks = torch.frombuffer(buffer, dtype=dtype, count=math.prod(shape)).view(shape)
        else:  # untouched pages cost nothing until they are written
            self.blocks = torch.empty(shape, dtype=dtype, device=device)
            use_huge_pages(self.blocks)

    @cached_property
    def _bytes(self) -> memoryview:
        raw: Any = self.blocks.view(torch.uint8).flatten().numpy()
        return memoryview(raw)

    def keys(self, layer: int) -> Tensor:
        """View [num_blocks, block_size, num_kv_heads, head_dim] of one layer's keys."""
        return self.blocks[:, layer, 0]

    def values(self, layer: int) -> Tensor:
        """View [num_blocks, block_size, num_kv_heads, head_dim] of one layer's values."""
        return self.blocks[:, layer, 1]

    def write(self, layer: int, slot_mapping: SlotMapping, k: Tensor, v: Tensor) -> None:
        """Put row i of k and v [T, num_kv_heads, head_dim] into the i-th slot."""
        self.keys(layer)[slot_mapping] = k
        self.values(layer)[slot_mapping] = v

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Give the second block of each pair the content of the first."""
        if pairs:
            sources, targets = zip(*pairs, strict=True)
            self.blocks[list(targets)] = self.blocks[list(sources)]

    def block_as_bytes(self, block_id: int) -> Tensor:
        """A block's own memory, uint8 [block bytes], on whatever device it is."""
        self._check(block_id)
        return self.blocks[block_id].view(torch.uint8).flatten()

    def _check(self, block_id: int) -> None:
        if not 0 <= block_id < self.num_blocks:
            raise IndexError(f"block {block_id} of {self.num_blocks}")

    def block_bytes(self, block_id: int) -> memoryview:
        """A block's own memory as bytes, writable, without a copy; only for a store on the CPU."""
        self._check(block_id)
        start = block_id * self._block_bytes
        return self._bytes[start : start + self._block_bytes]
