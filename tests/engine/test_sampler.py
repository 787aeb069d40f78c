"""Noise is uniform, independent and reproducible; filters and penalties mean the usual things."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine.request import Request
from engine.rows import CORRUPTED
from engine.sampler import Sampler
from kernels.noise import GUMBEL_MAX, GUMBEL_MIN, gumbel, random_integers, row_keys
from kernels.sampling import filter_floor
from wire.types import SamplingParams

EOS = 3
MASK64 = (1 << 64) - 1


# ------------------------------------------------------------ noise


def expected_integer(seed: int, position: int, token_id: int) -> int:
    """The noise's definition once more, in unbounded integers."""

    def mix64(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK64
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK64
        return z ^ z >> 31

    def mix32(h: int) -> int:
        h = (h ^ h >> 16) * 0x21F0AAAD & 0xFFFFFFFF
        h = (h ^ h >> 15) * 0xD35A2D97 & 0xFFFFFFFF
        return h ^ h >> 15

    golden = 0x9E3779B97F4A7C15
    start = mix64(seed + golden & MASK64)
    key = mix64(start + (position + 1) * golden & MASK64)
    return mix32((mix32(token_id ^ key & 0xFFFFFFFF) + (key >> 32)) & 0xFFFFFFFF) >> 1


def keys_of(seeds: list[int], positions: list[int]) -> Tensor:
    signed = [seed - (1 << 64) if seed >> 63 else seed for seed in seeds]
    return row_keys(torch.tensor(signed), torch.tensor(positions))


def all_ids(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int32)


def test_noise_is_what_its_definition_says() -> None:
    rng = random.Random(0)
    seeds = [0, 1, MASK64, 1 << 63, *(rng.getrandbits(64) for _ in range(20))]
    positions = [0, 1, (1 << 20) - 1, 7, *(rng.randrange(4096) for _ in range(20))]
    ids = [0, 1, 262_143, 2**31 - 1, *(rng.randrange(200_000) for _ in range(20))]
    got = random_integers(
        keys_of(seeds, positions).unsqueeze(1), torch.tensor(ids, dtype=torch.int32)
    )
    for row, seed, position in zip(got.tolist(), seeds, positions, strict=True):
        assert row == [expected_integer(seed, position, i) for i in ids]


def test_noise_is_pinned() -> None:
    """Nodes of different versions must agree; these numbers never change."""
    integers = random_integers(keys_of([42], [10]).unsqueeze(1), all_ids(3))
    assert integers.tolist() == [[42800518, 1205943718, 2028285694]]


def test_noise_is_bounded() -> None:
    noise = gumbel(keys_of([5] * 50, list(range(50))).unsqueeze(1), all_ids(50_000))
    assert noise.isfinite().all()
    assert noise.min() >= GUMBEL_MIN - 1e-5
    assert noise.max() <= GUMBEL_MAX + 1e-5


def uniforms(seeds: list[int], positions: list[int], num_ids: int) -> Tensor:
    integers = random_integers(keys_of(seeds, positions).unsqueeze(1), all_ids(num_ids))
    return integers.double() / 2**31


@pytest.mark.parametrize("along", ["seed", "position", "id"])
def test_noise_is_uniform_along_each_argument(along: str) -> None:
    """Chi-square over 256 cells of the top and of the low bits; 5 sigma."""
    n = 1 << 17
    if along == "seed":
        u = uniforms(list(range(n)), [17] * n, 1)
    elif along == "position":
        u = uniforms([99] * n, list(range(n)), 1)
    else:
        u = uniforms([99], [17], n)
    integers = (u.flatten() * 2**31).long()
    for cells in (integers >> 23, integers & 255, (integers >> 11) & 255):
        counts = torch.bincount(cells, minlength=256).double()
        chi2 = float(((counts - n / 256) ** 2 / (n / 256)).sum())
        assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)


