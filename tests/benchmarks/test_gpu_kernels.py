"""The figures of the kernels count what they say; small, and interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu import kernels
from benchmarks.gpu.kernels import Rate, Shape

SMALL = Shape(num_layers=2, query_heads=2, kv_heads=1, head_dim=16, dtype=torch.float32)


@pytest.fixture(autouse=True)
def _once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "REPEATS", 1)
    monkeypatch.setattr(kernels, "WARM_UPS", 0)


def test_what_is_counted() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert kernels.device_copy(device, num_bytes=1000).amount == 2000
    decode = kernels.paged_decode(device, batch=2, context=32, shape=SMALL)
    assert decode.amount == 2 * 2 * 32 * 16 * 4  # keys and values, requests, tokens, dims, bytes
    prefill = kernels.prefill_attention(device, tokens=16, shape=SMALL)
    assert prefill.amount == 4 * 16 * 16 * 2 * 16 / 2
    gathered, scattered = kernels.gather_and_scatter(device, num_units=2, shape=SMALL)
    assert gathered.amount == scattered.amount == 2 * (2 * 2 * 16 * 16) * 4
    assert kernels.digest(device, num_units=2, num_bytes=2048).amount == 4096
    assert min(decode.seconds, prefill.seconds, gathered.seconds, scattered.seconds) > 0
    assert Rate(10, 4).per_second == 2.5
