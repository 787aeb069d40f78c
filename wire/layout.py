"""The KV layout: how the bytes of a block are arranged, agreed on before any byte moves.

A block holds all layers of `block_size` tokens, contiguous:

    [num_layers, 2 (K, V), block_size, num_kv_heads, head_dim]
"""

from __future__ import annotations

from dataclasses import dataclass

from wire.types import Count, Name

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Arrangement of one rank's KV blocks."""

    num_layers: Count
    num_kv_heads: Count  # that this rank holds
    head_dim: Count
    block_size: Count  # tokens per block
    dtype: Name
    tp_rank: Count = 0
    tp_size: Count = 1

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.block_size * self.bytes_per_token

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks needed to hold `num_tokens` slots."""
        return -(-num_tokens // self.block_size)

    def __str__(self) -> str:
        return (
            f"{self.num_layers} layers x {self.num_kv_heads} kv heads x {self.head_dim}, "
            f"{self.dtype}, blocks of {self.block_size}, tp {self.tp_rank}/{self.tp_size}"
        )
