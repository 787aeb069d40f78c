"""What is drawn follows the distribution that each parameter promises: chi-square, 50,000 draws.

The expected probabilities are computed here once more, in float64 and by the book. Seeds are fixed,
so a test passes always or never; a control shows that a small error would be seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.sampler import Sampler
from router.params import choice_seed
from wire.types import SamplingParams

NUM_DRAWS = 50_000
EOS = frozenset({3})
LOGITS = torch.tensor([1.9, 0.3, -0.8, 1.1, 0.0, 2.4, -1.6, 0.9, 1.4, -0.2])
VOCAB_SIZE = len(LOGITS)
PROMPT = [0, 5, 5]
OUTPUT = [5, 8, 8, 7]


@dataclass(frozen=True, slots=True)
class DrawnRow:
    """What the sampler reads of a request that stands at some position."""

    sampling: SamplingParams
    num_tokens: int = len(PROMPT) + len(OUTPUT)

    @property
    def tokens(self) -> list[int]:
        return PROMPT + OUTPUT

    @property
    def output_tokens(self) -> list[int]:
        return OUTPUT

    @property
    def num_output_tokens(self) -> int:
        return len(OUTPUT)


def draw(rows: list[DrawnRow]) -> Tensor:
    """One token per row, all rows with the same logits."""
    tokens = Sampler(EOS).sample(LOGITS.expand(len(rows), -1), rows)
    return torch.tensor(tokens)


def with_seeds(**fields: Any) -> list[DrawnRow]:
    """A row for each choice of some requests, as the router gives them their seeds."""
    seeds = (choice_seed(number // 8, number % 8) for number in range(NUM_DRAWS))
    return [DrawnRow(SamplingParams(seed=seed, **fields)) for seed in seeds]


def p_value(counts: Tensor, probabilities: Tensor) -> float:
    """How probable a worse fit is; 0 if something was drawn that cannot be."""
    possible = probabilities > 0
    if counts[~possible].sum() > 0:
        return 0.0
    expected = probabilities[possible] * counts.sum()
    assert expected.min() > 5, "too few draws for the test"
    chi2 = ((counts[possible] - expected) ** 2 / expected).sum()
    freedom = torch.tensor((int(possible.sum()) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, chi2.double() / 2))


def counts_of(tokens: Tensor) -> Tensor:
    return torch.bincount(tokens, minlength=VOCAB_SIZE).double()


# ---------------------------------------------------------------- by the book


def softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    return (logits.double() / temperature).softmax(-1)


def kept(probabilities: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep, probabilities, 0.0) / probabilities[keep].sum()


def top_k(k: int) -> Tensor:
    p = softmax(LOGITS)
    return kept(p, p >= p.sort(descending=True).values[k - 1])


def top_p(mass: float, p: Tensor) -> Tensor:
    """The fewest best tokens whose mass reaches `mass`."""
    ordered = p.sort(descending=True).values
    number = int((ordered.cumsum(-1) < mass).sum()) + 1
    return kept(p, p >= ordered[number - 1])


def min_p(share: float, temperature: float = 1.0) -> Tensor:
    p = softmax(LOGITS, temperature)
    return kept(p, p >= share * p.max())


def biased(bias: dict[int, float]) -> Tensor:
    return LOGITS + torch.tensor([bias.get(i, 0.0) for i in range(VOCAB_SIZE)])


def penalized(
    logits: Tensor, repetition: float = 1, presence: float = 0, frequency: float = 0
) -> Tensor:
    x = logits.clone().double()
    for token in set(PROMPT + OUTPUT):
        x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
    for token in set(OUTPUT):
        x[token] -= presence + frequency * OUTPUT.count(token)
    return softmax(x)


def without(tokens: set[int]) -> Tensor:
    p = softmax(LOGITS)
    return kept(p, torch.tensor([i not in tokens for i in range(VOCAB_SIZE)]))


CASES: dict[str, tuple[dict[str, Any], Tensor]] = {
    "plain": ({}, softmax(LOGITS)),
    "cold": ({"temperature": 0.6}, softmax(LOGITS, 0.6)),
    "hot": ({"temperature": 1.7}, softmax(LOGITS, 1.7)),
    "top_k": ({"top_k": 4}, top_k(4)),
    "top_p": ({"top_p": 0.75}, top_p(0.75, softmax(LOGITS))),
    "min_p": ({"min_p": 0.15}, min_p(0.15)),
    "all filters": (
        {"temperature": 1.3, "top_k": 6, "top_p": 0.9, "min_p": 0.1},
        top_p(0.9, kept(min_p(0.1, 1.3), min_p(0.1, 1.3) >= min_p(0.1, 1.3).sort().values[-6])),
    ),
    "logit_bias, then repetition_penalty": (
        {"logit_bias": {5: -1.5, 6: 2.0, 99: 5.0}, "repetition_penalty": 1.4},
        penalized(biased({5: -1.5, 6: 2.0}), repetition=1.4),
    ),
    "presence_penalty and frequency_penalty": (
        {"presence_penalty": 0.8, "frequency_penalty": -0.5},
        penalized(LOGITS, presence=0.8, frequency=-0.5),
    ),
    "min_tokens": ({"min_tokens": 9, "stop_token_ids": (5,)}, without({3, 5})),
}


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_the_distribution_of_each_parameter(name: str) -> None:
    fields, expected = CASES[name]
    assert p_value(counts_of(draw(with_seeds(**fields))), expected) > 1e-3


def test_an_error_of_a_few_percent_would_be_seen() -> None:
    counts = counts_of(draw(with_seeds()))
    nearly = (softmax(LOGITS, 1.06), softmax(biased({5: 0.07})), top_p(0.99, softmax(LOGITS)))
    for wrong in nearly:
        assert p_value(counts, wrong) < 1e-4


def test_positions_of_one_seed_draw_like_seeds() -> None:
    sampling = SamplingParams(seed=7)
    rows = [DrawnRow(sampling, position) for position in range(NUM_DRAWS)]
    assert p_value(counts_of(draw(rows)), softmax(LOGITS)) > 1e-3


def pairs(first: Tensor, second: Tensor) -> float:
    """How well pairs fit to two independent draws."""
    probabilities = softmax(LOGITS, 2.0)
    table = torch.bincount(first * VOCAB_SIZE + second, minlength=VOCAB_SIZE**2).double()
    return p_value(table, torch.outer(probabilities, probabilities).flatten())


def test_choices_and_positions_are_independent_of_each_other() -> None:
    def of_choice(choice: int, position: int) -> Tensor:
        seeds = (choice_seed(number, choice) for number in range(NUM_DRAWS))
        return draw([DrawnRow(SamplingParams(seed=s, temperature=2.0), position) for s in seeds])

    first = of_choice(0, 7)
    assert pairs(first, of_choice(1, 7)) > 1e-3
    assert pairs(first, of_choice(0, 8)) > 1e-3
    assert pairs(first, first.roll(1)) > 1e-3  # neighbouring seeds of clients
    assert pairs(first, first) == 0 or pairs(first, first) < 1e-9
