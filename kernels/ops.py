"""What a step computes besides the linears, as one set of operations.

`TorchOps` is the specification, in plain torch, for any device and dtype; `kernels.cpu_ops` does
the same in compiled code. A row's result depends on no other row, except by attention on the keys
that it sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.device_rows import DeviceRows
from kernels.paged_attention import RequestRows
from kernels.paged_attention_sdpa import Masks, paged_attention_sdpa
from kernels.sampling import filter_floor, gumbel_argmax, penalize


@dataclass(frozen=True)
class PackedRows:
    """A step's requests for all layers: one by one, and as flat arrays made when asked for."""

    requests: Sequence[RequestRows]
    masks: Masks = field(default_factory=dict)  # of torch's own attention, shared by the layers
    laid_out: DeviceRows | None = None  # the same as a graph reads it, where one is replayed

    @cached_property
    def on_device(self) -> DeviceRows:
        """As kernels of a GPU read them."""
        return self.laid_out or DeviceRows.of(self.requests)

    @cached_property
    def first_row(self) -> Tensor:
        """int64 [requests], as the next two."""
        return torch.tensor([r.first_row for r in self.requests])

    @cached_property
    def num_rows(self) -> Tensor:
        return torch.tensor([r.num_rows for r in self.requests])

    @cached_property
    def context_len(self) -> Tensor:
        return torch.tensor([r.context_len for r in self.requests])

    @cached_property
    def tables(self) -> Tensor:
        """All block tables, one after the other."""
        return torch.cat([r.block_table for r in self.requests])

    @cached_property
    def table_start(self) -> Tensor:
        """Where each request's table starts in `tables`."""
        lengths = torch.tensor([0, *(len(r.block_table) for r in self.requests[:-1])])
        return lengths.cumsum(0)


@dataclass(frozen=True, slots=True)
class LayerSlots:
    """One layer's keys and values [num_blocks, block_size, Hkv, D], and where new ones go."""

    keys: Tensor
    values: Tensor
    blocks: Tensor  # int64 [T]
    offsets: Tensor  # int64 [T]


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norms of every query head and key head before they are rotated (Qwen 3)."""

    query: Tensor  # [D]
    key: Tensor  # [D]
    eps: float


class LayerOps(Protocol):
    """One implementation per kind of device."""

    @property
    def name(self) -> str:
        """Part of the numerics fingerprint: equal names on equal machines give equal bits."""
        ...

    def is_batch_invariant(self, head_dim: int, group: int) -> bool:
        """Whether attention with such heads gives a row the same bits among any other rows.

        Args:
            group: query heads per kv head.
        """
        ...

    def add_norm(
        self, residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float
    ) -> Tensor:
        """`residual` [T, dim] += branch, in place; returns its RMS norm times `weight`.

        Zhang and Sennrich 2019, computed in fp32.
        """
        ...

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2 dim] → silu of the first half times the second half, [T, dim] (Shazeer 2020)."""
        ...

    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        """The same with GELU, by its approximation with tanh (Hendrycks and Gimpel 2016)."""
        ...

    def rotary(
        self,
        qkv: Tensor,  # [T, (Hq + 2 Hkv) * D], contiguous; its queries are rotated in place
        cos: Tensor,  # [T, R]; the first R dims of each head rotate by halves
        sin: Tensor,
        slots: LayerSlots,
        *,
        num_query_heads: int,
        norms: HeadNorms | None = None,
    ) -> None:
        """Rotate the queries, and the keys on their way into their slots; copy the values there.

        Su et al. 2021, section 3.4.2, with the pairing of dims that GPT-NeoX uses.
        """
        ...

    def attention(
        self,
        query: Tensor,  # [T, Hq, D]; rows may be apart, heads and dims may not
        keys: Tensor,  # [num_blocks, block_size, Hkv, D]
        values: Tensor,
        rows: PackedRows,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,  # [Hq]
    ) -> Tensor:
        """Same contract as `paged_attention_reference`."""
        ...

    def filter_floor(self, x: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
        """Same contract as `kernels.sampling.filter_floor`."""
        ...

    def gumbel_argmax(self, x: Tensor, floor: Tensor, keys: Tensor) -> Tensor:
        """Same contract as `kernels.sampling.gumbel_argmax`."""
        ...

    def penalize(
        self,
        x: Tensor,
        rows: Tensor,
        ids: Tensor,
        counts: Tensor,
        repetition: Tensor,
        frequency: Tensor,
        presence: Tensor,
    ) -> None:
        """Same contract as `kernels.sampling.penalize`."""
        ...


class TorchOps:
    """See LayerOps."""

    name = "torch"

    def is_batch_invariant(self, head_dim: int, group: int) -> bool:
        """See LayerOps; torch's attention takes another order for other numbers of rows."""
        return False

    def add_norm(
        self, residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float
    ) -> Tensor:
        """See LayerOps."""
        if branch is not None:
            residual += branch
        return _rms_norm(residual, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See LayerOps."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        """See LayerOps."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.gelu(gate, approximate="tanh") * up

    def rotary(
        self,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: LayerSlots,
        *,
        num_query_heads: int,
        norms: HeadNorms | None = None,
    ) -> None:
        """See LayerOps."""
        num_kv_heads, dim = slots.keys.shape[2:]
        heads = qkv.view(len(qkv), num_query_heads + 2 * num_kv_heads, dim)
        first_value = num_query_heads + num_kv_heads
        query, key = heads[:, :num_query_heads], heads[:, num_query_heads:first_value]
        if norms is not None:
            query.copy_(_rms_norm(query, norms.query, norms.eps))
            key = _rms_norm(key, norms.key, norms.eps)
        query.copy_(_rotated(query, cos, sin))
        slots.keys[slots.blocks, slots.offsets] = _rotated(key, cos, sin)
        slots.values[slots.blocks, slots.offsets] = heads[:, first_value:]

    def attention(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        rows: PackedRows,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See LayerOps."""
        return paged_attention_sdpa(
            query,
            keys,
            values,
            rows.requests,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            masks=rows.masks,
        )

    def filter_floor(self, x: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
        """See LayerOps."""
        return filter_floor(x, top_k, top_p, min_p)

    def gumbel_argmax(self, x: Tensor, floor: Tensor, keys: Tensor) -> Tensor:
        """See LayerOps."""
        return gumbel_argmax(x, floor, keys)

    def penalize(
        self,
        x: Tensor,
        rows: Tensor,
        ids: Tensor,
        counts: Tensor,
        repetition: Tensor,
        frequency: Tensor,
        presence: Tensor,
    ) -> None:
        """See LayerOps."""
        penalize(x, rows, ids, counts, repetition, frequency, presence)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normal.to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D] with its first dims turned by the angles of cos and sin [T, R]."""
    size = cos.shape[-1]
    turning, rest = x[..., :size], x[..., size:]
    low, high = turning.chunk(2, dim=-1)
    turned = turning * cos.unsqueeze(1) + torch.cat([-high, low], dim=-1) * sin.unsqueeze(1)
    return torch.cat([turned, rest], dim=-1)
