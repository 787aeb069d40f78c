"""The dispatch machine where one node serves a choice alone, and changes from and to handoffs."""

from __future__ import annotations

import pytest

from router.breaker import Pair
from router.dispatch import Dispatch
from router.effects import AttemptEnded, Failed, Found, HandedOver, NeedsCapacity, Output, Taken
from router.phase import Phase
from tests.router.scripted_nodes import D1, LENGTH, M1, M2, P1, PROMPT, Nodes, grant, start
from tests.router.test_dispatch import aborted, failed, one, update
from wire.request_messages import (
    Ack,
    BeamsFound,
    Generate,
    Granted,
    Prefill,
    Refused,
    Resend,
    Reserve,
    TokenUpdate,
)
from wire.types import BeamParams, FinishReason, Hypothesis


def only_mixed() -> Nodes:
    return Nodes(prefill=[], decode=[], mixed=[M1, M2])


def offered(nodes: Nodes | None = None) -> Dispatch:
    dispatch = start(nodes or only_mixed())
    dispatch.place(0)
    assert dispatch.phase is Phase.OFFERING
    return dispatch


def generating(nodes: Nodes | None = None) -> Dispatch:
    dispatch = offered(nodes)
    assert dispatch.tokens(M1, update(dispatch, 0), 0) == [Taken()]
    assert dispatch.phase is Phase.GENERATING
    return dispatch


def test_the_way_without_trouble() -> None:
    dispatch = start(only_mixed())
    to, message = one(dispatch.place(0), Generate)
    assert (to, message.tokens, message.num_prompt_tokens) == (M1, PROMPT, 3)
    assert dispatch.tokens(M1, update(dispatch, 0), 0) == [Taken()]
    assert not dispatch.shares_prompt
    assert dispatch.tokens(M1, update(dispatch, 0, 50), 0) == [Output((50,), None)]
    assert dispatch.shares_prompt
    effects = dispatch.tokens(M1, update(dispatch, 1, 51, finish=LENGTH), 0)
    assert one(effects, Ack)[0] == M1
    assert effects[-1] == Output((51,), LENGTH)
    assert dispatch.phase is Phase.ENDED


def test_a_first_word_that_got_lost_is_not_missed() -> None:
    dispatch = offered()
    effects = dispatch.tokens(M1, update(dispatch, 0, 50, 51), 0)
    assert effects == [Taken(), Output((50, 51), None)]


def test_a_refusal_goes_to_the_next_node_then_to_the_queue() -> None:
    dispatch = offered()
    refusal = Refused(dispatch.id, "capacity", "full", 3.0)
    assert one(dispatch.refused(M1, refusal, 0), Generate)[0] == M2
    assert dispatch.refused(M1, refusal, 0) == []  # not whom we asked
    assert dispatch.tokens(M1, update(dispatch, 0, 50), 0) == []
    assert dispatch.refused(M2, refusal, 0) == [NeedsCapacity(3.0)]
    assert dispatch.phase is Phase.WAITING
    assert one(dispatch.place(1), Generate)[1].id.attempt == 2


def test_a_refusal_may_lead_to_a_handoff() -> None:
    nodes = only_mixed()
    dispatch = offered(nodes)
    nodes.prefill, nodes.decode = [P1], [D1]
    to, reserve = one(dispatch.refused(M1, Refused(dispatch.id, "draining", "why"), 0), Reserve)
    assert (to, reserve.prefill, reserve.id) == (D1, P1, dispatch.id)
    to, _ = one(dispatch.granted(D1, Granted(dispatch.id, grant(D1)), 0), Prefill)
    assert to == P1
    assert dispatch.tokens(M1, update(dispatch, 0, 50), 0) == []


def test_what_is_refused_for_good_is_a_bad_request() -> None:
    dispatch = offered()
    assert one(dispatch.refused(M1, Refused(dispatch.id, "too_long", "no"), 0), Generate)[0] == M2
    *_, effect = dispatch.refused(M2, Refused(dispatch.id, "too_long", "no"), 0)
    assert isinstance(effect, Failed)
    assert (effect.error.status, effect.error.code) == (400, "context_length_exceeded")


def test_a_grant_that_nobody_asked_for_is_none() -> None:
    dispatch = offered()
    assert dispatch.granted(M1, Granted(dispatch.id, grant(M1)), 0) == []
    assert dispatch.phase is Phase.OFFERING


def test_an_unanswered_offer_goes_elsewhere() -> None:
    dispatch = offered()
    assert dispatch.tick(1.9) == []
    effects = dispatch.tick(2.1)
    assert effects[0] == AttemptEnded("reserve_timeout", None)
    assert aborted(effects) == {(M1, 1)}
    assert one(effects, Generate)[0] == M2


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_a_dead_node_is_replaced_and_the_text_goes_on(num_tokens: int) -> None:
    nodes = only_mixed()
    dispatch = generating(nodes)
    said = (50, 51, 52)[:num_tokens]
    dispatch.tokens(M1, update(dispatch, 0, *said), 0)
    nodes.mixed.remove(M1)
    effects = dispatch.node_lost(M1, 1)
    assert effects[0] == AttemptEnded("node_lost", None)
    assert aborted(effects) == set()  # a dead node needs no abort
    to, message = one(effects, Generate)
    assert (to, message.tokens, message.num_prompt_tokens) == (M2, (*PROMPT, *said), 3)
    assert dispatch.tokens(M2, update(dispatch, 0, *said), 1) == [Taken()]
    assert dispatch.tokens(M2, update(dispatch, num_tokens, 53), 1) == [Output((53,), None)]


