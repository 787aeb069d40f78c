"""The dispatch machine: one choice over scripted nodes, step by step and in random walks."""

from __future__ import annotations

from typing import TypeVar

import pytest

from router.breaker import Pair
from router.dispatch import Dispatch
from router.effects import (
    AttemptEnded,
    Effect,
    Failed,
    HandedOver,
    NeedsCapacity,
    Output,
    Send,
)
from router.phase import Phase
from tests.router.scripted_nodes import (
    D1,
    D2,
    LENGTH,
    P1,
    P2,
    P3,
    PROMPT,
    STOP,
    Nodes,
    grant,
    start,
)
from wire.request_messages import (
    Abort,
    Ack,
    AttemptFailed,
    Granted,
    Prefill,
    Rebind,
    Refused,
    Resend,
    Reserve,
    TokenUpdate,
)
from wire.types import AttemptId, FinishReason, NodeId

MessageType = TypeVar("MessageType")


def one(effects: list[Effect], kind: type[MessageType]) -> tuple[NodeId, MessageType]:
    """The only message of this kind, and to whom it goes."""
    found = [e for e in effects if isinstance(e, Send) and isinstance(e.message, kind)]
    assert len(found) == 1, effects
    assert isinstance(found[0].message, kind)
    return found[0].to, found[0].message


def aborted(effects: list[Effect]) -> set[tuple[NodeId, int]]:
    return {
        (effect.to, effect.message.id.attempt)
        for effect in effects
        if isinstance(effect, Send) and isinstance(effect.message, Abort)
    }


def update(
    dispatch: Dispatch, index: int, *tokens: int, finish: FinishReason | None = None
) -> TokenUpdate:
    return TokenUpdate(dispatch.id, index, tokens, finish)


def prefilling(nodes: Nodes | None = None) -> Dispatch:
    dispatch = start(nodes)
    dispatch.place(0)
    dispatch.granted(D1, Granted(dispatch.id, grant(D1)), 0)
    assert dispatch.phase is Phase.PREFILLING
    return dispatch


def decoding(nodes: Nodes | None = None) -> Dispatch:
    dispatch = prefilling(nodes)
    dispatch.tokens(P1, update(dispatch, 0, 50), 0)
    dispatch.tokens(D1, update(dispatch, 0, 50, 51), 0)
    assert dispatch.phase is Phase.DECODING
    return dispatch


def failed(dispatch: Dispatch, cause: str, retryable: bool = True) -> AttemptFailed:
    return AttemptFailed(dispatch.id, cause, "why", retryable)


def test_the_way_without_trouble() -> None:
    dispatch = start()
    to, reserve = one(dispatch.place(0), Reserve)
    assert (to, reserve.tokens, reserve.prefill) == (D1, PROMPT, P1)
    to, prefill = one(dispatch.granted(D1, Granted(dispatch.id, grant(D1)), 0), Prefill)
    assert (to, prefill.grant) == (P1, grant(D1))
    assert dispatch.tokens(P1, update(dispatch, 0, 50), 0) == [Output((50,), None)]
    effects = dispatch.tokens(D1, update(dispatch, 0, 50, 51), 0)
    assert effects == [HandedOver(Pair(P1, D1)), Output((51,), None)]
    effects = dispatch.tokens(D1, update(dispatch, 2, 52, finish=STOP), 0)
    assert one(effects, Ack)[0] == D1
    assert effects[-1] == Output((52,), STOP)
    assert dispatch.phase is Phase.ENDED


def test_the_decode_node_may_speak_before_the_prefill_node() -> None:
    dispatch = prefilling()
    effects = dispatch.tokens(D1, update(dispatch, 0, 50, 51), 0)
    assert effects == [HandedOver(Pair(P1, D1)), Output((50, 51), None)]
    assert dispatch.tokens(P1, update(dispatch, 0, 50), 0) == []


def test_one_token_needs_no_decode_node() -> None:
    dispatch = start(Nodes(decode=[]), max_tokens=1)
    to, prefill = one(dispatch.place(0), Prefill)
    assert (to, prefill.grant) == (P1, None)
    effects = dispatch.tokens(P1, update(dispatch, 0, 50, finish=LENGTH), 0)
    assert effects == [Output((50,), LENGTH)]


