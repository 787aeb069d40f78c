"""Places beyond 2^31 in a pool: block numbers are 32 bits wide, what they are multiplied by is not.

The pool is 4 GiB of which only the touched pages come to exist.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.block_copy import Part
from kernels.device_rows import DeviceRows
from kernels.ops import LayerSlots, TorchOps
from kernels.paged_attention import RequestRows, paged_attention_reference
from kernels.triton_attention import paged_attention_triton
from kernels.triton_blocks import gather_units_triton, scatter_units_triton
from kernels.triton_layers import rotary_triton
from tests.kernels.paged_cases import seeded

SIZE, HEADS, DIM = 4, 2, 16
LAST = 2  # blocks before it fill 2^31 numbers


@pytest.fixture
def pool(device: torch.device) -> Tensor:
    """[3, 1, 2, SIZE, HEADS, DIM] in fp16, its blocks 2^30 numbers apart."""
    block = 2 * SIZE * HEADS * DIM
    memory = torch.empty(LAST * 2**30 + block, dtype=torch.float16, device=device)
    strides = (2**30, block, block // 2, HEADS * DIM, DIM, 1)
    return memory.as_strided((LAST + 1, 1, 2, SIZE, HEADS, DIM), strides)


def test_units_are_written_and_read_there(pool: Tensor, device: torch.device) -> None:
    slots = torch.arange(LAST * SIZE, (LAST + 1) * SIZE, device=device)[None, :]
    part = Part(0, 1, 0, HEADS)
    units = seeded(1, 1, 2, SIZE, HEADS, DIM).to(device, torch.float16)
    scatter_units_triton(units, pool, slots, part)
    assert torch.equal(pool[LAST, 0], units[0, 0])
    assert torch.equal(gather_units_triton(pool, slots, part, torch.float16), units)


def test_attention_and_rotary_reach_it(pool: Tensor, device: torch.device) -> None:
    pool[LAST] = seeded(1, 2, SIZE, HEADS, DIM).to(device, torch.float16)
    keys, values = pool[:, 0, 0], pool[:, 0, 1]
    query = seeded(1, 2 * HEADS, DIM, seed=1).to(device, torch.float16)
    requests = [RequestRows(0, 1, SIZE, torch.tensor([LAST], device=device))]
    rows = DeviceRows.of(requests)
    found = paged_attention_triton(query, keys, values, rows, scale=0.3)
    expected = paged_attention_reference(query, keys, values, requests, scale=0.3)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)

    qkv = seeded(1, 4 * HEADS * DIM, seed=2).to(device, torch.float16)
    turn = seeded(1, DIM, seed=3).to(device, torch.float16)
    place = torch.tensor([LAST], device=device), torch.tensor([1], device=device)
    slots = LayerSlots(keys, values, *place)
    rotary_triton(qkv.clone(), turn, turn, slots, num_query_heads=2 * HEADS)
    written = pool[LAST].clone()
    pool[LAST, 0, :, 1] = 0
    TorchOps().rotary(qkv, turn, turn, slots, num_query_heads=2 * HEADS)
    torch.testing.assert_close(written, pool[LAST], rtol=4e-3, atol=4e-3)
