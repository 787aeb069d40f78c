"""Engines with heads that draft, of which a test can see what they drafted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.config import EngineConfig
from engine.drafting.control import Controller, Decoding
from engine.drafting.drafter import Ask
from engine.drafting.head_drafter import HeadDrafter
from engine.drafting.speculation import Speculation
from engine.engine import Engine
from engine.grammar import Grammars
from engine.kv_store import KVStore
from engine.model_info import LoadedModel
from engine.plan import StepResult
from engine.request import Request
from engine.runner import ModelRunner
from engine.sampler import Sampler
from wire.types import SamplingParams

BLOCK_SIZE = 4


class Watched(HeadDrafter):
    """Remembers what it drafted, and where its context began then."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[list[int], int, list[int]]] = []

    def propose(self, asks: Sequence[Ask]) -> list[Sequence[int]]:
        drafts = super().propose(asks)
        self.check_integrity()
        for ask, draft in zip(asks, drafts, strict=True):
            if draft:
                base = self._shadows[ask.request.request_id].base
                self.seen.append((list(ask.request.tokens), base, list(draft)))
        return drafts

    def of(self, request: Request) -> list[tuple[list[int], int, list[int]]]:
        """What it saw of a request."""
        prompt = request.tokens[: request.num_prompt_tokens]
        return [seen for seen in self.seen if seen[0][: len(prompt)] == prompt]


def make_drafter(
    method: str,
    head: LoadedModel,
    num_blocks: int = 200,
    kind: type[Watched] = Watched,
    *,
    packed: bool | None = None,
) -> Watched:
    runner = ModelRunner(head, KVStore(head.kv_layout(BLOCK_SIZE), num_blocks), packed=packed)
    sampler = Sampler(frozenset(head.eos_token_ids), head.ops)
    return kind(method, head.model, runner, sampler, num_blocks=num_blocks, block_size=BLOCK_SIZE)


class Resting(Controller):
    """Wants drafts when a test does."""

    rests = False

    def lengths(self, batch: Sequence[Decoding]) -> list[int]:
        lengths = super().lengths(batch)
        return [0 for _ in lengths] if self.rests else lengths


def make_engine(
    target: LoadedModel,
    drafter: HeadDrafter | None,
    controller: Controller | None = None,
    *,
    grammars: Grammars | None = None,
    packed: bool | None = None,
    **config: Any,
) -> Engine:
    controller = controller or Controller(4, adaptive=False)
    speculation = None
    if drafter is not None:
        speculation = Speculation(drafter, controller, vocab_size=target.vocab_size, clock=float)
    sizes = {"num_blocks": 200, "max_model_len": 120, "max_num_batched_tokens": 64, **config}
    store = KVStore(target.kv_layout(BLOCK_SIZE), sizes["num_blocks"])
    return Engine(
        EngineConfig(block_size=BLOCK_SIZE, max_num_seqs=8, **sizes),
        ModelRunner(target, store, packed=packed, reader=speculation),
        epoch=1,
        model_fingerprint="m",
        eos_token_ids=frozenset(target.eos_token_ids),
        ops=target.ops,
        grammars=grammars,
        speculation=speculation,
    )


def make_request(name: str, length: int, max_tokens: int = 30, **sampling: Any) -> Request:
    tokens = [(7 * i + length) % 90 + 3 for i in range(length)]
    fields = {"temperature": 0.0, "ignore_eos": True, "seed": length, **sampling}
    return Request(name, tokens, length, SamplingParams(max_tokens=max_tokens, **fields), 120)


def run_all(engine: Engine) -> list[StepResult]:
    results = []
    while engine.has_work():
        result = engine.step()
        assert result is not None
        assert result.speculation is None or not result.speculation.failure
        engine.check_integrity()
        results.append(result)
    return results


def num_drafted(results: Sequence[StepResult]) -> tuple[int, int]:
    """Draft tokens, and how many of them were right."""
    drafts = [d for r in results if r.speculation for d in r.speculation.drafts]
    return sum(d for d, _ in drafts), sum(a for _, a in drafts)