def test_a_refused_reservation_goes_to_the_next_node_then_to_the_queue() -> None:
    dispatch = start()
    dispatch.place(0)
    refusal = Refused(dispatch.id, "capacity", "full", 3.0)
    assert one(dispatch.refused(D1, refusal, 0), Reserve)[0] == D2
    assert dispatch.refused(D1, refusal, 0) == []  # not whom we asked
    assert dispatch.refused(D2, refusal, 0) == [NeedsCapacity(3.0)]
    assert dispatch.phase is Phase.WAITING
    assert one(dispatch.place(1), Reserve)[0] == D1


def test_waiting_has_one_limit_however_often_it_asks() -> None:
    dispatch = start()
    for now in range(0, 10, 2):
        assert dispatch.tick(now) == []
        dispatch.place(now)
        for node in (D1, D2):
            dispatch.refused(node, Refused(dispatch.id, "capacity", "full"), now)
    (effect,) = dispatch.tick(10.1)
    assert isinstance(effect, Failed)
    assert (effect.error.status, effect.error.retry_after_s) == (503, 5.0)
    assert dispatch.phase is Phase.ENDED


def test_waiting_begins_with_the_queue() -> None:
    dispatch = start()
    dispatch.enter_queue(50)
    assert dispatch.tick(59) == []


def test_a_request_that_no_node_can_hold_is_a_bad_request() -> None:
    dispatch = start()
    dispatch.place(0)
    effects = dispatch.refused(D1, Refused(dispatch.id, "too_long", "no"), 0)
    assert one(effects, Reserve)[0] == D2, "another pool may be larger"
    *_, effect = dispatch.refused(D2, Refused(dispatch.id, "too_long", "no"), 0)
    assert isinstance(effect, Failed)
    assert (effect.error.status, effect.error.code) == (400, "context_length_exceeded")


def test_a_small_node_is_not_asked_again_while_the_large_one_is_full() -> None:
    """As where a stream moves from a large pool and meets a small one in its new role."""
    dispatch = start()
    dispatch.place(0)
    dispatch.refused(D1, Refused(dispatch.id, "too_long", "no"), 0)
    effects = dispatch.refused(D2, Refused(dispatch.id, "capacity", "full", 1.0), 0)
    assert effects == [NeedsCapacity(1.0)]
    assert one(dispatch.place(1), Reserve)[0] == D2


def test_a_reservation_that_is_gone_is_no_bad_request() -> None:
    nodes = Nodes()
    dispatch = prefilling(nodes)
    one(dispatch.node_lost(P1, 1), Rebind)
    nodes.decode.clear()
    effects = dispatch.refused(D1, Refused(dispatch.id, "gone", "it is over"), 1)
    assert any(isinstance(effect, NeedsCapacity) for effect in effects)


def test_a_dead_decode_node_is_replaced_and_the_text_goes_on() -> None:
    nodes = Nodes()
    dispatch = decoding(nodes)
    nodes.decode.remove(D1)
    effects = dispatch.node_lost(D1, 1)
    assert AttemptEnded("node_lost", Pair(P1, D1)) in effects
    assert aborted(effects) == {(P1, 1)}  # a dead node needs no abort
    to, reserve = one(effects, Reserve)
    assert (to, reserve.id.attempt) == (D2, 2)
    assert (reserve.tokens, reserve.num_prompt_tokens) == ((*PROMPT, 50, 51), 3)
    _, prefill = one(dispatch.granted(D2, Granted(dispatch.id, grant(D2)), 1), Prefill)
    assert (prefill.tokens, prefill.num_prompt_tokens) == ((*PROMPT, 50, 51), 3)
    assert dispatch.tokens(P1, update(dispatch, 2, 52), 1) == [Output((52,), None)]
    effects = dispatch.tokens(D2, update(dispatch, 0, 50, 51, 52, 53), 1)
    assert effects == [HandedOver(Pair(P1, D2)), Output((53,), None)]


def test_nodes_that_leave_in_order_are_no_deaths() -> None:
    """What was sent last may reach them too late; a stream that meets it often goes on."""
    dispatch = decoding()
    for _ in range(8):
        assert dispatch.decode is not None
        effects = dispatch.node_lost(dispatch.decode, 1, cause="drained")
        assert isinstance(effects[0], AttemptEnded)
        assert effects[0].cause == "drained"
        decode, _ = one(effects, Reserve)
        dispatch.granted(decode, Granted(dispatch.id, grant(decode)), 1)
    assert dispatch.phase is Phase.PREFILLING


