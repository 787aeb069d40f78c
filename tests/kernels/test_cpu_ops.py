"""The compiled CPU kernels against their specification in torch, for every instruction set."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from kernels.cpu_ops import ISA_NAMES, CpuOps, load_cpu_ops
from kernels.noise import gumbel, row_keys
from kernels.ops import HeadNorms, LayerSlots, PackedRows, TorchOps
from kernels.paged_attention import RequestRows, paged_attention_reference

BLOCK_SIZE = 4
NUM_BLOCKS = 160
SHAPES = [(1, 1), (1, 13), (7, 7), (5, 22), (3, 4), (1, 8), (40, 70), (1, 90)]  # rows, context
HEADS = [(4, 4), (6, 2), (4, 1), (9, 1)]  # query heads, K/V heads
SIZES = [8, 16, 20, 64, 80]


@pytest.fixture(params=ISA_NAMES)
def ops(request: pytest.FixtureRequest) -> Iterator[CpuOps]:
    loaded = load_cpu_ops()
    if loaded is None:
        pytest.skip("the CPU kernels were not built: there was no C++ compiler")
    best = loaded.isa
    loaded.use_isa(request.param)
    if loaded.isa != request.param:
        pytest.skip(f"this processor has no {request.param}")
    yield loaded
    loaded.use_isa(best)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_requests(shapes: list[tuple[int, int]]) -> list[RequestRows]:
    blocks = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(1)).tolist()
    requests, first_row = [], 0
    for num_rows, context_len in shapes:
        table = torch.tensor([blocks.pop() for _ in range(-(-context_len // BLOCK_SIZE))])
        requests.append(RequestRows(first_row, num_rows, context_len, table))
        first_row += num_rows
    return requests


def make_cache(requests: list[RequestRows], num_heads: int, size: int) -> tuple[Tensor, Tensor]:
    """Keys and values as views of one pool; slots that no request has are NaN."""
    pool = torch.full((NUM_BLOCKS, 2, BLOCK_SIZE, num_heads, size), torch.nan)
    for request in requests:
        for position in range(request.context_len):
            block = int(request.block_table[position // BLOCK_SIZE])
            place = (block, slice(None), position % BLOCK_SIZE)
            pool[place] = seeded(2, num_heads, size, seed=1000 * block + position)
    return pool[:, 0], pool[:, 1]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("heads", HEADS)
def test_attention_equals_the_reference(ops: CpuOps, heads: tuple[int, int], size: int) -> None:
    requests = make_requests(SHAPES)
    keys, values = make_cache(requests, heads[1], size)
    query = seeded(sum(rows for rows, _ in SHAPES), heads[0], size)
    for window, softcap, sinks in itertools.product(
        (None, 1, 3, 8, 100), (None, 2.0), (None, seeded(heads[0], seed=2))
    ):
        expected = paged_attention_reference(
            query, keys, values, requests, scale=0.3, window=window, softcap=softcap, sinks=sinks
        )
        found = ops.attention(
            query,
            keys,
            values,
            PackedRows(requests),
            scale=0.3,
            window=window,
            softcap=softcap,
            sinks=sinks,
        )
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-6)


def test_a_row_has_the_same_bits_in_every_company(ops: CpuOps) -> None:
    """Alone or in a batch, in one chunk or several, with one thread or two."""
    length, heads, size = 150, 6, 64
    (request,) = make_requests([(length, length)])
    keys, values = make_cache([request], 2, size)
    query = seeded(length, heads, size)

    def attend(first: int, last: int, company: int = 0) -> Tensor:
        rows = last - first
        asked = [RequestRows(0, rows, last, request.block_table)]
        asked += [RequestRows(rows + i, 1, 17 + i, request.block_table) for i in range(company)]
        asked_query = torch.cat([query[first:last], seeded(company, heads, size, seed=3)])
        found = ops.attention(asked_query, keys, values, PackedRows(asked), scale=0.1, window=100)
        return found[:rows]

    whole = attend(0, length)
    for chunk in (1, 7, 32, 96):
        parts = [attend(first, min(first + chunk, length)) for first in range(0, length, chunk)]
        assert torch.equal(torch.cat(parts), whole), f"chunks of {chunk}"
    assert torch.equal(attend(140, 150, company=5), whole[140:])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(attend(0, length), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("heads", HEADS)
def test_attention_sees_every_key_whatever_the_number_of_rows(
    ops: CpuOps, heads: tuple[int, int]
) -> None:
    """Where a row is the only one of its task that reaches into a tile of keys (65 rows did)."""
    for context_len in (*range(60, 70), *range(94, 100), *range(124, 134), 193):
        requests = make_requests([(context_len, context_len)])
        keys, values = make_cache(requests, heads[1], 8)
        for num_rows in {context_len, context_len - 1, context_len - 3, 33, 2}:
            rows = [RequestRows(0, num_rows, context_len, requests[0].block_table)]
            query = seeded(num_rows, heads[0], 8)
            expected = paged_attention_reference(query, keys, values, rows, scale=0.3)
            found = ops.attention(query, keys, values, PackedRows(rows), scale=0.3)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("size", "rotary"), [(8, 8), (20, 12), (64, 64)])
def test_rotary_equals_torch(ops: CpuOps, size: int, rotary: int, norms: bool) -> None:
    num_rows, num_query_heads, num_kv_heads = 40, 6, 2
    qkv = seeded(num_rows, (num_query_heads + 2 * num_kv_heads) * size)
    cos, sin = seeded(num_rows, rotary, seed=1), seeded(num_rows, rotary, seed=2)
    head_norms = HeadNorms(seeded(size, seed=3), seeded(size, seed=4), 1e-6) if norms else None
    places = torch.randperm(64, generator=torch.Generator().manual_seed(5))[:num_rows]

    def run(by: CpuOps | TorchOps) -> tuple[Tensor, Tensor]:
        pool = torch.zeros(16, 2, BLOCK_SIZE, num_kv_heads, size)
        slots = LayerSlots(pool[:, 0], pool[:, 1], places // BLOCK_SIZE, places % BLOCK_SIZE)
        mine = qkv.clone()
        by.rotary(mine, cos, sin, slots, num_query_heads=num_query_heads, norms=head_norms)
        return mine[:, : num_query_heads * size], pool

    for found, expected in zip(run(ops), run(TorchOps()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [1, 37, 64, 768])
def test_norm_and_activation_equal_torch(ops: CpuOps, width: int) -> None:
    weight, x, branch = seeded(width), seeded(50, width, seed=1), seeded(50, width, seed=2)
    for added in (None, branch):
        mine, theirs = x.clone(), x.clone()
        found = ops.add_norm(mine, added, weight, 1e-5)
        expected = TorchOps().add_norm(theirs, added, weight, 1e-5)
        torch.testing.assert_close(found, expected)
        assert torch.equal(mine, theirs)
    gate_up = 20 * seeded(50, 2 * width, seed=3)
    torch.testing.assert_close(ops.silu_mul(gate_up), TorchOps().silu_mul(gate_up))


@pytest.mark.parametrize("spread", [0.01, 1.0, 10.0])
def test_filter_floor_equals_torch(ops: CpuOps, spread: float) -> None:
    """Ties, masked entries and every combination of the three filters."""
    size = 1000
    row = (spread * seeded(size)).round(decimals=3)
    row[17::50] = -torch.inf
    combinations = list(
        itertools.product((0, 1, 7, 999, 5000), (0.0, 0.3, 0.95, 1.0), (0.0, 0.01, 0.9, 1.0))
    )
    x = row.expand(len(combinations), size).contiguous()
    top_k = torch.tensor([k for k, _, _ in combinations])
    top_p = torch.tensor([p for _, p, _ in combinations], dtype=torch.float64)
    min_p = torch.tensor([m for _, _, m in combinations], dtype=torch.float64)
    expected = TorchOps().filter_floor(x, top_k, top_p, min_p)
    found = ops.filter_floor(x, top_k, top_p, min_p)
    for number, combination in enumerate(combinations):
        kept = row >= expected[number]
        assert torch.equal(row >= found[number], kept), f"{combination}: {int(kept.sum())} kept"


@pytest.mark.parametrize("spread", [0.0, 1.0, 10.0])
def test_tokens_are_drawn_as_torch_draws_them(ops: CpuOps, spread: float) -> None:
    """Logarithms differ by a few ulp; a draw whose two best are that close is no difference."""
    num_rows, size = 400, 1003
    x = spread * seeded(num_rows, size)
    floor = torch.full((num_rows,), -torch.inf)
    floor[::2] = x[::2].topk(20).values[:, -1]
    keys = row_keys(torch.arange(num_rows) * 977, torch.arange(num_rows))
    found, expected = (by.gumbel_argmax(x, floor, keys) for by in (ops, TorchOps()))
    ids = torch.arange(size, dtype=torch.int32)
    scores = (x + gumbel(keys.unsqueeze(1), ids)).masked_fill(x < floor.unsqueeze(1), -torch.inf)
    lead = scores.gather(1, expected[:, None]) - scores.gather(1, found[:, None])
    assert float(lead.max()) < 1e-5
    assert int((found != expected).sum()) <= 1


def test_noise_is_exact_in_both_tails(ops: CpuOps) -> None:
    """A draw between two tokens shows the sign of the difference of their noises."""
    keys = row_keys(torch.arange(20_000), torch.zeros(20_000, dtype=torch.int64))
    noise = gumbel(keys.unsqueeze(1), torch.arange(2, dtype=torch.int32))
    gap = (noise[:, 0] - noise[:, 1]).double()
    for offset, wins in ((1e-4, 0), (-1e-4, 1)):
        x = torch.stack([(-gap + offset).float(), torch.zeros(len(gap))], dim=1)
        drawn = ops.gumbel_argmax(x, torch.full((len(gap),), -torch.inf), keys)
        assert (drawn == wins).all()


def test_what_the_kernel_cannot_attend_over_goes_to_torch(ops: CpuOps) -> None:
    requests = make_requests([(2, 9)])
    keys, values = make_cache(requests, 2, 6)  # heads of 6 fill no vector
    query = seeded(2, 2, 6)
    found = ops.attention(query, keys, values, PackedRows(requests), scale=0.3)
    expected = paged_attention_reference(query, keys, values, requests, scale=0.3)
    torch.testing.assert_close(found, expected)
