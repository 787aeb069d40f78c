"""Units gathered, scattered and digested in Triton, against torch and the xxhash library."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import xxhash
from torch import Tensor

from kernels.block_copy import Part, gather_units, read_rows, scatter_units
from kernels.triton_blocks import (
    gather_units_triton,
    read_rows_triton,
    scatter_units_triton,
)
from kernels.triton_digest import accumulate_triton
from kernels.xxh3 import MIN_BYTES, accumulate, finish, secret_words
from tests.kernels.paged_cases import seeded

LAYERS, HEADS, DIM = 3, 5, 24
WHOLE = Part(0, LAYERS, 0, HEADS)
PARTS = [WHOLE, Part(1, 3, 2, 4), Part(2, 3, 4, 5)]


def make_pool(block_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return seeded(7, LAYERS, 2, block_size, HEADS, DIM).to(device, dtype)


def make_slots(num_tokens: int, block_size: int, device: torch.device) -> Tensor:
    """Two units with tokens all over the pool, some of them without a slot."""
    order = torch.randperm(7 * block_size, generator=torch.Generator().manual_seed(4))
    slots = order[: 2 * num_tokens].view(2, num_tokens)
    slots[1, 1::3] = -1
    return slots.to(device)


def test_a_unit_is_its_tokens_in_canonical_order() -> None:
    """By hand: layer, K or V, token, head, dim."""
    pool = make_pool(4, torch.float32, torch.device("cpu"))
    unit = gather_units(pool, torch.tensor([[9, 27]]), Part(1, 3, 2, 5), torch.float32)[0]
    assert unit.shape == (2, 2, 2, 3, DIM)
    for layer in range(2):
        for kind in range(2):
            assert torch.equal(unit[layer, kind, 0], pool[2, 1 + layer, kind, 1, 2:5])
            assert torch.equal(unit[layer, kind, 1], pool[6, 1 + layer, kind, 3, 2:5])


@pytest.mark.parametrize("part", PARTS, ids=str)
@pytest.mark.parametrize(("block_size", "num_tokens"), [(4, 9), (16, 16)])
def test_gather_and_scatter(
    part: Part, block_size: int, num_tokens: int, device: torch.device
) -> None:
    pool = make_pool(block_size, torch.float32, device)
    slots = make_slots(num_tokens, block_size, device)
    units = gather_units_triton(pool, slots, part, torch.float32)
    assert torch.equal(units, gather_units(pool, slots, part, torch.float32))
    mine, theirs = torch.full_like(pool, torch.nan), torch.full_like(pool, torch.nan)
    scatter_units_triton(units, mine, slots, part)
    scatter_units(units, theirs, slots, part)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)
    back = gather_units_triton(mine, slots, part, torch.float32)
    assert torch.equal(back, units)


@pytest.mark.parametrize(
    ("stored", "sent"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
def test_types_change_on_the_way(
    stored: torch.dtype, sent: torch.dtype, device: torch.device
) -> None:
    pool = make_pool(4, stored, device)
    slots = make_slots(9, 4, device)
    units = gather_units_triton(pool, slots, WHOLE, sent)
    assert units.dtype == sent
    expected = gather_units(pool, slots, WHOLE, sent)
    torch.testing.assert_close(units, expected, rtol=1e-2, atol=1e-6)
    landed = torch.zeros_like(pool)
    scatter_units_triton(units, landed, slots, WHOLE)
    scattered = torch.zeros_like(pool)
    scatter_units(units, scattered, slots, WHOLE)
    torch.testing.assert_close(landed, scattered, rtol=1e-2, atol=1e-6)


SIZES = [MIN_BYTES, 1024, 1032, 2048, 4168, 20_000]


@pytest.mark.parametrize("num_bytes", SIZES)
@pytest.mark.parametrize("by", [accumulate, accumulate_triton])
def test_digests_are_those_of_the_library(
    by: Callable[[Tensor, Tensor], Tensor], num_bytes: int, device: torch.device
) -> None:
    seed = 0x9123456789ABCDEF
    generator = torch.Generator().manual_seed(num_bytes)
    data = torch.randint(0, 256, (2, num_bytes), dtype=torch.uint8, generator=generator)
    accumulators = by(data.view(torch.int64).to(device), secret_words(seed, device))
    expected = [xxhash.xxh3_128_digest(bytes(row.tolist()), seed) for row in data]
    assert finish(accumulators, num_bytes, seed) == expected


def test_a_units_digest_covers_what_was_gathered(device: torch.device) -> None:
    """The bytes as they travel, without a copy in between."""
    pool = make_pool(16, torch.bfloat16, device)
    units = gather_units_triton(pool, make_slots(16, 16, device), WHOLE, torch.bfloat16)
    words = units.flatten(1).view(torch.int64)
    found = finish(accumulate_triton(words, secret_words(7, device)), words.shape[1] * 8, 7)
    data = units.flatten(1).view(torch.uint8).cpu()
    assert found == [xxhash.xxh3_128_digest(bytes(row.tolist()), 7) for row in data]


@pytest.mark.parametrize("by", [read_rows, read_rows_triton])
@pytest.mark.parametrize("num_words", [4, 2048, 5000])
def test_rows_are_read_from_their_addresses(
    by: Callable[[Tensor, Tensor], None], num_words: int, device: torch.device
) -> None:
    """Of memory that no tensor is made of; here it is one all the same."""
    if by is read_rows and device.type != "cpu":
        pytest.skip("the host reads its own memory only")
    memory = torch.arange(40_000, device=device)
    starts = [7, 20_001, 0]
    rows = torch.full((3, num_words), -1, device=device)
    by(rows, torch.tensor([memory.data_ptr() + 8 * start for start in starts], device=device))
    for row, start in zip(rows, starts, strict=True):
        assert torch.equal(row, memory[start : start + num_words])


def test_gathered_into_what_is_given(device: torch.device) -> None:
    pool = make_pool(4, torch.bfloat16, device)  # the interpreter cuts off what a GPU rounds
    slots = make_slots(9, 4, device)
    for gather in (gather_units, gather_units_triton):
        if gather is gather_units and device.type != "cpu":
            continue
        expected = gather_units(pool, slots, PARTS[1], torch.bfloat16)
        out = torch.full(expected.shape, torch.nan, dtype=expected.dtype, device=device)
        assert gather(pool, slots, PARTS[1], torch.bfloat16, out).data_ptr() == out.data_ptr()
        assert torch.equal(out, expected)