def test_a_retry_prefers_the_numerics_of_the_last_author() -> None:
    nodes = Nodes()
    dispatch = decoding(nodes)
    assert nodes.numerics == ["", ""]
    dispatch.node_lost(D1, 1)
    assert nodes.numerics[2:] == ["as d1", "as d1"]


def test_with_one_token_left_the_retry_reserves_nothing() -> None:
    nodes = Nodes()
    dispatch = start(nodes, max_tokens=3)
    dispatch.place(0)
    dispatch.granted(D1, Granted(dispatch.id, grant(D1)), 0)
    dispatch.tokens(D1, update(dispatch, 0, 50, 51), 0)
    effects = dispatch.node_lost(D1, 1)
    assert one(effects, Prefill)[1].grant is None


def test_a_dead_prefill_node_matters_only_before_the_decode_node_speaks() -> None:
    dispatch = decoding()
    assert dispatch.node_lost(P1, 1) == []
    assert dispatch.attempt_failed(P1, failed(dispatch, "superseded"), 1) == []


# ---------------------------------------------------------------- rebinding


def rebinding(nodes: Nodes | None = None) -> tuple[Dispatch, Rebind]:
    """The prefill node died after the first token; its reservation goes to another one."""
    nodes = nodes or Nodes()
    dispatch = prefilling(nodes)
    dispatch.tokens(P1, update(dispatch, 0, 50), 0)
    nodes.prefill.remove(P1)
    effects = dispatch.node_lost(P1, 1)
    assert AttemptEnded("node_lost", Pair(P1, D1)) in effects
    assert aborted(effects) == set()  # one is dead, the other goes on
    to, message = one(effects, Rebind)
    assert to == D1
    return dispatch, message


def test_a_dead_prefill_nodes_reservation_goes_to_another_one() -> None:
    dispatch, message = rebinding()
    assert message == Rebind(dispatch.id, 1, P2, (50,), 99)
    assert dispatch.phase is Phase.REBINDING
    to, prefill = one(dispatch.granted(D1, Granted(dispatch.id, grant(D1, 2)), 1), Prefill)
    assert (to, prefill.grant, prefill.tokens) == (P2, grant(D1, 2), (*PROMPT, 50))
    assert dispatch.tokens(P2, update(dispatch, 1, 51), 1) == [Output((51,), None)]
    effects = dispatch.tokens(D1, update(dispatch, 0, 50, 51, 52), 1)
    assert effects == [HandedOver(Pair(P2, D1)), Output((52,), None)]


def test_a_rebound_reservation_may_be_rebound_again() -> None:
    nodes = Nodes(prefill=[P1, P2, P3])
    dispatch, _ = rebinding(nodes)
    dispatch.granted(D1, Granted(dispatch.id, grant(D1, 2)), 1)
    to, message = one(dispatch.attempt_failed(P2, failed(dispatch, "drained"), 1), Rebind)
    assert (to, message.lease, message.prefill) == (D1, 2, P3)


@pytest.mark.parametrize(("cause", "again"), [("gone", D1), ("capacity", D2), ("draining", D2)])
def test_a_refused_rebind_reserves_anew(cause: str, again: NodeId) -> None:
    dispatch, _ = rebinding()
    effects = dispatch.refused(D1, Refused(dispatch.id, cause, "why"), 1)
    to, reserve = one(effects, Reserve)
    assert (to, reserve.prefill, reserve.id.attempt) == (again, P2, 2)
    assert aborted(effects) == set(), "what is refused has ended"


def test_an_unanswered_rebind_reserves_elsewhere() -> None:
    dispatch, _ = rebinding()
    effects = dispatch.tick(3.1)
    assert (D1, 2) in aborted(effects)
    assert one(effects, Reserve)[0] == D2


def test_a_decode_node_that_dies_while_it_is_asked_to_rebind() -> None:
    nodes = Nodes()
    dispatch, _ = rebinding(nodes)
    nodes.decode.remove(D1)
    effects = dispatch.node_lost(D1, 1)
    assert AttemptEnded("reserve_lost", Pair(P2, D1)) in effects
    assert one(effects, Reserve)[0] == D2


