"""How the work of an attention kernel is cut: tiles of rows, tiles of keys, splits of the context.

All of it follows from what the host knows without asking the device, and takes few values, because
each shape is compiled when it is first met.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.device_rows import DeviceRows
from kernels.triton_common import num_processors, power_of_2

MAX_SPLITS = 64
KEYS_PER_SPLIT = 128  # a split of fewer keys costs more than it brings
PROGRAMS_PER_PROCESSOR = 4


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the work is cut; all of it known on the host without asking the device."""

    query_rows: int  # rows of a request per program
    product_rows: int  # query_rows * group, padded
    keys: int  # per step of the walk
    num_tiles: int  # of rows, over all requests; some may turn out to be empty
    one_tile: bool  # every request has one
    num_splits: int
    num_warps: int
    num_stages: int


def choose_tiling(query: Tensor, keys: Tensor, rows: DeviceRows, *, invariant: bool) -> Tiling:
    """Shapes of tiles by what a processor holds, splits by how many programs there are without.

    Few shapes, because each is compiled when it is first met.
    """
    num_rows, num_heads, dim = query.shape
    num_kv_heads = keys.shape[2]
    group = num_heads // num_kv_heads
    wide = query.dtype is torch.float32  # multiplied without tensor cores, in many registers
    bulky = power_of_2(dim) * query.element_size() > 256
    most = max(power_of_2(group), _most_rows(dim, wide=wide, bulky=bulky, invariant=invariant))
    product_rows = most if invariant else _product_rows(group, rows.max_rows, most)
    query_rows = product_rows // group
    one_tile = rows.max_rows <= query_rows
    num_tiles = rows.num_requests + (0 if one_tile else num_rows // query_rows)
    num_splits = 1
    if one_tile and not invariant:
        num_splits = _num_splits(num_tiles * num_kv_heads, rows.max_context, query.device)
    return Tiling(
        query_rows=query_rows,
        product_rows=product_rows,
        keys=(16 if bulky else 32) if wide else 32 if bulky else 64,
        num_tiles=num_tiles,
        one_tile=one_tile,
        num_splits=num_splits,
        num_warps=8 if product_rows >= 128 or (bulky and wide) else 4,
        num_stages=2 if product_rows >= 64 or bulky else 3,
    )


def _most_rows(dim: int, *, wide: bool, bulky: bool, invariant: bool) -> int:
    """Of a product: as many as registers hold with the sums of their values."""
    if wide:
        return 16 if bulky else 32
    if bulky:
        return 32
    return 64 if invariant else 128


def _product_rows(group: int, max_rows: int, most: int) -> int:
    """The first of three sizes that holds the rows: for decode, for a few rows, for chunks."""
    sizes = (max(16, power_of_2(group)), max(64, power_of_2(group)))
    return next((size for size in sizes if group * max_rows <= size <= most), max(16, most))


def _num_splits(num_programs: int, max_context: int, device: torch.device) -> int:
    wanted = PROGRAMS_PER_PROCESSOR * num_processors(device) // num_programs
    useful = -(-max_context // KEYS_PER_SPLIT)
    return max(1, min(wanted, useful, MAX_SPLITS))
