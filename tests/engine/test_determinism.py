"""A request's logits have the same bits in any batch, chunk and history, through the engine."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine import determinism
from engine.config import EngineConfig
from engine.determinism import why_not_deterministic
from engine.engine import Engine
from engine.kv_store import KVStore
from engine.loader import load_model
from engine.model_info import LoadedModel
from engine.packed_linear import CompiledLinear, Linears
from engine.request import Request
from engine.runner import ModelRunner
from kernels.cpu_ops import load_cpu_ops
from kernels.ops import TorchOps
from tests.engine.watch import Watch
from wire.errors import ConfigError
from wire.types import SamplingParams

MakeModel = Callable[[str], Path]
BLOCK_SIZE = 8
MAX_TOKENS = 6
VOCABULARY = 97

pytestmark = pytest.mark.skipif(
    load_cpu_ops() is None,
    reason="needs the compiled kernels",
)


class Bench:
    """An engine over one loaded model."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        chunk: int = 256,
        num_blocks: int = 1200,
        kv_overcommit: float = 1.0,
        caching: bool = False,
    ) -> None:
        config = EngineConfig(
            block_size=BLOCK_SIZE,
            num_blocks=num_blocks,
            max_model_len=128,
            max_num_seqs=32,
            max_num_batched_tokens=max(chunk, 64),
            long_prefill_token_threshold=chunk,
            kv_overcommit=kv_overcommit,
            enable_prefix_caching=caching,
        )
        store = KVStore(loaded.kv_layout(BLOCK_SIZE), num_blocks)
        self.watch = Watch(ModelRunner(loaded, store))
        self.engine = Engine(
            config,
            self.watch,
            epoch=1,
            model_fingerprint="m",
            eos_token_ids=frozenset(),
            ops=loaded.ops,
        )
        self.num_preempted = 0

    def answer(self, *prompts: list[int]) -> list[dict[int, Tensor]]:
        """Each prompt's logits by number of tokens, all prompts asked at once."""
        names = [f"{i}" for i in range(len(prompts))]
        self.watch.logits.clear()
        for name, prompt in zip(names, prompts, strict=True):
            sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
            limit = len(prompt) + MAX_TOKENS
            self.engine.add(Request(name, list(prompt), len(prompt), sampling, limit))
        while self.engine.has_work():
            result = self.engine.step()
            assert result is not None
            self.num_preempted += result.num_preempted
        found = self.watch.logits
        return [{n: row for (who, n), row in found.items() if who == name} for name in names]


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 100))] for _ in range(count)]


def assert_same_bits(expected: dict[int, Tensor], found: dict[int, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert len(found) == MAX_TOKENS
    for num_tokens, row in expected.items():
        assert torch.equal(row, found[num_tokens]), f"after {num_tokens} tokens"


@pytest.fixture(scope="module", params=["llama", "qwen3", "mistral", "phi3"])
def loaded(request: pytest.FixtureRequest, make_model: MakeModel) -> LoadedModel:
    return load_model(make_model(request.param), dtype="float32", deterministic=True)


@pytest.fixture(scope="module")
def alone(loaded: LoadedModel) -> list[dict[int, Tensor]]:
    """Each prompt's logits when nothing else is there and it is computed in one piece."""
    return [Bench(loaded).answer(prompt)[0] for prompt in prompts(32)]


@pytest.mark.parametrize("batch", [2, 3, 5, 8, 13, 16, 31, 32])
def test_batches(loaded: LoadedModel, alone: list[dict[int, Tensor]], batch: int) -> None:
    for expected, found in zip(alone, Bench(loaded).answer(*prompts(batch)), strict=False):
        assert_same_bits(expected, found)


@pytest.mark.parametrize("chunk", [1, 2, 7, 16, 33, 64, 100, 256])
def test_chunks(loaded: LoadedModel, alone: list[dict[int, Tensor]], chunk: int) -> None:
    for expected, found in zip(alone, Bench(loaded, chunk=chunk).answer(*prompts(9)), strict=False):
        assert_same_bits(expected, found)


def test_prefix_hits(loaded: LoadedModel, alone: list[dict[int, Tensor]]) -> None:
    bench = Bench(loaded, caching=True)
    longest = max(range(32), key=lambda i: len(prompts(32)[i]))
    prompt = prompts(32)[longest]
    bench.answer(prompt[:70])
    assert len(bench.engine.cached_hashes()) >= 8
    [found] = bench.answer(prompt)
    assert_same_bits(alone[longest], found)


def test_preemptions(loaded: LoadedModel, alone: list[dict[int, Tensor]]) -> None:
    bench = Bench(loaded, num_blocks=24, kv_overcommit=4.0)
    for expected, found in zip(alone, bench.answer(*prompts(16)), strict=False):
        assert_same_bits(expected, found)
    assert bench.num_preempted


# ---------------------------------------------------------------- where it does not hold


@pytest.mark.parametrize(
    ("name", "fusing", "reason"),
    [("gpt2", True, "not run as a fused decoder"), ("llama", False, "switched off")],
)
def test_what_is_not_fused_is_refused(
    make_model: MakeModel, name: str, fusing: bool, reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"--deterministic.*{reason}"):
        load_model(make_model(name), dtype="float32", fusing=fusing, deterministic=True)
    loaded = load_model(make_model(name), dtype="float32", fusing=fusing)
    assert "deterministic" not in loaded.numerics


def test_torchs_attention_is_not_deterministic(loaded: LoadedModel) -> None:
    heads = {"head_dim": loaded.head_dim, "num_kv_heads": loaded.num_kv_heads}
    assert "attention by torch" in why_not_deterministic(loaded.model, TorchOps(), **heads)
    assert not why_not_deterministic(loaded.model, loaded.ops, **heads)
    assert loaded.numerics.endswith("+deterministic")


def test_a_linear_that_depends_on_its_rows_is_found(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = CompiledLinear.forward

    def forward(self: CompiledLinear, x: Tensor) -> Tensor:
        y = original(self, x)
        return y * (1 + 1e-6) if len(x) == determinism.PROBED_ROWS[-1] else y

    monkeypatch.setattr(CompiledLinear, "forward", forward)
    heads = {"head_dim": loaded.head_dim, "num_kv_heads": loaded.num_kv_heads}
    assert "differs at 200 rows" in why_not_deterministic(loaded.model, loaded.ops, **heads)


def test_linears_that_multiply_row_by_row_need_no_packing(
    make_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where a kernel of its own multiplies."""
    monkeypatch.setattr(Linears, "can_pack", lambda self, weight: False)
    loaded = load_model(make_model("llama"), dtype="float32")
    assert loaded.fusions.decoder
    judge = partial(
        why_not_deterministic,
        loaded.model,
        loaded.ops,
        head_dim=loaded.head_dim,
        num_kv_heads=loaded.num_kv_heads,
    )
    assert judge() == "its linears cannot be packed here"

    def row_by_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.stack([F.linear(row, weight, bias) for row in x])

    def by_count(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias) * (1 + 1e-6 * len(x))

    for multiply, why in ((row_by_row, ""), (by_count, "a linear of ")):
        for layer in loaded.model.linears():
            layer.make_invariant(multiply)
        assert judge().startswith(why)
        assert bool(judge()) == bool(why)
