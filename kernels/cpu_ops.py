"""The compiled CPU kernels: loading the library, and one method per kernel.

`kernels/cpu_ops.cpp` is compiled when Baton is installed, if there is a C++ compiler. Without it
`load_cpu_ops` gives None and the torch code beside each kernel does the same work, slower. All
tensors are fp32 and contiguous; little is checked here, because a call must cost microseconds.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.cpu_linear import LinearArgs, PackedWeight
from kernels.ops import HeadNorms, LayerSlots, PackedRows, TorchOps

log = logging.getLogger(__name__)

MAX_HEAD_DIM = 256
MAX_GROUP = 96  # query heads per kv head
LIBRARY_VERSION = 2  # of kernels/cpu_ops.cpp
ISA_NAMES = ("plain", "avx2", "avx512")

_Pointer = ctypes.c_void_p
_Size = ctypes.c_int64


class _AttentionArgs(ctypes.Structure):
    _fields_ = (
        *((name, _Pointer) for name in ("query", "keys", "values", "output", "sinks")),
        *((name, _Pointer) for name in ("first_row", "num_rows", "context_len")),
        *((name, _Pointer) for name in ("tables", "table_start")),
        *((name, _Size) for name in ("num_requests", "query_stride", "num_query_heads")),
        *((name, _Size) for name in ("num_kv_heads", "head_dim", "block_size")),
        *((name, _Size) for name in ("block_stride", "slot_stride", "window")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )


class _RotaryArgs(ctypes.Structure):
    _fields_ = (
        *((name, _Pointer) for name in ("qkv", "cos", "sin", "query_norm", "key_norm")),
        *((name, _Pointer) for name in ("keys", "values", "blocks", "offsets")),
        *((name, _Size) for name in ("num_rows", "num_query_heads", "num_kv_heads", "head_dim")),
        *((name, _Size) for name in ("rotary_dim", "block_stride", "slot_stride")),
        ("eps", ctypes.c_float),
    )


class CpuOps:
    """The kernels of one loaded library; see LayerOps. What they cannot do, torch does."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self._torch = TorchOps()
        library.baton_attention.argtypes = [ctypes.POINTER(_AttentionArgs)]
        library.baton_attention.restype = None
        library.baton_rotary.argtypes = [ctypes.POINTER(_RotaryArgs)]
        library.baton_rotary.restype = None
        library.baton_linear.argtypes = [ctypes.POINTER(LinearArgs)]
        library.baton_linear.restype = None
        library.baton_add_norm.argtypes = [_Pointer] * 4 + [_Size] * 2 + [ctypes.c_float]
        library.baton_add_norm.restype = None
        for gate in (library.baton_silu_mul, library.baton_gelu_mul):
            gate.argtypes = [_Pointer] * 2 + [_Size] * 2
            gate.restype = None
        library.baton_filter_floor.argtypes = [_Pointer] * 5 + [_Size] * 2
        library.baton_filter_floor.restype = None
        library.baton_gumbel_argmax.argtypes = [_Pointer] * 4 + [_Size] * 2
        library.baton_gumbel_argmax.restype = None

    @property
    def name(self) -> str:
        return f"cpu{LIBRARY_VERSION}-{self.isa}"

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        return ISA_NAMES[self._library.baton_isa()]

    def use_isa(self, name: str) -> None:
        """Use this instruction set, or the best one there is if it is lower; for tests."""
        self._library.baton_set_isa(ISA_NAMES.index(name))

    def is_batch_invariant(self, head_dim: int, group: int) -> bool:
        """See LayerOps."""
        return _has_kernel(head_dim, group)

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
        if not _attends(query, keys):
            return self._torch.attention(
                query, keys, values, rows, scale=scale, window=window, softcap=softcap, sinks=sinks
            )
        num_rows, num_heads, dim = query.shape
        output = torch.empty((num_rows, num_heads, dim))
        args = _AttentionArgs(
            query=query.data_ptr(),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            output=output.data_ptr(),
            sinks=None if sinks is None else sinks.data_ptr(),
            first_row=rows.first_row.data_ptr(),
            num_rows=rows.num_rows.data_ptr(),
            context_len=rows.context_len.data_ptr(),
            tables=rows.tables.data_ptr(),
            table_start=rows.table_start.data_ptr(),
            num_requests=len(rows.first_row),
            query_stride=query.stride(0),
            num_query_heads=num_heads,
            num_kv_heads=keys.shape[2],
            head_dim=dim,
            block_size=keys.shape[1],
            block_stride=keys.stride(0),
            slot_stride=keys.stride(1),
            window=window or 0,
            scale=scale,
            softcap=softcap or 0.0,
        )
        self._library.baton_attention(args)
        return output

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
        assert slots.blocks.is_contiguous()  # as one of an expanded tensor is not: seen
        assert slots.offsets.is_contiguous()
        args = _RotaryArgs(
            qkv=qkv.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            query_norm=None if norms is None else norms.query.data_ptr(),
            key_norm=None if norms is None else norms.key.data_ptr(),
            keys=slots.keys.data_ptr(),
            values=slots.values.data_ptr(),
            blocks=slots.blocks.data_ptr(),
            offsets=slots.offsets.data_ptr(),
            num_rows=qkv.shape[0],
            num_query_heads=num_query_heads,
            num_kv_heads=slots.keys.shape[2],
            head_dim=slots.keys.shape[3],
            rotary_dim=cos.shape[-1],
            block_stride=slots.keys.stride(0),
            slot_stride=slots.keys.stride(1),
            eps=0.0 if norms is None else norms.eps,
        )
        self._library.baton_rotary(args)

    def add_norm(
        self, residual: Tensor, branch: Tensor | None, weight: Tensor, eps: float
    ) -> Tensor:
        """See LayerOps."""
        output = torch.empty_like(residual)
        self._library.baton_add_norm(
            residual.data_ptr(),
            None if branch is None else branch.data_ptr(),
            weight.data_ptr(),
            output.data_ptr(),
            residual.shape[0],
            residual.shape[1],
            eps,
        )
        return output

    def linear(self, x: Tensor, weight: PackedWeight) -> Tensor:
        """x [rows, in] W^T + bias, [rows, out]."""
        output = torch.empty((x.shape[0], weight.out_features))
        self._library.baton_linear(weight.args(x, output))
        return output

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        """See LayerOps."""
        return _gated(self._library.baton_silu_mul, gate_up)

    def gelu_mul(self, gate_up: Tensor) -> Tensor:
        """See LayerOps."""
        return _gated(self._library.baton_gelu_mul, gate_up)

    def filter_floor(self, x: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
        """See LayerOps."""
        x = x.contiguous()
        floors = torch.empty(x.shape[0])
        self._library.baton_filter_floor(
            x.data_ptr(),
            top_k.data_ptr(),
            top_p.data_ptr(),
            min_p.data_ptr(),
            floors.data_ptr(),
            x.shape[0],
            x.shape[1],
        )
        return floors

    def gumbel_argmax(self, x: Tensor, floor: Tensor, keys: Tensor) -> Tensor:
        """See LayerOps."""
        x, keys = x.contiguous(), keys.contiguous()
        tokens = torch.empty(x.shape[0], dtype=torch.int64)
        self._library.baton_gumbel_argmax(
            x.data_ptr(),
            floor.data_ptr(),
            keys.data_ptr(),
            tokens.data_ptr(),
            x.shape[0],
            x.shape[1],
        )
        return tokens

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
        """See LayerOps; torch does it."""
        self._torch.penalize(x, rows, ids, counts, repetition, frequency, presence)


def _gated(kernel: Any, gate_up: Tensor) -> Tensor:
    num_rows, width = gate_up.shape
    output = torch.empty((num_rows, width // 2))
    kernel(gate_up.data_ptr(), output.data_ptr(), num_rows, width // 2)
    return output


def _attends(query: Tensor, keys: Tensor) -> bool:
    """Whether the kernel can attend over such tensors."""
    plain = query.dtype == keys.dtype == torch.float32 and query.device.type == "cpu"
    group, dim = query.shape[1] // keys.shape[2], keys.shape[3]
    return plain and _has_kernel(dim, group)


def _has_kernel(head_dim: int, group: int) -> bool:
    return head_dim % 4 == 0 and head_dim <= MAX_HEAD_DIM and group <= MAX_GROUP


@cache
def load_cpu_ops() -> CpuOps | None:
    """The compiled kernels; None where they were not built, or of another version."""
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_cpu_ops{suffix}")
        if path.is_file():
            return open_library(path)
    return None


def open_library(path: Path) -> CpuOps | None:
    """The kernels in this file; None, and a warning, where they are not this source's."""
    library = ctypes.CDLL(str(path))
    version = library.baton_version() if hasattr(library, "baton_version") else 1
    if version == LIBRARY_VERSION:
        return CpuOps(library)
    log.warning(
        "%s is version %d of the CPU kernels, %d is needed: torch does their work, slower; "
        "build them anew with `pip install -e .`", path, version, LIBRARY_VERSION
    )  # fmt: skip
    return None
