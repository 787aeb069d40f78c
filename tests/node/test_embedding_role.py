"""What a prefill node does with a request for an embedding."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.hash_runner import chain, hidden_state
from tests.node.pair import ID, PROMPT, Pair, expected, pair
from wire.request_messages import Abort, Embedding
from wire.types import AttemptId, Pooling, SamplingParams

ONE = SamplingParams(max_tokens=1)
OTHER = AttemptId("other", 1)
LONG = tuple(i % 20 + 1 for i in range(40))  # more than a step computes


def run(scenario: Callable[[Pair], Awaitable[None]], **settings: Any) -> None:
    async def body() -> None:
        async with pair(**settings) as p:
            await scenario(p)

    asyncio.run(body())


def embeddings(p: Pair, id: AttemptId = ID) -> list[Embedding]:
    return [m for m in p.prefill.link.heard if isinstance(m, Embedding) and m.id == id]


def check(told: Embedding, tokens: tuple[int, ...], pooling: Pooling) -> None:
    states = torch.stack([hidden_state(state) for state in chain(tokens)])
    one = states[-1] if pooling is Pooling.LAST else states.mean(0)
    vector = torch.from_numpy(np.frombuffer(told.vector, "<f4").copy())
    torch.testing.assert_close(vector, torch.nn.functional.normalize(one, dim=0))


@pytest.mark.parametrize("pooling", Pooling)
def test_it_is_told_once_and_nothing_stays(pooling: Pooling) -> None:
    async def scenario(p: Pair) -> None:
        for _ in range(2):  # asked twice is asked once
            p.start(None, tokens=LONG, sampling=ONE, pooling=pooling)
        await p.until(lambda: embeddings(p))
        [told] = embeddings(p)
        check(told, LONG, pooling)
        assert told.timing is not None
        assert told.timing.num_steps == 5
        assert p.prefill.balanced, "blocks are free at once"
        assert len(p.prefill.role._outbox) == 0
        assert p.prefill.link.updates() == []
        assert p.decode.link.heard == []

    run(scenario, max_num_batched_tokens=8)


def test_beside_a_handoff() -> None:
    async def scenario(p: Pair) -> None:
        p.start(p.grant())
        p.start(None, OTHER, LONG, ONE, pooling=Pooling.MEAN)
        assert await p.finish() == expected(PROMPT)
        await p.until(lambda: embeddings(p, OTHER))
        check(embeddings(p, OTHER)[0], LONG, Pooling.MEAN)

    run(scenario, max_num_batched_tokens=8)


def test_an_abort_in_the_middle() -> None:
    async def scenario(p: Pair) -> None:
        p.start(None, tokens=LONG, sampling=ONE, pooling=Pooling.MEAN)
        p.prefill.work()
        p.prefill.tell(Abort(ID))
        await p.until(lambda: p.prefill.balanced)
        assert p.prefill.role.num_attempts == 0
        assert embeddings(p) == []

    run(scenario, max_num_batched_tokens=8)


def test_a_model_that_tells_no_states_refuses() -> None:
    async def scenario(p: Pair) -> None:
        p.prefill.shell.built.model.can_embed = False  # type: ignore[misc]
        p.start(None, sampling=ONE, pooling=Pooling.LAST)
        [failure] = p.prefill.link.failures()
        assert not failure.retryable
        assert "no embeddings" in failure.message

    run(scenario)
