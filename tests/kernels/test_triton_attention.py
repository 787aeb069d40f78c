"""Paged attention in Triton against its reference: natively on a GPU, else interpreted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import attention_tiling
from kernels.attention_tiling import choose_tiling
from kernels.device_rows import DeviceRows
from kernels.triton_attention import paged_attention_triton, supports
from tests.kernels.paged_cases import PagedCase, make_case, seeded

TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}
MIXED = [(1, 1), (1, 37), (7, 7), (5, 22), (1, 70), (21, 40)]
DECODE = [(1, 5), (1, 130), (1, 64)]
VERIFY = [(3, 70), (1, 9), (4, 4)]


def attend(case: PagedCase, rows: DeviceRows | None = None, **options: Any) -> Tensor:
    assert supports(case.query, case.keys, case.values)
    rows = rows or DeviceRows.of(case.requests)
    return paged_attention_triton(case.query, case.keys, case.values, rows, **options)


def check(case: PagedCase, **options: Any) -> None:
    expected = case.reference(scale=0.3, **options)
    found = attend(case, scale=0.3, **options)
    torch.testing.assert_close(found, expected, **TOLERANCE[case.query.dtype])


@pytest.fixture
def splitting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short contexts are split as if they were long."""
    monkeypatch.setattr(attention_tiling, "KEYS_PER_SPLIT", 32)
    monkeypatch.setattr(attention_tiling, "PROGRAMS_PER_PROCESSOR", 100)


@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_head_sizes_and_types(dim: int, dtype: torch.dtype, device: torch.device) -> None:
    check(make_case([(3, 41), (1, 1)], (4, 2), dim, dtype=dtype, device=device))


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (7, 1)])
@pytest.mark.parametrize("shapes", [MIXED, DECODE, VERIFY])
def test_grouped_heads_and_ragged_batches(
    heads: tuple[int, int], shapes: list[tuple[int, int]], device: torch.device
) -> None:
    check(make_case(shapes, heads, 16, device=device))


@pytest.mark.parametrize("window", [1, 3, 40])
@pytest.mark.parametrize("shapes", [MIXED, DECODE])
def test_windows(window: int, shapes: list[tuple[int, int]], device: torch.device) -> None:
    check(make_case(shapes, (4, 2), 16, device=device), window=window)


@pytest.mark.parametrize("shapes", [MIXED, DECODE])
def test_soft_caps_and_sinks(shapes: list[tuple[int, int]], device: torch.device) -> None:
    case = make_case(shapes, (4, 2), 16, device=device)
    sinks = seeded(4, seed=2).to(device)
    check(case, softcap=1.5, sinks=sinks, window=50)
    check(case, sinks=sinks)


@pytest.mark.parametrize("block_size", [1, 16, 24, 64, 128])
def test_block_sizes(block_size: int, device: torch.device) -> None:
    check(make_case([(2, 150), (1, 24)], (2, 1), 16, block_size=block_size, device=device))


@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("shapes", [DECODE, VERIFY])
@pytest.mark.usefixtures("splitting")
def test_a_split_context(
    shapes: list[tuple[int, int]], window: int | None, device: torch.device
) -> None:
    case = make_case(shapes, (4, 2), 16, device=device)
    tiling = choose_tiling(case.query, case.keys, DeviceRows.of(case.requests), invariant=False)
    assert tiling.num_splits > 1
    check(case, window=window)
    check(case, window=window, sinks=seeded(4, seed=2).to(device))


def test_rows_of_many_tiles_find_their_requests(device: torch.device) -> None:
    """Small tiles, so that a request has several and the search for it has something to do."""
    case = make_case([(1, 3), (40, 40), (1, 2), (33, 90), (1, 1)], (16, 1), 16, device=device)
    rows = DeviceRows.of(case.requests)
    tiling = choose_tiling(case.query, case.keys, rows, invariant=True)
    assert not tiling.one_tile
    assert tiling.query_rows == 2
    expected = case.reference(scale=0.3)
    found = attend(case, scale=0.3, invariant=True)
    torch.testing.assert_close(found, expected, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("max_rows", [1, 300])
def test_padding_of_a_graph_changes_nothing(max_rows: int, device: torch.device) -> None:
    """Requests without rows, with a row and no context, wide tables, and bounds beyond need."""
    case = make_case([(1, 9), (1, 66)], (4, 2), 16, device=device)
    tables = torch.full((5, 40), -(1 << 31), dtype=torch.int32, device=device)  # never read
    for row, request in enumerate(case.requests):
        tables[row, : len(request.block_table)] = request.block_table
    rows = DeviceRows(
        first_row=torch.tensor([0, 1, 2, 3, 3, 3], dtype=torch.int32, device=device),
        context_len=torch.tensor([9, 66, 0, 7, 0], dtype=torch.int32, device=device),
        tables=tables,
        table_start=torch.arange(0, 200, 40, dtype=torch.int32, device=device),
        max_rows=max_rows,
        max_context=1000,
    )
    padded = replace(case, query=torch.cat([case.query, case.query.new_full((3, 4, 16), 1)]))
    expected = case.reference(scale=0.3)
    found = attend(padded, rows, scale=0.3)
    torch.testing.assert_close(found[:2], expected, **TOLERANCE[torch.float32])
    assert (found[2] == 0).all()


@pytest.mark.usefixtures("splitting")  # which would change bits, were anything split
def test_a_row_has_the_same_bits_in_every_company(device: torch.device) -> None:
    """Alone, among others, in one chunk or in several."""
    length = 80
    case = make_case([(length, length), (1, 30)], (6, 2), 16, device=device)
    table = case.requests[0].block_table

    def part(first: int, last: int) -> Tensor:
        alone = replace(case, query=case.query[first:last])
        rows = DeviceRows.of([replace(case.requests[0], num_rows=last - first, context_len=last)])
        assert rows.tables.numel() == len(table)
        return attend(alone, rows, scale=0.3, window=60, invariant=True)

    whole = attend(case, scale=0.3, window=60, invariant=True)
    for chunk in (31, 79):
        parts = [part(first, min(first + chunk, length)) for first in range(0, length, chunk)]
        assert torch.equal(torch.cat(parts), whole[:length]), f"chunks of {chunk}"
    assert torch.equal(part(length - 1, length), whole[length - 1 : length])


@pytest.mark.parametrize(("num_requests", "splits"), [(1, 64), (16, 4), (64, 1), (256, 1)])
def test_splits_fill_the_processors(
    num_requests: int, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama 3 8B with long contexts on a GPU of 132 processors."""
    monkeypatch.setattr(attention_tiling, "num_processors", lambda _: 132)
    none = torch.zeros(num_requests, dtype=torch.int32)
    rows = DeviceRows(none, none, none, none, max_rows=1, max_context=100_000)
    query, keys = torch.empty(num_requests, 32, 128), torch.empty(1, 16, 8, 128)
    tiling = choose_tiling(query.bfloat16(), keys.bfloat16(), rows, invariant=False)
    assert (tiling.num_splits, tiling.product_rows, tiling.num_tiles) == (splits, 16, num_requests)
