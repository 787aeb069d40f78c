"""Workloads and arrival times are functions of their seed."""

from __future__ import annotations

from itertools import islice, pairwise
from statistics import mean

import pytest

from tuner.arrivals import Arrival, arrival_offsets
from tuner.workload import (
    WORDS,
    PromptKind,
    RequestSpec,
    Span,
    Workload,
    requests,
)


def first(workload: Workload, number: int) -> list[RequestSpec]:
    return list(islice(requests(workload), number))


def test_span_parses_fixed_and_range() -> None:
    assert Span.parse("7") == Span(7, 7)
    assert Span.parse("7:9") == Span(7, 9)
    assert str(Span(7, 9)) == "7:9"
    assert str(Span(7, 7)) == "7"


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "9:7", "3:", "1:2:3"])
def test_span_refuses(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|invalid literal"):
        Span.parse(text)


def test_same_seed_same_requests() -> None:
    workload = Workload(Span(1, 50), Span(1, 9), seed=3)
    assert first(workload, 20) == first(workload, 20)
    assert first(workload, 5) == first(workload, 20)[:5]
    assert first(workload, 20) != first(Workload(Span(1, 50), Span(1, 9), seed=4), 20)


def test_lengths_and_ids_stay_in_their_ranges_and_reach_both_ends() -> None:
    specs = first(Workload(Span(2, 4), Span(5, 6), token_ids=Span(100, 101)), 200)
    assert {len(spec.prompt) for spec in specs} == {2, 3, 4}
    assert {spec.output_len for spec in specs} == {5, 6}
    assert {token for spec in specs for token in spec.prompt} == {100, 101}
    assert [spec.index for spec in specs] == list(range(200))


def test_word_prompts() -> None:
    (spec,) = first(Workload(Span(6, 6), Span(1, 1), PromptKind.WORDS), 1)
    assert isinstance(spec.prompt, str)
    assert len(spec.prompt.split()) == 6
    assert set(spec.prompt.split()) <= set(WORDS)


def test_fixed_arrivals() -> None:
    assert list(islice(arrival_offsets(4.0, Arrival.FIXED, 0), 4)) == [0, 0.25, 0.5, 0.75]


def test_poisson_arrivals() -> None:
    offsets = list(islice(arrival_offsets(4.0, Arrival.POISSON, 1), 4001))
    gaps = [after - before for before, after in pairwise(offsets)]
    assert offsets[0] == 0
    assert offsets == list(islice(arrival_offsets(4.0, Arrival.POISSON, 1), 4001))
    assert mean(gaps) == pytest.approx(0.25, rel=0.05)
    assert mean(gap * gap for gap in gaps) == pytest.approx(2 * 0.25**2, rel=0.15)
