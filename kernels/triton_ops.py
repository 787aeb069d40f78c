"""LayerOps for GPUs: Triton kernels, and torch where no kernel takes a case.

Importing this imports triton; whoever has no GPU need not. Nothing here waits for the device or
asks it anything, so that every call can be captured in a graph, unless torch has to stand in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from kernels import triton_attention, triton_layers, triton_sampling
from kernels.ops import HeadNorms, LayerSlots, PackedRows, TorchOps
from kernels.triton_common import FLOATS, INTERPRETED, on_this_device

log = logging.getLogger(__name__)


class TritonOps:
    """See LayerOps.

    Args:
        invariant: a row gets the same bits in every company; attention then has one shape of tile
            for decode and prefill, which is slower.
        warn: told once of each kind of case that goes to torch.
    """

    def __init__(
        self, *, invariant: bool = False, warn: Callable[[str], None] = log.warning
    ) -> None:
        self._invariant = invariant
        self._warn = warn
        self._torch = TorchOps()
        self._told: set[str] = set()

    @property
    def name(self) -> str:
        """See LayerOps; also Triton's version, whose compiler decides the bits."""
        parts = ["triton", triton.__version__]
        parts += ["interpreted"] * INTERPRETED + ["invariant"] * self._invariant
        return "-".join(parts)

    def is_batch_invariant(self, head_dim: int, group: int) -> bool:
        """See LayerOps."""
        return self._invariant and triton_attention.has_kernel(head_dim, group)

    def add_norm(
        self, residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float
    ) -> Tensor:
        """See LayerOps."""
        fits = residual.shape[-1] <= triton_layers.MAX_WIDTH
        if fits and _plain(residual, weight, *([] if branch is None else [branch])):
            return triton_layers.add_norm_triton(residual, branch, weight, eps)
        self._tell(f"norm of {residual.shape[-1]} in {residual.dtype}")
        return self._torch.add_norm(residual, branch, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See LayerOps."""
        if _plain(gate_up):
            return triton_layers.silu_mul_triton(gate_up)
        self._tell(f"activation in {gate_up.dtype}")
        return self._torch.silu_mul(gate_up)

    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        """See LayerOps."""
        if _plain(gate_up):
            return triton_layers.gelu_mul_triton(gate_up)
        self._tell(f"activation in {gate_up.dtype}")
        return self._torch.gelu_mul(gate_up)

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
        if _plain(qkv, cos, sin, slots.keys, slots.values):
            triton_layers.rotary_triton(
                qkv, cos, sin, slots, num_query_heads=num_query_heads, norms=norms
            )
            return
        self._tell(f"rotary of {qkv.dtype} into {slots.keys.dtype}")
        self._torch.rotary(qkv, cos, sin, slots, num_query_heads=num_query_heads, norms=norms)

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
        if triton_attention.supports(query, keys, values):
            return triton_attention.paged_attention_triton(
                query,
                keys,
                values,
                rows.on_device,
                scale=scale,
                window=window,
                softcap=softcap,
                sinks=sinks,
                invariant=self._invariant,
            )
        self._tell(f"attention with heads {tuple(query.shape[1:])}, {query.dtype}, {keys.dtype}")
        return self._torch.attention(
            query, keys, values, rows, scale=scale, window=window, softcap=softcap, sinks=sinks
        )

    def filter_floor(self, x: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
        """See LayerOps."""
        if x.dtype is torch.float32 and _plain(x):
            return triton_sampling.filter_floor_triton(x, top_k, top_p, min_p)
        self._tell(f"filters on logits in {x.dtype}")
        return self._torch.filter_floor(x, top_k, top_p, min_p)

    def gumbel_argmax(self, x: Tensor, floor: Tensor, keys: Tensor) -> Tensor:
        """See LayerOps."""
        if x.dtype is torch.float32 and _plain(x):
            return triton_sampling.gumbel_argmax_triton(x, floor, keys)
        self._tell(f"draws from logits in {x.dtype}")
        return self._torch.gumbel_argmax(x, floor, keys)

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
        if x.dtype is torch.float32 and _plain(x):
            triton_sampling.penalize_triton(x, rows, ids, counts, repetition, frequency, presence)
            return
        self._tell(f"penalties on logits in {x.dtype}")
        self._torch.penalize(x, rows, ids, counts, repetition, frequency, presence)

    def _tell(self, case: str) -> None:
        if case not in self._told:
            self._told.add(case)
            self._warn(f"no Triton kernel for {case}: torch does it, slower and in no graph")


def _plain(*tensors: Tensor) -> bool:
    """Floating point on the device, with numbers of a row side by side."""
    fine = all(x.dtype in FLOATS and x.stride(-1) == 1 for x in tensors)
    return fine and on_this_device(*tensors)
