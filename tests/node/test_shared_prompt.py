"""Choices of one prompt share its blocks on both nodes, and each comes and goes by itself."""

from __future__ import annotations

import asyncio

import pytest

from engine.request import Request
from tests.engine.hash_runner import expected_output
from tests.node.pair import LAYOUT, Pair, pair
from wire.request_messages import Abort, Ack, HandoffDone
from wire.types import AttemptId, SamplingParams

N = 8
PROMPT = tuple(i % 20 + 1 for i in range(90))  # 22 full blocks and a half
IDS = [AttemptId(f"r-{i}", 1) for i in range(N)]


def sampling(choice: int, max_tokens: int = 8) -> SamplingParams:
    return SamplingParams(seed=choice, max_tokens=max_tokens, ignore_eos=True)


async def begin(p: Pair, choice: int, max_tokens: int = 8) -> None:
    """Prefill and hand over one choice; it then decodes, a step for each turn."""
    how = sampling(choice, max_tokens=max_tokens)
    p.start(p.grant(IDS[choice], PROMPT, how), IDS[choice], PROMPT, how)
    await p.hear(lambda: (p.prefill.work(), p.decode.link.updates(IDS[choice]))[1])


async def begin_all(p: Pair) -> int:
    """The first choice, then the others at once, as the router does it; blocks that all need."""
    await begin(p, 0)
    for choice in range(1, N):
        how = sampling(choice)
        p.start(p.grant(IDS[choice], PROMPT, how), IDS[choice], PROMPT, how)
    await p.hear(lambda: (p.prefill.work(), all(map(p.decode.link.updates, IDS)))[1])
    return p.decode.engine.block_counts().running


async def finish_all(p: Pair, choices: list[int]) -> None:
    for choice in choices:
        alone = Request("alone", list(PROMPT), len(PROMPT), sampling(choice), 200)
        assert await p.finish(IDS[choice]) == expected_output(alone, frozenset({0}))


def test_eight_choices_use_a_sixth_of_the_blocks_and_little_more_than_one_prefill() -> None:
    async def scenario() -> None:
        async with pair(prefill_blocks=64, decode_blocks=64, max_model_len=200) as p:
            assert await begin_all(p) * 6 <= N * -(-len(PROMPT) // LAYOUT.block_size)
            computed = sum(
                len(PROMPT) - (update.num_cached_tokens or 0)
                for id in IDS
                for update in p.prefill.link.updates(id)[:1]
            )
            assert computed <= 1.2 * len(PROMPT)
            await finish_all(p, list(range(N)))
            sent = [
                m.transfer.num_bytes for m in p.prefill.link.heard if isinstance(m, HandoffDone)
            ]
            assert len(sent) == N
            assert max(sorted(sent)[:-1]) * 20 < max(sent)  # followers send their last block alone

    asyncio.run(scenario())


def test_without_prefix_caching_each_choice_is_on_its_own() -> None:
    async def scenario() -> None:
        options = {"prefill_blocks": 256, "decode_blocks": 256, "max_model_len": 200}
        async with pair(**options, enable_prefix_caching=False) as p:
            assert await begin_all(p) >= N * (len(PROMPT) // LAYOUT.block_size)
            await finish_all(p, list(range(N)))

    asyncio.run(scenario())


@pytest.mark.parametrize("aborted", [[0], [3], [0, 1, 2, 3, 4, 5, 6]])
def test_an_aborted_choice_takes_nothing_from_the_others(aborted: list[int]) -> None:
    async def scenario() -> None:
        async with pair(prefill_blocks=64, decode_blocks=64, max_model_len=200) as p:
            before = await begin_all(p)
            for choice in aborted:
                p.both(Abort(IDS[choice]))
            p.turn()
            assert p.decode.engine.block_counts().running < before
            await finish_all(p, [i for i in range(N) if i not in aborted])
            for choice in aborted:
                p.decode.tell(Ack(IDS[choice]))

    asyncio.run(scenario())


def test_room_is_promised_to_each_choice_for_all_that_it_may_come_to_need() -> None:
    """With room for the prompt and two choices' growth, the third is refused, and fits later."""

    async def scenario() -> None:
        async with pair(prefill_blocks=64, decode_blocks=23 + 16 * 2, max_model_len=200) as p:
            await begin(p, 0, max_tokens=62)
            await begin(p, 1, max_tokens=62)
            how = sampling(2, max_tokens=62)
            assert type(p.reserve(IDS[2], PROMPT, how)).__name__ == "Refused"
            p.both(Abort(IDS[0]))
            p.turn()
            await begin(p, 2, max_tokens=62)
            for choice in (1, 2):
                assert len((await p.finish(IDS[choice]))[0]) == 62

    asyncio.run(scenario())
