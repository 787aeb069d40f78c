"""The latency model finds known coefficients again, follows changes and is bound to its origin."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from tuner.latency import (
    Fit,
    LatencyModel,
    Sample,
    StepWork,
    decode_sample,
    fit,
    prefill_sample,
    relative_errors,
)
from tuner.profile import FitError, Profile, load_profile, save_profile
from wire.errors import ConfigError
from wire.layout import KVLayout

MODEL = LatencyModel((0.01, 2e-4, 3e-8), (0.008, 5e-7, 4e-4), (0.0004, 2e-9))
PREFILLS = [
    StepWork(prefill_tokens=n, prefill_squares=(s + n) ** 2 - s**2)
    for n in (1, 16, 64, 256, 512, 2048)
    for s in (0, 100, 1000)
]
DECODES = [
    StepWork(decode_batch=b, decode_context=b * n)
    for b in (1, 2, 4, 8, 16)
    for n in (16, 500, 2000)
]


def test_fit_finds_the_coefficients() -> None:
    prefill = fit((prefill_sample(w, MODEL.step_s(w)) for w in PREFILLS), 3)
    decode = fit((decode_sample(w, MODEL.step_s(w)) for w in DECODES), 3)
    assert prefill == pytest.approx(MODEL.prefill, rel=1e-6)
    assert decode == pytest.approx(MODEL.decode, rel=1e-6)


def test_noise_counts_relative_to_the_time() -> None:
    """Short steps are as exact as long ones although their seconds weigh nothing."""
    rng = random.Random(1)
    samples = [prefill_sample(w, MODEL.step_s(w) * rng.uniform(0.9, 1.1)) for w in PREFILLS * 30]
    found = fit(samples, 3)
    clean = [prefill_sample(w, MODEL.step_s(w)) for w in PREFILLS]
    assert max(relative_errors(found, clean)) < 0.05


def test_samples_that_somebody_disturbed_do_not_bend_the_formula() -> None:
    """One in six takes two and a half times as long, and most of those are long ones."""
    rng = random.Random(2)
    samples = [
        prefill_sample(work, MODEL.step_s(work) * rng.uniform(0.98, 1.02) * (2.5 if slow else 1.0))
        for work in PREFILLS * 4
        for slow in [work.prefill_tokens >= 512 and rng.random() < 0.5]
    ]
    clean = [prefill_sample(work, MODEL.step_s(work)) for work in PREFILLS]
    assert max(relative_errors(fit(samples, 3), clean)) < 0.05
    plain = Fit(3)
    for sample in samples:
        plain.add(sample)
    assert max(relative_errors(plain.solve(), clean)) > 0.1


def test_no_coefficient_is_negative() -> None:
    falling = [Sample((1.0, x), 2.0 - 0.1 * x) for x in (1.0, 2.0, 3.0)]
    a, b = fit(falling, 2)
    assert b == 0
    assert 1.6 < a < 2.0


def test_nothing_to_fit() -> None:
    with pytest.raises(ValueError, match="no measurement"):
        Fit(2).solve()
    empty = Fit(2)
    empty.add(Sample((1.0, 1.0), 0.0))
    assert empty.num_samples == 0


def test_many_decode_steps_are_the_sum_of_single_ones() -> None:
    batch, context = 5, 700
    steps = [StepWork(decode_batch=batch, decode_context=context + i * batch) for i in range(9)]
    expected = sum(map(MODEL.step_s, steps))
    assert MODEL.decode_steps_s(9, batch, context) == pytest.approx(expected)


def test_mixed_steps_pay_one_constant() -> None:
    mixed = replace(DECODES[3], prefill_tokens=10, prefill_squares=100)
    alone = replace(mixed, decode_batch=0, decode_context=0)
    apart = MODEL.step_s(alone) + MODEL.step_s(DECODES[3])
    assert MODEL.step_s(mixed) == pytest.approx(apart - min(MODEL.prefill[0], MODEL.decode[0]))


PROFILE = Profile(
    model_name="m",
    model_fingerprint="abc",
    device="cpu x, 1 thread, float32",
    max_model_len=4096,
    layout=KVLayout(4, 2, 32, 16, "float32"),
    latency=MODEL,
    errors={"prefill": FitError(10, 0.01, 0.05)},
)


def test_profiles_survive_the_file(tmp_path: Path) -> None:
    save_profile(PROFILE, tmp_path / "p.json")
    assert load_profile(tmp_path / "p.json") == PROFILE


def test_a_foreign_profile_is_refused() -> None:
    PROFILE.check(model_fingerprint="abc", device=PROFILE.device)
    with pytest.raises(ConfigError, match="is of model m"):
        PROFILE.check(model_fingerprint="other", device=PROFILE.device)
    with pytest.raises(ConfigError, match="was made on"):
        PROFILE.check(model_fingerprint="abc", device="gpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "other"}, "is not a profile"),
        ({"latency": {}}, "damaged"),
        ({"latency": {"prefill": [1, 2], "decode": [1, 2, 3], "transfer": [1, 2]}}, "damaged"),
        ({"latency": {"prefill": [1, 2, -1], "decode": [1, 2, 3], "transfer": [1, 2]}}, "damaged"),
        ({"layout": {}}, "damaged"),
    ],
)
def test_damaged_profiles(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "p.json"
    save_profile(PROFILE, path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=message):
        load_profile(path)


def test_profiles_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load_profile(tmp_path / "absent")
    (tmp_path / "text").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        load_profile(tmp_path / "text")
