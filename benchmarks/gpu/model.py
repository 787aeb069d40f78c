"""A fused decoder with random weights, made on the device, and engines around it.

Contexts are adopted as if another node had computed them: the pool is filled with noise once, and
no prompt has to be computed before decoding can be measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.make_model import Shape
from engine.config import EngineConfig
from engine.engine import Engine
from engine.fused_decoder import FusedAttention, FusedDecoder, FusedLayer, FusedMLP, Norm
from engine.graphs import CudaCapture, EagerCapture
from engine.kv_store import KVStore
from engine.packed_linear import PlainLinear
from engine.request import Request
from engine.runner import ModelRunner
from kernels.ops import LayerOps, TorchOps
from wire.layout import KVLayout
from wire.types import SamplingParams

LLAMA_8B = Shape(
    hidden_size=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    intermediate_size=14_336,
    vocab_size=128_256,
    max_positions=16_384,
    tied=False,
)
TINY = Shape(
    hidden_size=64,
    layers=2,
    heads=4,
    kv_heads=2,
    intermediate_size=96,
    vocab_size=200,
    max_positions=512,
    tied=False,
)


@dataclass(frozen=True, slots=True)
class Target:
    """What is measured: where, in which type, by which operations."""

    device: torch.device
    dtype: torch.dtype
    shape: Shape
    ops: LayerOps
    block_size: int = 16

    @classmethod
    def of(cls, device: str, shape: Shape) -> Target:
        """As a node chooses on such a device."""
        where = torch.device(device)
        if where.type == "cpu":
            return cls(where, torch.float32, shape, TorchOps())
        from kernels.triton_ops import TritonOps

        return cls(where, torch.bfloat16, shape, TritonOps())

    @property
    def has_kernels(self) -> bool:
        """Whether Triton computes."""
        return not isinstance(self.ops, TorchOps)

    @property
    def head_dim(self) -> int:
        return self.shape.hidden_size // self.shape.heads

    @property
    def layout(self) -> KVLayout:
        shape, dtype = self.shape, str(self.dtype).removeprefix("torch.")
        return KVLayout(shape.layers, shape.kv_heads, self.head_dim, self.block_size, dtype)

    def noise(self, *size: int) -> Tensor:
        return torch.randn(size, device=self.device, dtype=self.dtype)


def random_decoder(target: Target) -> FusedDecoder:
    """Weights that keep the variance from layer to layer."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    shape, dim = target.shape, target.head_dim
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.max_positions,
    )
    embedding = nn.Embedding(1, 1)
    embedding.weight = nn.Parameter(target.noise(shape.vocab_size, shape.hidden_size), False)
    return FusedDecoder(
        embedding=embedding,
        rotary=LlamaRotaryEmbedding(config).to(target.device),
        layers=[_random_layer(target, index, dim) for index in range(shape.layers)],
        norm=_norm(target),
        head=_linear(target, shape.vocab_size, shape.hidden_size),
    ).eval()


def _random_layer(target: Target, index: int, dim: int) -> FusedLayer:
    shape = target.shape
    width = (shape.heads + 2 * shape.kv_heads) * dim
    attention = FusedAttention(
        qkv=_linear(target, width, shape.hidden_size),
        output=_linear(target, shape.hidden_size, shape.heads * dim),
        num_query_heads=shape.heads,
        head_dim=dim,
        scale=dim**-0.5,
        window=None,
        head_norms=None,
    )
    mlp = FusedMLP(
        _linear(target, 2 * shape.intermediate_size, shape.hidden_size),
        _linear(target, shape.hidden_size, shape.intermediate_size),
    )
    return FusedLayer(index, _norm(target), attention, _norm(target), mlp)


def _linear(target: Target, out_features: int, in_features: int) -> Any:
    return PlainLinear(target.noise(out_features, in_features) * in_features**-0.5, None)


def _norm(target: Target) -> Norm:
    return Norm(
        torch.ones(target.shape.hidden_size, device=target.device, dtype=target.dtype), 1e-5
    )


def num_weights(shape: Shape) -> int:
    """Of all linears: what a step reads. The embedding's rows are next to nothing."""
    dim = shape.hidden_size // shape.heads
    attention = (2 * shape.heads + 2 * shape.kv_heads) * dim * shape.hidden_size
    per_layer = attention + 3 * shape.hidden_size * shape.intermediate_size
    return shape.layers * per_layer + shape.vocab_size * shape.hidden_size


class Node:
    """One pool, one runner with graphs, and an engine per case."""

    def __init__(
        self, target: Target, num_blocks: int, rungs: tuple[int, ...], max_len: int
    ) -> None:
        self.target = target
        self._num_blocks, self._max_len, self._max_seqs = num_blocks, max_len, max(rungs)
        self.store = KVStore(target.layout, num_blocks + 1, target.device)
        for block in self.store.blocks:
            block.normal_()
        loaded = SimpleNamespace(
            model=random_decoder(target), ops=target.ops, vocab_size=target.shape.vocab_size
        )
        self.runner = ModelRunner(cast(Any, loaded), self.store, packed=True)
        on_gpu = target.device.type == "cuda"
        capture = CudaCapture(target.device) if on_gpu else EagerCapture()
        self.runner.capture(rungs, max_len, capture, scratch=num_blocks)

    def engine(self, max_num_batched_tokens: int, *, lookahead: bool = False) -> Engine:
        config = EngineConfig(
            block_size=self.target.block_size,
            num_blocks=self._num_blocks,
            max_model_len=self._max_len,
            max_num_seqs=self._max_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=False,
            lookahead=lookahead,
        )
        return Engine(
            config,
            self.runner,
            epoch=1,
            model_fingerprint="bench",
            eos_token_ids=frozenset(),
            ops=self.target.ops,
        )

    def decoding(self, batch: int, context: int, steps: int, *, lookahead: bool = False) -> Engine:
        """An engine whose requests have `context` tokens behind them."""
        limit = max(batch, self._max_seqs)
        engine = self.engine(max_num_batched_tokens=limit, lookahead=lookahead)
        for number in range(batch):
            request = self.request(number, context, steps)
            reservation = engine.reserve(request.tokens, request.max_num_tokens)
            decoding = replace(request, tokens=[*request.tokens, number])
            engine.adopt(reservation.id, decoding)
        return engine

    def request(self, number: int, num_tokens: int, steps: int) -> Request:
        vocabulary = self.target.shape.vocab_size
        tokens = [(7919 * (number + 1) * (i + 1)) % vocabulary for i in range(num_tokens)]
        sampling = SamplingParams(max_tokens=steps + 1, temperature=0.0, ignore_eos=True)
        return Request(str(number), tokens, num_tokens, sampling, num_tokens + steps + 1)