@pytest.mark.parametrize("lag", ["seed", "position", "id", "seed and position", "high seed bit"])
def test_neighbours_are_independent(lag: str) -> None:
    """Correlation of values, and of single bits, between neighbours in one argument; 5 sigma."""
    rows, ids = 256, 1024
    seeds, positions = [1000 + i for i in range(rows)], [i % 16 for i in range(rows)]
    a = uniforms(seeds, positions, ids + 1)
    if lag == "id":
        b = a[:, 1:]
    elif lag == "seed":
        b = uniforms([s + 1 for s in seeds], positions, ids)
    elif lag == "position":
        b = uniforms(seeds, [p + 1 for p in positions], ids)
    elif lag == "high seed bit":
        b = uniforms([s ^ 1 << 63 for s in seeds], positions, ids)
    else:
        b = uniforms([s + 1 for s in seeds], [p + 1 for p in positions], ids)
    a = a[:, :ids]
    n = a.numel()
    correlation = float(((a - 0.5) * (b - 0.5)).mean()) * 12
    assert abs(correlation) < 5 / math.sqrt(n)
    for bit in (0, 7, 15, 23, 30):
        x, y = ((t * 2**31).long() >> bit & 1 for t in (a, b))
        assert abs(float((x == y).double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(n)


def test_one_row_hardly_repeats_a_value() -> None:
    """For one key the noise is a permutation; only the dropped bit may make two ids equal."""
    integers = random_integers(keys_of([7], [7]).unsqueeze(1), all_ids(200_000)).flatten()
    assert max(Counter(integers.tolist()).values()) <= 2


# ------------------------------------------------------------ the sampler


def make_request(
    tokens: list[int] | None = None, num_prompt_tokens: int = 3, **sampling: Any
) -> Request:
    return Request(
        request_id="r",
        tokens=tokens or [5, 6, 7],
        num_prompt_tokens=num_prompt_tokens,
        sampling=SamplingParams(**sampling),
        max_num_tokens=100,
    )


def sample(logits: Tensor, requests: list[Request]) -> list[int]:
    return Sampler(frozenset([EOS])).sample(logits, requests)


def test_greedy_takes_the_lowest_id_of_a_tie() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, [400, 37, 900]] = 2.0
    assert sample(logits, [make_request(temperature=0)]) == [37]
    assert sample(logits, [make_request(temperature=1e-9)]) == [37]


def test_same_seed_and_position_draw_the_same_token() -> None:
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(1)).repeat(64, 1)
    drawn = sample(logits, [make_request(seed=s) for s in range(64)])
    assert drawn == sample(logits, [make_request(seed=s) for s in range(64)])
    assert len(set(drawn)) > 20
    by_position = [make_request(tokens=[0] * (3 + i), seed=1) for i in range(64)]
    assert len(set(sample(logits, by_position))) > 20


def test_frequencies_follow_the_probabilities() -> None:
    """Chi-square of 20,000 draws over positions of one seed, 12 tokens; 5 sigma."""
    n, logits = 20_000, torch.linspace(-2, 2, 12)
    requests = [make_request(tokens=[0] * 3, seed=11, temperature=0.7) for _ in range(n)]
    for i, request in enumerate(requests):
        request.sampling = replace(request.sampling, seed=i)
    drawn = torch.tensor(sample(logits.repeat(n, 1), requests))
    counts = torch.bincount(drawn, minlength=12)
    expected = (logits / 0.7).softmax(0) * n
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 11 + 5 * math.sqrt(22)


