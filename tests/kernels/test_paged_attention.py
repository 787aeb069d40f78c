"""Paged attention: the reference against dense attention, the fast version against that."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.paged_attention import RequestRows, paged_attention_reference
from kernels.paged_attention_sdpa import QUERY_TILE, paged_attention_sdpa

BLOCK_SIZE = 4
NUM_BLOCKS = 128
SHAPES = [(1, 1), (1, 13), (7, 7), (5, 22), (3, 4), (1, 8)]  # rows, context
HEADS = [(4, 4), (6, 2), (4, 1)]  # query heads, K/V heads
WINDOWS = [None, 1, 3, 8, 100]


def make_requests(shapes: list[tuple[int, int]]) -> list[RequestRows]:
    """Requests over scattered blocks, one after the other in the batch."""
    blocks = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(1)).tolist()
    requests, first_row = [], 0
    for num_rows, context_len in shapes:
        table = torch.tensor([blocks.pop() for _ in range(-(-context_len // BLOCK_SIZE))])
        requests.append(RequestRows(first_row, num_rows, context_len, table))
        first_row += num_rows
    return requests


def make_inputs(
    requests: list[RequestRows], heads: tuple[int, int], size: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """Query [T, Hq, D] and caches whose slots outside of the requests are NaN."""
    generator = torch.Generator().manual_seed(2)
    num_rows = sum(r.num_rows for r in requests)
    query = torch.randn(num_rows, heads[0], size, generator=generator)
    shape = (NUM_BLOCKS, BLOCK_SIZE, heads[1], size)
    keys, values = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
    for request in requests:
        for position in range(request.context_len):
            block = int(request.block_table[position // BLOCK_SIZE])
            for cache in (keys, values):
                slot = torch.randn(heads[1], size, generator=generator)
                cache[block, position % BLOCK_SIZE] = slot
    return query, keys, values


def dense(
    query: Tensor, keys: Tensor, values: Tensor, requests: list[RequestRows], window: int | None
) -> Tensor:
    """Row by row and head by head, as one would on paper."""
    output = torch.zeros_like(query)
    groups = query.shape[1] // keys.shape[2]
    for request in requests:
        for i, head in itertools.product(range(request.num_rows), range(query.shape[1])):
            row, position = request.first_row + i, request.first_position + i
            first = 0 if window is None else max(0, position - window + 1)
            slots = [
                (int(request.block_table[p // BLOCK_SIZE]), p % BLOCK_SIZE, head // groups)
                for p in range(first, position + 1)
            ]
            k, v = (torch.stack([cache[slot] for slot in slots]) for cache in (keys, values))
            output[row, head] = (k @ query[row, head] * 0.3).softmax(dim=0) @ v
    return output


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS)
def test_reference_is_dense_attention(heads: tuple[int, int], window: int | None) -> None:
    requests = make_requests(SHAPES)
    query, keys, values = make_inputs(requests, heads)
    ours = paged_attention_reference(query, keys, values, requests, scale=0.3, window=window)
    torch.testing.assert_close(ours, dense(query, keys, values, requests, window))


@pytest.mark.parametrize("extra", [{}, {"softcap": 1.5}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS)
def test_sdpa_equals_reference(
    heads: tuple[int, int], window: int | None, extra: dict[str, Any]
) -> None:
    requests = make_requests(SHAPES)
    query, keys, values = make_inputs(requests, heads)
    options = {**extra, "scale": 0.3, "window": window}
    if "sinks" in extra:
        options["sinks"] = torch.linspace(-1, 2, heads[0])
    expected = paged_attention_reference(query, keys, values, requests, **options)
    ours = paged_attention_sdpa(query, keys, values, requests, **options)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_inputs(dtype: torch.dtype) -> None:
    requests = make_requests(SHAPES)
    query, keys, values = (x.to(dtype) for x in make_inputs(requests, (4, 2)))
    expected = paged_attention_reference(query, keys, values, requests, scale=0.3)
    ours = paged_attention_sdpa(query, keys, values, requests, scale=0.3)
    assert ours.dtype == expected.dtype == dtype
    torch.testing.assert_close(ours, expected, atol=2e-2, rtol=2e-2)


def test_more_rows_than_a_tile() -> None:
    requests = make_requests([(QUERY_TILE + 3, QUERY_TILE + 9), (1, 5)])
    query, keys, values = make_inputs(requests, (2, 1))
    expected = paged_attention_reference(query, keys, values, requests, scale=0.3, softcap=2.0)
    ours = paged_attention_sdpa(query, keys, values, requests, scale=0.3, softcap=2.0)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_masks_are_shared_by_layers_and_do_not_change_the_result() -> None:
    requests = make_requests(SHAPES)
    query, keys, values = make_inputs(requests, (4, 2))
    masks: dict[tuple[int, int, int | None], Tensor] = {}
    first = paged_attention_sdpa(query, keys, values, requests, scale=0.3, masks=masks)
    known = dict(masks)
    again = paged_attention_sdpa(query, keys, values, requests, scale=0.3, masks=masks)
    assert known.keys() == {(5, 22, None), (3, 4, None)}
    assert all(masks[key] is mask for key, mask in known.items())
    assert torch.equal(first, again)


def test_a_request_does_not_feel_its_neighbours() -> None:
    """Bit for bit: each request is attended at its own length."""
    requests = make_requests(SHAPES)
    query, keys, values = make_inputs(requests, (4, 2))
    together = paged_attention_sdpa(query, keys, values, requests, scale=0.3)
    for request in requests:
        alone = RequestRows(0, request.num_rows, request.context_len, request.block_table)
        ours = paged_attention_sdpa(query[request.rows], keys, values, [alone], scale=0.3)
        assert torch.equal(ours, together[request.rows])
