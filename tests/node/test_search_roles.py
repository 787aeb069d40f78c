"""Beam searches over both roles: handed over once, found as by one engine alone, never leaked."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from engine.beam_search import BeamSearch
from tests.engine.hash_runner import chain, logits_after
from tests.node.pair import ID, PROMPT, Pair, pair
from wire.request_messages import Abort, Ack, BeamsFound, Refused, Resend
from wire.types import AttemptId, BeamParams, Hypothesis, SamplingParams

SEARCH = SamplingParams(max_tokens=8, temperature=0, beam=BeamParams(3, 0.6))
LATER = AttemptId(ID.request, 2)


def alone(sampling: SamplingParams, prompt: tuple[int, ...] = PROMPT) -> list[Hypothesis]:
    assert sampling.beam is not None
    ends = frozenset() if sampling.ignore_eos else frozenset({0})
    search = BeamSearch(sampling.beam, max_tokens=sampling.max_tokens, end_tokens=ends)
    while not search.over:
        states = [chain([*prompt, *beam.tokens])[-1] for beam in search.running]
        rows = [logits_after(state).log_softmax(-1).tolist() for state in states]
        search.advance([list(enumerate(row)) for row in rows])
    return search.finished


def found(p: Pair, id: AttemptId = ID) -> BeamsFound | None:
    heard = [*p.decode.link.heard, *p.prefill.link.heard]
    messages = [m for m in heard if isinstance(m, BeamsFound) and m.id == id]
    return messages[-1] if messages else None


def check(message: BeamsFound | None, sampling: SamplingParams) -> None:
    assert message is not None
    expected = alone(sampling)
    assert [h.tokens for h in message.hypotheses] == [h.tokens for h in expected]
    assert [h.finish for h in message.hypotheses] == [h.finish for h in expected]
    assert [h.score for h in message.hypotheses] == pytest.approx([h.score for h in expected])


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_search_goes_over_and_is_told_once(ignore_eos: bool) -> None:
    async def scenario() -> None:
        async with pair(decode_blocks=40) as p:
            sampling = replace(SEARCH, ignore_eos=ignore_eos)
            p.start(p.grant(sampling=sampling), sampling=sampling)
            await p.until(lambda: found(p))
            check(found(p), sampling)
            assert p.decode.link.output() == p.prefill.link.output() == ([], None)
            assert p.decode.role.num_attempts == 0
            num_heard = len(p.decode.link.heard)
            p.decode.tell(Resend(ID, 0))  # the answer got lost
            assert p.decode.link.heard[num_heard:] == [found(p)]
            p.decode.tell(Ack(ID))
            assert len(p.decode.role._outbox) == 0

    asyncio.run(scenario())


def test_a_search_for_one_token_ends_on_the_prefill_node() -> None:
    async def scenario() -> None:
        async with pair() as p:
            sampling = replace(SEARCH, max_tokens=1)
            p.start(None, sampling=sampling)
            await p.until(lambda: found(p))
            check(found(p), sampling)
            p.prefill.tell(Ack(ID))

    asyncio.run(scenario())


def test_one_beam_that_ends_at_once_gives_its_lease_back() -> None:
    async def scenario() -> None:
        async with pair() as p:
            ends = int(logits_after(chain(PROMPT)[-1]).argmax())
            sampling = replace(SEARCH, beam=BeamParams(1), stop_token_ids=(ends,))
            p.start(p.grant(sampling=sampling), sampling=sampling)
            await p.until(lambda: found(p))
            message = found(p)
            assert message is not None
            assert [h.tokens for h in message.hypotheses] == [(ends,)]
            await p.until(lambda: p.decode.balanced)

    asyncio.run(scenario())


@pytest.mark.parametrize("turns", [0, 1, 2, 4, 7])
def test_an_abort_frees_the_beams(turns: int) -> None:
    async def scenario() -> None:
        async with pair(decode_blocks=40) as p:
            sampling = replace(SEARCH, ignore_eos=True)
            p.start(p.grant(sampling=sampling), sampling=sampling)
            await p.until(lambda: p.decode.role._running or turns == 0)
            for _ in range(turns):
                p.turn()
            p.both(Abort(ID))

    asyncio.run(scenario())


def test_a_later_attempt_searches_anew_beside_what_is_left_of_the_first() -> None:
    async def scenario() -> None:
        async with pair(decode_blocks=40) as p:
            p.start(p.grant(sampling=SEARCH), sampling=SEARCH)
            await p.until(lambda: p.decode.role._running)
            p.turn()
            p.start(p.grant(LATER, sampling=SEARCH), LATER, sampling=SEARCH)
            await p.until(lambda: found(p, LATER))
            check(found(p, LATER), SEARCH)
            assert found(p) is None
            p.decode.tell(Ack(LATER))

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("sampling", "cause"),
    [
        (replace(SEARCH, logprobs=1), "invalid"),
        (replace(SEARCH, grammar="x"), "invalid"),
        (replace(SEARCH, stop_token_ids=tuple(range(130))), "invalid"),
        (replace(SEARCH, beam=BeamParams(9), max_tokens=40), "too_long"),
    ],
)
def test_what_cannot_be_searched_for_is_refused(sampling: SamplingParams, cause: str) -> None:
    async def scenario() -> None:
        async with pair() as p:
            answer = p.reserve(sampling=sampling)
            assert isinstance(answer, Refused)
            assert answer.cause == cause

    asyncio.run(scenario())


def test_more_beams_than_seats_are_refused() -> None:
    async def scenario() -> None:
        async with pair(max_num_batched_tokens=2) as p:
            answer = p.reserve(sampling=SEARCH)
            assert isinstance(answer, Refused)
            assert (answer.cause, "beams" in answer.message) == ("invalid", True)

    asyncio.run(scenario())