def test_a_stalled_prefill_node_is_told_after_its_reservation_has_gone_on() -> None:
    dispatch = prefilling()
    effects = dispatch.node_lost(P1, 1, alive=True)
    sent = [effect for effect in effects if isinstance(effect, Send)]
    assert [(s.to, type(s.message)) for s in sent] == [(D1, Rebind), (P1, Abort)]
    assert aborted(effects) == {(P1, 1)}


def test_the_prefill_node_that_failed_is_asked_again_only_if_it_is_the_only_one() -> None:
    for nodes, next_one in ((Nodes(), P2), (Nodes(prefill=[P1]), P1)):
        dispatch = prefilling(nodes)
        effects = dispatch.attempt_failed(P1, failed(dispatch, "transport"), 1)
        assert one(effects, Rebind)[1].prefill == next_one


def test_a_prefill_node_that_takes_no_messages_is_replaced() -> None:
    dispatch = prefilling()
    assert one(dispatch.cannot_send(P1, 1), Rebind)[1].prefill == P2


@pytest.mark.parametrize("sender", [P1, D1])
def test_what_ended_with_its_lease_is_not_rebound(sender: NodeId) -> None:
    dispatch = prefilling()
    effects = dispatch.attempt_failed(sender, failed(dispatch, "digest"), 1)
    assert one(effects, Reserve)[1].id.attempt == 2
    assert aborted(effects) == {(P1, 1), (D1, 1)}


def test_without_another_prefill_node_the_reservation_is_given_back() -> None:
    nodes = Nodes(prefill=[P1])
    dispatch = prefilling(nodes)
    nodes.prefill.clear()
    effects = dispatch.node_lost(P1, 1)
    assert aborted(effects) == {(D1, 1)}
    assert dispatch.phase is Phase.WAITING
    nodes.prefill.append(NodeId("p1", 2))
    assert one(dispatch.place(2), Reserve)[1].prefill == NodeId("p1", 2)


def test_with_one_token_left_there_is_nothing_to_rebind() -> None:
    dispatch = start(max_tokens=2)
    dispatch.place(0)
    dispatch.granted(D1, Granted(dispatch.id, grant(D1)), 0)
    dispatch.tokens(P1, update(dispatch, 0, 50), 0)
    effects = dispatch.node_lost(P1, 1)
    assert aborted(effects) == {(D1, 1)}
    assert one(effects, Prefill)[1].grant is None


def test_two_dead_prefill_nodes_end_the_request() -> None:
    dispatch, _ = rebinding()
    dispatch.granted(D1, Granted(dispatch.id, grant(D1, 2)), 1)
    effects = dispatch.node_lost(P2, 1)
    assert isinstance(effects[-1], Failed)
    assert aborted(effects) == {(D1, 2)}


# ---------------------------------------------------------------- more that goes wrong


def test_a_stalled_node_lives_and_is_told() -> None:
    dispatch = decoding()
    assert aborted(dispatch.node_lost(D1, 1, alive=True)) == {(P1, 1), (D1, 1)}


@pytest.mark.parametrize("cause", ["digest", "divergence", "internal", "node_lost"])
def test_two_poisonings_end_the_request(cause: str) -> None:
    dispatch = prefilling()
    for attempt in (1, 2):
        assert dispatch.id.attempt == attempt
        assert dispatch.decode is not None
        dispatch.granted(dispatch.decode, Granted(dispatch.id, grant(dispatch.decode)), 0)
        if cause in ("digest", "internal"):
            effects = dispatch.attempt_failed(dispatch.decode, failed(dispatch, cause), 0)
        elif cause == "node_lost":
            effects = dispatch.node_lost(dispatch.decode, 0)
        else:
            dispatch.tokens(dispatch.decode, update(dispatch, 0, 50), 0)
            effects = dispatch.tokens(dispatch.decode, update(dispatch, 0, 99), 0)
    assert isinstance(effects[-1], Failed)
    assert effects[-1].error.status == 500
    assert dispatch.phase is Phase.ENDED


