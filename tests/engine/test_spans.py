"""A recorder sees every stage of a step and every kind of module, and changes no result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.kv_store import KVStore
from engine.loader import load_model
from engine.model_info import LoadedModel
from engine.request import Request
from engine.runner import ModelRunner
from engine.spans import MAX_SPANS, Recorder, no_spans
from wire.types import SamplingParams

STAGES = {"schedule", "batch", "forward", "sample", "read", "commit"}


def generate(loaded: LoadedModel, recorder: Recorder | None) -> list[int]:
    """Five tokens after a prompt of eight."""
    spans = recorder or no_spans
    if recorder is not None:
        loaded = replace(loaded, ops=recorder.watched(loaded.ops))
    config = EngineConfig(block_size=4, num_blocks=8, max_model_len=32)
    engine = Engine(
        config,
        ModelRunner(loaded, KVStore(loaded.kv_layout(4), 8), spans),
        epoch=1,
        model_fingerprint="m",
        eos_token_ids=frozenset(),
        ops=loaded.ops,
        spans=spans,
    )
    request = Request("r", list(range(8)), 8, SamplingParams(max_tokens=5, temperature=0.0), 32)
    engine.add(request)
    while engine.has_work():
        engine.step()
    return request.tokens


@pytest.mark.parametrize(
    ("fusing", "kinds"),
    [
        (True, {"linears", "attention", "norm", "rotary, cache write", "activation", "embedding"}),
        (False, {"linears", "attention", "norm", "activation", "embedding"}),
    ],
)
def test_stages_and_kinds_of_modules_are_seen(
    make_model: Callable[[str], Path], fusing: bool, kinds: set[str]
) -> None:
    loaded = load_model(make_model("llama"), dtype="float32", fusing=fusing)
    ticks = count()
    recorder = Recorder(lambda: float(next(ticks)))
    with recorder.modules():
        watched = generate(loaded, recorder)
    assert watched == generate(loaded, None)
    names = [span.name for span in recorder.spans]
    assert STAGES | kinds <= set(names)
    assert {names.count(stage) for stage in STAGES} == {5}
    assert names.count("attention") == 5 * loaded.num_layers
    forwards = [span for span in recorder.spans if span.name == "forward"]
    inside = [span for span in recorder.spans if span.name == "linears"]
    for span in inside:
        assert any(f.start < span.start < f.start + f.seconds for f in forwards)


def test_the_hooks_are_gone_afterwards() -> None:
    recorder = Recorder(lambda: 0.0)
    layer = torch.nn.Linear(2, 2)
    with recorder.modules():
        layer(torch.zeros(1, 2))
    layer(torch.zeros(1, 2))
    assert [span.name for span in recorder.spans] == ["linears"]


def test_a_recorder_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_SPANS
    monkeypatch.setattr("engine.spans.MAX_SPANS", 3)
    recorder = Recorder(lambda: 0.0)
    for _ in range(9):
        with recorder("x"):
            pass
    assert len(recorder.spans) == 3