def kept_by_transformers(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """The kept set, in our order: temperature, min-p, top-k, top-p."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    warped: Tensor = warpers(torch.zeros(len(logits), 1, dtype=torch.long), logits)
    return warped > -torch.inf


FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 64},
    {"top_k": 65},
    {"top_k": 300},
    {"top_k": 10**6},
    {"top_p": 1e-6},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.8},
    {"top_k": 200, "top_p": 0.95, "min_p": 0.001},
    {"top_p": 0.95, "min_p": 0.02, "temperature": 2.0},
    {"top_k": 2000, "top_p": 0.99, "temperature": 0.3},
]


@pytest.mark.parametrize("vocab_size", [1, 5, 64, 65, 3000])
@pytest.mark.parametrize("scale", [0.05, 1.0, 6.0])
def test_filters_keep_what_transformers_keeps(vocab_size: int, scale: float) -> None:
    """All filters in one batch, on flat to sharp rows.

    Theirs sums in fp32 from the small end, so at the nucleus' border one token may differ.
    """
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(len(FILTERS), vocab_size, generator=generator) * scale
    params = [SamplingParams(**f) for f in FILTERS]
    x = logits / torch.tensor([p.temperature for p in params]).unsqueeze(1)
    floor = filter_floor(
        x,
        torch.tensor([p.top_k for p in params]),
        torch.tensor([p.top_p for p in params], dtype=torch.float64),
        torch.tensor([p.min_p for p in params], dtype=torch.float64),
    )
    kept = x >= floor.unsqueeze(1)
    for row, p in enumerate(params):
        theirs = kept_by_transformers(logits[row : row + 1], p)[0]
        allowed = 1 if p.top_p < 1 else 0
        assert int((kept[row] != theirs).sum()) <= allowed, p
        assert kept[row].any()


def test_equal_logits_at_the_border_are_all_kept() -> None:
    x = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]])
    no_limit, all_mass = torch.tensor([0]), torch.ones(1, dtype=torch.float64)
    nothing = torch.zeros(1, dtype=torch.float64)
    assert filter_floor(x, torch.tensor([2]), all_mass, nothing) == 2.0
    assert filter_floor(x, no_limit, all_mass * 0.6, nothing) == 2.0
    assert filter_floor(x, no_limit, all_mass, nothing) == -torch.inf


def test_filtered_tokens_are_never_drawn() -> None:
    logits = torch.randn(400, 300, generator=torch.Generator().manual_seed(3))
    requests = [make_request(seed=s, top_k=5, temperature=3.0) for s in range(400)]
    top = logits.topk(5).indices.tolist()
    drawn = sample(logits, requests)
    assert all(token in row for token, row in zip(drawn, top, strict=True))
    assert len({row.index(token) for token, row in zip(drawn, top, strict=True)}) == 5


def random_request(rng: random.Random) -> Request:
    choices: dict[str, list[Any]] = {
        "temperature": [0.0, 0.5, 1.0, 1.7],
        "top_k": [0, 0, 3, 100],
        "top_p": [1.0, 0.5, 0.95],
        "min_p": [0.0, 0.0, 0.1],
        "repetition_penalty": [1.0, 1.0, 1.3],
        "presence_penalty": [0.0, 0.0, 0.7],
        "frequency_penalty": [0.0, 0.0, -0.4],
        "logit_bias": [{}, {}, {4: 2.5, 7: -100.0}],
        "min_tokens": [0, 0, 50],
        "stop_token_ids": [(), (1, 2)],
    }
    sampling = {name: rng.choice(values) for name, values in choices.items()}
    tokens = [rng.randrange(40) for _ in range(rng.randrange(3, 20))]
    return make_request(tokens, 3, seed=rng.getrandbits(64), **sampling)


@pytest.mark.parametrize("vocab_size", [40, 700, 5000])
def test_a_row_does_not_depend_on_the_others(vocab_size: int) -> None:
    rng = random.Random(vocab_size)
    requests = [random_request(rng) for _ in range(40)]
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(40, vocab_size, generator=generator) * 2
    together = sample(logits, requests)
    alone = [sample(logits[i : i + 1], [r])[0] for i, r in enumerate(requests)]
    order = rng.sample(range(40), 40)
    shuffled = sample(logits[order], [requests[i] for i in order])
    assert together == alone
    assert [together[i] for i in order] == shuffled


def test_logits_are_left_as_they_were() -> None:
    logits = torch.randn(1, 50)
    before = logits.clone()
    sample(logits, [make_request(logit_bias={1: 5.0}, repetition_penalty=1.5, top_k=3)])
    assert torch.equal(logits, before)


# ------------------------------------------------------------ penalties and masks


def adjusted(logits: Tensor, request: Request) -> Tensor:
    return Sampler(frozenset([EOS]))._adjust(logits, [request], None)[0]


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(2))
    request = make_request([1, 2, 2, 9, 9, 4], 3, repetition_penalty=1.4)
    theirs = RepetitionPenaltyLogitsProcessor(1.4)(torch.tensor([request.tokens]), logits.clone())
    assert torch.equal(adjusted(logits, request), theirs[0])


def test_presence_and_frequency_count_output_tokens_only() -> None:
    request = make_request(
        [1, 1, 2, 9, 9, 4], 3, presence_penalty=0.5, frequency_penalty=0.25, temperature=0
    )
    expected = torch.zeros(30)
    expected[9], expected[4] = -1.0, -0.75
    assert torch.equal(adjusted(torch.zeros(1, 30), request), expected)


def test_logit_bias_is_added_and_ids_beyond_the_vocabulary_do_nothing() -> None:
    request = make_request(logit_bias={2: 1.5, 5: -100.0, 10_000: 7.0}, temperature=0)
    expected = torch.zeros(30)
    expected[2], expected[5] = 1.5, -100.0
    assert torch.equal(adjusted(torch.zeros(1, 30), request), expected)


def test_min_tokens_masks_what_would_end_the_request() -> None:
    logits = torch.zeros(1, 30)
    logits[0, [EOS, 8]] = 50.0
    logits[0, 2] = 1.0
    early = make_request([5, 6, 7, 0], 3, min_tokens=2, stop_token_ids=(8,), temperature=0)
    late = make_request([5, 6, 7, 0, 0], 3, min_tokens=2, stop_token_ids=(8,), temperature=0)
    assert sample(logits, [early]) == [2]
    assert sample(logits, [late]) == [EOS]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits_concern_their_row_alone(value: float, temperature: float) -> None:
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(0))
    requests = [make_request(temperature=temperature, top_p=0.9) for _ in range(3)]
    first, _, last = sample(logits, requests)
    logits[1, 4] = value
    assert sample(logits, requests) == [first, CORRUPTED, last]
