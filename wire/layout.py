"""The KV layout: how the bytes of a block are arranged, agreed on before any byte moves.

A block holds all layers of `block_size` tokens, contiguous:

    [num_layers, 2 (K, V), block_size, num_kv_heads, head_dim]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from wire.types import Count, Positive

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
DType = Annotated[str, Field(strict=True, pattern=f"^({'|'.join(DTYPE_BYTES)})$")]


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Arrangement of one rank's KV blocks."""

    num_layers: Positive
    num_kv_heads: Positive  # that this rank holds
    head_dim: Positive
    block_size: Positive  # tokens per block
    dtype: DType
    tp_rank: Count = 0
    tp_size: Positive = 1

    @property
    def head_range(self) -> tuple[int, int]:
        """The kv heads of the model that this rank holds: first and end."""
        first = self.tp_rank * self.num_kv_heads
        return first, first + self.num_kv_heads

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.block_size * self.bytes_per_token

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks needed to hold `num_tokens` slots."""
        return -(-num_tokens // self.block_size)

    def can_exchange(self, other: KVLayout) -> bool:
        """Whether blocks can be re-laid from one to the other: the same model, in parts that fit.

        Block size and type may differ, and so may the sharding if one is a multiple of the other.
        """
        many, few = sorted((self.tp_size, other.tp_size), reverse=True)
        return self._model == other._model and many % few == 0

    @property
    def _model(self) -> tuple[int, int, int]:
        """What all ranks of all nodes of a model have in common."""
        return self.num_layers, self.num_kv_heads * self.tp_size, self.head_dim

    def __str__(self) -> str:
        return (
            f"{self.num_layers} layers x {self.num_kv_heads} kv heads x {self.head_dim}, "
            f"{self.dtype}, blocks of {self.block_size}, tp {self.tp_rank}/{self.tp_size}"
        )