def test_the_next_attempt_may_be_handed_over_and_the_one_after_it_not() -> None:
    nodes = only_mixed()
    dispatch = generating(nodes)
    dispatch.tokens(M1, update(dispatch, 0, 50), 0)
    nodes.prefill, nodes.decode = [P1], [D1]
    effects = dispatch.attempt_failed(M1, failed(dispatch, "drained"), 1)
    assert aborted(effects) == {(M1, 1)}
    assert one(effects, Reserve)[1].tokens == (*PROMPT, 50)
    dispatch.granted(D1, Granted(dispatch.id, grant(D1)), 1)
    effects = dispatch.tokens(D1, update(dispatch, 0, 50, 51), 1)
    assert effects == [HandedOver(Pair(P1, D1)), Output((51,), None)]
    nodes.prefill, nodes.decode = [], []
    to, message = one(dispatch.attempt_failed(D1, failed(dispatch, "drained"), 2), Generate)
    assert (to, message.tokens) == (M1, (*PROMPT, 50, 51))
    assert dispatch.prefill is None


def test_with_one_token_left_one_node_is_asked_where_no_other_can() -> None:
    dispatch = start(only_mixed(), max_tokens=1)
    assert one(dispatch.place(0), Generate)[0] == M1
    effects = dispatch.tokens(M1, update(dispatch, 0, 50, finish=LENGTH), 0)
    assert effects[-1] == Output((50,), LENGTH)


def test_a_node_that_stalls_is_told_and_speaks_in_vain() -> None:
    nodes = only_mixed()
    dispatch = generating(nodes)
    old = dispatch.id
    nodes.mixed.remove(M1)
    assert aborted(dispatch.node_lost(M1, 1, alive=True)) == {(M1, 1)}
    assert dispatch.tokens(M1, TokenUpdate(old, 0, (50,)), 1) == []
    assert dispatch.tokens(M1, update(dispatch, 0, 50), 1) == []


def test_a_node_that_dies_before_it_answers_is_no_death_that_counts() -> None:
    """A router that stood still loses all its nodes; and who has the request has said so."""
    dispatch = offered()
    assert dispatch.node_lost(M1, 0)[0] == AttemptEnded("reserve_lost", None)


def test_two_deaths_end_the_request() -> None:
    dispatch = generating()
    dispatch.node_lost(M1, 1)
    assert dispatch.decode is not None
    dispatch.tokens(dispatch.decode, update(dispatch, 0), 1)
    *_, effect = dispatch.node_lost(dispatch.decode, 1)
    assert isinstance(effect, Failed)


def test_a_node_that_failed_of_itself_is_avoided() -> None:
    dispatch = generating()
    effects = dispatch.attempt_failed(M1, failed(dispatch, "internal"), 0)
    assert one(effects, Generate)[0] == M2


def test_silence_before_the_first_token_is_asked_about() -> None:
    dispatch = generating()
    assert dispatch.tick(4.9) == []
    (effect,) = dispatch.tick(5.1)
    assert one([effect], Resend) == (M1, Resend(dispatch.id, 0))
    effects = dispatch.attempt_failed(M1, failed(dispatch, "gone"), 6)
    assert one(effects, Generate)[1].id.attempt == 2


def test_contradicting_itself_ends_the_attempt() -> None:
    dispatch = generating()
    dispatch.tokens(M1, update(dispatch, 0, 50), 0)
    effects = dispatch.tokens(M1, update(dispatch, 0, 99), 0)
    assert effects[0] == AttemptEnded("divergence", None)
    assert aborted(effects) == {(M1, 1)}


@pytest.mark.parametrize("taken", [False, True])
def test_a_client_that_leaves_is_told_to_the_node(taken: bool) -> None:
    dispatch = generating() if taken else offered()
    assert aborted(dispatch.cancel()) == {(M1, 1)}
    assert dispatch.phase is Phase.ENDED


def test_a_search_in_place() -> None:
    dispatch = start(only_mixed(), beam=BeamParams(2))
    dispatch.place(0)
    assert dispatch.tokens(M1, update(dispatch, 0), 0) == [Taken()]
    hypotheses = (Hypothesis((1,), -1.0, FinishReason.STOP),) * 2
    effects = dispatch.beams_found(M1, BeamsFound(dispatch.id, hypotheses), 0)
    assert one(effects, Ack)[0] == M1
    assert effects[-1] == Found(hypotheses)
