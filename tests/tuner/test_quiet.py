"""Of repeats the quiet ones count, and how far they vary is told."""

from __future__ import annotations

import random

import pytest

from tuner.quiet import noisy_line, spread_of, undisturbed


def test_what_disturbs_only_adds() -> None:
    rng = random.Random(1)
    repeats = [1.0 + rng.choice([0.0, 0.01, rng.uniform(0.2, 2.0)]) for _ in range(50)]
    assert undisturbed(repeats) == pytest.approx(1.0, rel=0.01)
    assert undisturbed([3.0, 0.1, 1.0, 1.01, 1.02]) == 1.0, "and no lucky one"
    assert undisturbed([2.0]) == 2.0
    with pytest.raises(ValueError, match="nothing"):
        undisturbed([])


def test_the_spread_is_of_the_middle_half_of_the_middle_case() -> None:
    calm, wild = [1.0, 1.01, 1.02, 1.03, 9.0], [1.0, 2.0, 3.0, 4.0, 5.0]
    assert spread_of([calm]) == pytest.approx(0.02 / 1.02)
    assert spread_of([calm, calm, wild]) == spread_of([calm])
    assert spread_of([wild]) == pytest.approx(2 / 3)


def test_too_few_repeats_tell_no_spread() -> None:
    assert spread_of([]) == spread_of([[1.0, 5.0]]) == spread_of([[0.0, 0.0, 1.0]]) == 0.0


def test_a_machine_that_was_not_quiet_is_told() -> None:
    assert noisy_line({}) == noisy_line({"engine": 0.02, "fleet": 0.1}) == ""
    assert noisy_line({"engine": 0.02, "fleet": 0.234}) == (
        "the figures vary by 23% (engine 2%, fleet 23%): profile again on a quiet machine"
    )
