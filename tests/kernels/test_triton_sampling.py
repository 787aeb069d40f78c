"""Filters, draws and penalties in Triton against their references in torch."""

from __future__ import annotations

import itertools

import pytest
import torch

from kernels.noise import gumbel, row_keys
from kernels.sampling import filter_floor, gumbel_argmax, penalize
from kernels.triton_sampling import (
    filter_floor_triton,
    gumbel_argmax_triton,
    penalize_triton,
)
from tests.kernels.paged_cases import seeded


@pytest.mark.parametrize(("spread", "size"), [(0.01, 100), (3.0, 1000), (10.0, 9000)])
def test_filters_keep_what_torch_keeps(spread: float, size: int, device: torch.device) -> None:
    """Ties, masked entries, and combinations of the three filters."""
    row = (spread * seeded(size)).round(decimals=3).to(device)
    row[17::50] = -torch.inf
    limits = [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.1), (20, 0.5, 0.01)]
    limits += [(9999, 0.999, 0.0), (1, 0.3, 0.0), (0, 0.0, 0.0), (size, 1.0, 1.0), (50, 0.95, 0.0)]
    x = row.expand(len(limits), size).contiguous()
    columns = zip(*limits, strict=True)
    types = (torch.int64, torch.float64, torch.float64)
    filters = [
        torch.tensor(column, dtype=dtype, device=device)
        for column, dtype in zip(columns, types, strict=True)
    ]
    expected = filter_floor(x, *filters)
    found = filter_floor_triton(x, *filters)
    for number, limit in enumerate(limits):
        kept = row >= expected[number]
        assert torch.equal(row >= found[number], kept), f"{limit}: {int(kept.sum())} kept"


@pytest.mark.parametrize("spread", [0.0, 1.0, 10.0])
def test_tokens_are_drawn_as_torch_draws_them(spread: float, device: torch.device) -> None:
    """Logarithms differ by a few ulp; a draw whose two best are that close is no difference."""
    num_rows, size = 60, 4100
    x = spread * seeded(num_rows, size).to(device)
    floor = torch.full((num_rows,), -torch.inf, device=device)
    floor[::2] = x[::2].topk(20).values[:, -1]
    numbers = torch.arange(num_rows, device=device)
    keys = row_keys(numbers * 977, numbers)
    found, expected = (by(x, floor, keys) for by in (gumbel_argmax_triton, gumbel_argmax))
    ids = torch.arange(size, dtype=torch.int32, device=device)
    scores = (x + gumbel(keys.unsqueeze(1), ids)).masked_fill(x < floor.unsqueeze(1), -torch.inf)
    lead = scores.gather(1, expected[:, None]) - scores.gather(1, found[:, None])
    assert float(lead.max()) < 1e-5
    assert int((found != expected).sum()) <= 1


def test_equal_scores_go_to_the_lowest_id(device: torch.device) -> None:
    """Where the logit decides alone, because nothing that is drawn comes near."""
    x = torch.zeros(1, 5000, device=device)
    x[0, [70, 4000]] = torch.inf
    keys = torch.zeros(1, 2, dtype=torch.int32, device=device)
    assert gumbel_argmax_triton(x, torch.zeros(1, device=device), keys).tolist() == [70]


def test_noise_is_exact_in_both_tails(device: torch.device) -> None:
    """A draw between two tokens shows the sign of the difference of their noises."""
    count = 300
    seeds = torch.arange(40_000, device=device)
    keys = row_keys(seeds, torch.zeros_like(seeds))
    noise = gumbel(keys.unsqueeze(1), torch.arange(2, dtype=torch.int32, device=device))
    extreme = noise[:, 0].argsort()[torch.tensor([*range(count // 2), *range(-count // 2, 0)])]
    keys, gap = keys[extreme], (noise[:, 0] - noise[:, 1]).double()[extreme]
    for offset, wins in ((1e-4, 0), (-1e-4, 1)):
        x = torch.stack([(-gap + offset).float(), torch.zeros_like(gap).float()], dim=1)
        drawn = gumbel_argmax_triton(x, torch.full((count,), -torch.inf, device=device), keys)
        assert (drawn == wins).all()


def test_penalties(device: torch.device) -> None:
    num_rows, size = 3, 50
    pairs = list(itertools.product(range(num_rows), range(0, size, 3)))[1:]
    rows, ids = (torch.tensor(column, device=device) for column in zip(*pairs, strict=True))
    counts = torch.arange(len(pairs), device=device) % 4
    weights = [
        torch.tensor(w, device=device) for w in ([1.0, 1.3, 0.7], [0.0, 0.5, -0.2], [0.1, 0.0, 1.0])
    ]
    x = seeded(num_rows, size + 3).to(device)[:, :size]
    expected = x.clone()
    penalize(expected, rows, ids, counts, *weights)
    penalize_triton(x, rows, ids, counts, *weights)
    assert torch.equal(x, expected)
    assert not torch.equal(x[0], seeded(num_rows, size + 3).to(device)[0, :size])
