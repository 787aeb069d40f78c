"""Beam search through the router: one search answers all choices, and begins again elsewhere."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from router.dispatch import Dispatch
from router.effects import AttemptEnded, Found, HandedOver, Send
from router.phase import Phase
from tests.router.harness import alphabet, endless, eventually, router, saying
from tests.router.scripted_nodes import D1, P1, P2, Nodes, grant, start
from wire.request_messages import (
    Ack,
    BeamsFound,
    Granted,
    Prefill,
    Resend,
    Reserve,
    TokenUpdate,
)
from wire.types import BeamParams, EarlyStopping, FinishReason, Hypothesis

BEAM = BeamParams(2)
FOUND = (
    Hypothesis((5, 6), -1.0, FinishReason.STOP),
    Hypothesis((5, 7, 8), -2.0, FinishReason.LENGTH),
)


def searching(**fields: Any) -> Dispatch:
    dispatch = start(beam=BEAM, **fields)
    dispatch.place(0)
    dispatch.granted(D1, Granted(dispatch.id, grant(D1)), 0)
    return dispatch


def test_what_is_found_ends_the_choice_and_is_acknowledged() -> None:
    dispatch = searching()
    assert dispatch.tokens(P1, TokenUpdate(dispatch.id, 0, ()), 0) == []
    (effect,) = dispatch.tokens(D1, TokenUpdate(dispatch.id, 0, ()), 0)
    assert isinstance(effect, HandedOver)
    effects = dispatch.beams_found(D1, BeamsFound(dispatch.id, FOUND), 0)
    assert effects == [Send(D1, Ack(dispatch.id)), Found(FOUND)]
    assert dispatch.phase is Phase.ENDED
    assert dispatch.beams_found(D1, BeamsFound(dispatch.id, FOUND), 0) == []


def test_what_the_prefill_node_says_of_a_token_is_nothing() -> None:
    dispatch = searching()
    assert dispatch.tokens(P1, TokenUpdate(dispatch.id, 0, (5,)), 0) == []
    assert dispatch.log.tokens == []


def test_the_first_step_may_be_the_last() -> None:
    dispatch = searching()
    effects = dispatch.beams_found(P1, BeamsFound(dispatch.id, FOUND), 0)
    assert effects == [Send(P1, Ack(dispatch.id)), Found(FOUND)]


def test_a_search_begins_again_where_its_node_is_lost() -> None:
    dispatch = searching()
    dispatch.tokens(D1, TokenUpdate(dispatch.id, 0, ()), 0)
    effects = dispatch.node_lost(D1, 1)
    assert isinstance(effects[0], AttemptEnded)
    asked = [e.message for e in effects if isinstance(e, Send) and isinstance(e.message, Reserve)]
    assert [len(message.tokens) - message.num_prompt_tokens for message in asked] == [0]
    late = BeamsFound(asked[0].id, FOUND)
    assert dispatch.beams_found(D1, BeamsFound(dispatch.id, FOUND), 1) == []
    assert late.id == dispatch.id


def test_fewer_hypotheses_than_beams_are_a_divergence() -> None:
    dispatch = searching()
    effects = dispatch.beams_found(D1, BeamsFound(dispatch.id, FOUND[:1]), 0)
    ended = effects[0]
    assert isinstance(ended, AttemptEnded)
    assert ended.cause == "divergence"


def test_hypotheses_that_nobody_searched_for_are_ignored() -> None:
    dispatch = start(Nodes([P2]))
    dispatch.place(0)
    assert dispatch.beams_found(D1, BeamsFound(dispatch.id, FOUND), 0) == []


def test_after_long_silence_the_decode_node_is_asked() -> None:
    dispatch = searching()
    dispatch.tokens(D1, TokenUpdate(dispatch.id, 0, ()), 0)
    assert dispatch.tick(6) == [Send(D1, Resend(dispatch.id, 0))]


@pytest.mark.parametrize("path", ["completions", "chat"])
def test_one_search_answers_all_choices(path: str) -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            ask = harness.complete if path == "completions" else harness.chat
            answer = await ask(
                use_beam_search=True,
                n=3,
                max_tokens=5,
                length_penalty=0.5,
                early_stopping="never",
                temperature=0,
            )
            choices = answer.json["choices"]
            told = [c.get("text") or c["message"]["content"] for c in choices]
            assert told == [letter + alphabet(5)[1:] for letter in "ABC"]
            assert [c["index"] for c in choices] == [0, 1, 2]
            assert [c["finish_reason"] for c in choices] == ["length"] * 3
            assert answer.json["usage"]["completion_tokens"] == 15
            (reserve,) = harness.sent(Reserve)
            assert reserve.sampling.beam == BeamParams(3, 0.5, EarlyStopping.NEVER)
            await eventually(lambda: len(harness.sent(Ack)) == 1)
            metrics = (await harness.get("/metrics")).body.decode()
            assert 'vllm:generation_tokens_total{model_name="stub"} 15.0' in metrics

    asyncio.run(scenario())


def test_more_beams_than_choices_and_several_prompts() -> None:
    async def scenario() -> None:
        async with router(saying("hello")) as harness:
            answer = await harness.complete(
                prompt=["a", "b"], use_beam_search=True, n=2, best_of=4, max_tokens=9
            )
            assert [c["text"] for c in answer.json["choices"]] == ["Aello", "Bello"] * 2
            assert {c["finish_reason"] for c in answer.json["choices"]} == {"stop"}
            assert [m.sampling.beam for m in harness.sent(Reserve)] == [BeamParams(4)] * 2

    asyncio.run(scenario())


def test_a_search_for_one_token_reserves_nothing() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            answer = await harness.complete(use_beam_search=True, n=2, max_tokens=1)
            assert [c["text"] for c in answer.json["choices"]] == ["A", "B"]
            assert harness.sent(Reserve) == []
            assert len(harness.sent(Prefill)) == 1

    asyncio.run(scenario())