def test_a_node_that_failed_of_itself_is_avoided() -> None:
    dispatch = prefilling()
    effects = dispatch.attempt_failed(D1, failed(dispatch, "internal"), 0)
    assert one(effects, Reserve)[0] == D2


@pytest.mark.parametrize("teller", ["prefill node", "decode node"])
def test_blocks_that_did_not_come_through_take_another_way(teller: str) -> None:
    """Neither node is known to be at fault; two digests that differ would end the request."""
    dispatch = prefilling()
    sender = P1 if teller == "prefill node" else D1
    effects = dispatch.attempt_failed(sender, failed(dispatch, "digest"), 0)
    assert effects[0] == AttemptEnded("digest", Pair(P1, D1))
    to, reserve = one(effects, Reserve)
    assert (reserve.prefill, to) == (P1, D2)


@pytest.mark.parametrize(("prefill", "again"), [([P1, P2], P2), ([P1], P1)])
def test_a_prefill_node_that_let_its_lease_expire_is_the_last_resort(
    prefill: list[NodeId], again: NodeId
) -> None:
    """It may stand still without anybody knowing yet; where it is alone, it is asked again."""
    dispatch = prefilling(Nodes(prefill=prefill))
    effects = dispatch.attempt_failed(D1, failed(dispatch, "expired"), 0)
    assert one(effects, Reserve)[1].prefill == again


def test_without_a_decode_node_no_pair_is_to_blame() -> None:
    dispatch = start(Nodes(decode=[]), max_tokens=1)
    dispatch.place(0)
    effects = dispatch.attempt_failed(P1, failed(dispatch, "transport"), 0)
    assert effects[0] == AttemptEnded("transport", None)


def test_other_failures_are_retried_a_bounded_number_of_times() -> None:
    dispatch = prefilling()
    for _ in range(20):
        assert dispatch.decode is not None
        effects = dispatch.attempt_failed(dispatch.decode, failed(dispatch, "expired"), 0)
        if dispatch.phase is Phase.ENDED:
            break
    assert isinstance(effects[-1], Failed)
    assert dispatch.id.attempt == 6


def test_a_failure_that_cannot_be_retried_ends_the_request() -> None:
    dispatch = prefilling()
    effects = dispatch.attempt_failed(P1, failed(dispatch, "internal", retryable=False), 0)
    assert aborted(effects) == {(P1, 1), (D1, 1)}
    assert isinstance(effects[-1], Failed)


def test_an_unanswered_reservation_goes_elsewhere() -> None:
    dispatch = start()
    dispatch.place(0)
    assert dispatch.tick(1.9) == []
    effects = dispatch.tick(2.1)
    assert (D1, 1) in aborted(effects)
    to, reserve = one(effects, Reserve)
    assert (to, reserve.id.attempt) == (D2, 2)
    late = Granted(AttemptId("r", 1), grant(D1))
    assert dispatch.granted(D1, late, 3) == []


def test_what_cannot_be_sent_goes_elsewhere() -> None:
    dispatch = start()
    dispatch.place(0)
    effects = dispatch.cannot_send(D1, 0)
    assert one(effects, Reserve)[0] == D2
    assert (D1, 1) not in aborted(effects)


def test_the_deadline_ends_everything() -> None:
    dispatch = decoding()
    dispatch.tokens(D1, update(dispatch, 2, 52), 99)
    effects = dispatch.tick(100)
    assert aborted(effects) == {(P1, 1), (D1, 1)}
    assert isinstance(effects[-1], Failed)
    assert effects[-1].error.status == 504


def test_gaps_and_silence_ask_to_resend() -> None:
    dispatch = decoding()
    to, resend = one(dispatch.tokens(D1, update(dispatch, 4, 54), 1), Resend)
    assert (to, resend.index) == (D1, 2)
    assert dispatch.tick(2) == []
    to, resend = one(dispatch.tick(6.5), Resend)
    assert (to, resend.index) == (D1, 2)
    assert dispatch.tick(7) == []


def test_cancel_tells_both_nodes() -> None:
    dispatch = decoding()
    assert aborted(dispatch.cancel()) == {(P1, 1), (D1, 1)}
    assert dispatch.tokens(D1, update(dispatch, 2, 52), 0) == []
    assert dispatch.cancel() == []
