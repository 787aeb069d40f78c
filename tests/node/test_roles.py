"""Both roles and everything that may happen to a request between them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, cast

import pytest

from engine.plan import LayerProgress
from node.router_link import RouterLink
from tests.engine.expected_logprobs import check_prompt_rows, check_row
from tests.engine.hash_runner import chain, logits_after
from tests.node.pair import ID, LAYOUT, PROMPT, SAMPLING, FakeLink, Pair, expected, pair
from wire.geometry import Geometry
from wire.logprobs import UNKNOWN, Logprobs
from wire.request_messages import Abort, Ack, Granted, Prefill, Refused, Resend, TokenUpdate
from wire.types import AttemptId, FinishReason, NodeId

LATER = AttemptId(ID.request, 2)
LONG = tuple(i % 20 + 1 for i in range(40))  # more than a step computes


def run(scenario: Callable[[Pair], Awaitable[None]], **settings: Any) -> None:
    async def body() -> None:
        async with pair(**settings) as p:
            await scenario(p)

    asyncio.run(body())


# ---------------------------------------------------------------- as it should be


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_a_request_goes_over_and_ends(async_scheduling: bool) -> None:
    async def scenario(p: Pair) -> None:
        p.start(p.grant())
        assert await p.finish() == expected()
        assert p.prefill.link.output() == (expected()[0][:1], None)
        assert len(p.prefill.role._outbox) == len(p.decode.role._outbox) == 0
        assert (p.decode.shell.stats.ahead > 3) is async_scheduling
        assert p.prefill.shell.stats.ahead == 0, "the first token waits for nothing"

    run(scenario, async_scheduling=async_scheduling)


@pytest.mark.parametrize("async_scheduling", [False, True])
def test_many_requests_in_chunks(async_scheduling: bool) -> None:
    async def scenario(p: Pair) -> None:
        ids = [AttemptId(f"r{i}", i + 1) for i in range(5)]
        prompts = {id: LONG[i : 30 + i] for i, id in enumerate(ids)}
        for id in ids:
            p.start(p.grant(id, prompts[id]), id, prompts[id])
        for id in ids:
            assert await p.finish(id) == expected(prompts[id])

    run(scenario, max_num_batched_tokens=8, decode_blocks=64, async_scheduling=async_scheduling)


def test_a_prompt_that_the_decode_node_knows() -> None:
    async def scenario(p: Pair) -> None:
        p.start(p.grant())
        await p.finish()
        p.decode.role.stats.bytes_received = 0
        again = p.grant(LATER)
        assert again.num_cached_tokens == 8
        p.start(again, LATER)
        assert await p.finish(LATER) == expected()
        assert p.decode.role.stats.bytes_received == 2 * LAYOUT.bytes_per_token, "two slots"

    run(scenario)


def test_a_prefill_node_that_is_short_of_blocks() -> None:
    async def scenario(p: Pair) -> None:
        ids = [AttemptId(f"r{i}", 1) for i in range(6)]
        prompts = {id: LONG[i : 32 + i] for i, id in enumerate(ids)}
        for id in ids:
            p.start(p.grant(id, prompts[id]), id, prompts[id])
        p.prefill.work()
        assert p.prefill.engine.load().num_waiting == 5
        for id in ids:
            assert await p.finish(id) == expected(prompts[id])

    run(scenario, max_num_batched_tokens=8, prefill_blocks=12, decode_blocks=80)


# ---------------------------------------------------------------- layer by layer


def in_two_groups(p: Pair) -> None:
    """The layers of a block travel as two units."""
    cast(Any, p.decode.role._arrivals)._geometry = lambda message: Geometry(num_layer_groups=2)


def test_a_layer_group_leaves_while_the_next_one_computes() -> None:
    async def scenario(p: Pair) -> None:
        in_two_groups(p)
        p.start(p.grant(ID, LONG), ID, LONG)
        handoff = p.prefill.role._sender._outgoing[ID].handoff
        half = 8 * LAYOUT.bytes_per_token // 2
        for num_steps in range(4):
            result = p.prefill.step()
            assert handoff.bytes_sent == (2 * num_steps + 1) * half, "the first group has left"
            assert result is not None
            p.prefill.role.on_step(result)
            assert handoff.bytes_sent == (2 * num_steps + 2) * half
        assert await p.finish() == expected(LONG)
        assert handoff.transfer is not None
        assert handoff.transfer.tail_bytes == half
        assert p.prefill.engine.layer_marks == frozenset()

    run(scenario, max_num_batched_tokens=8)


def test_whole_blocks_ask_for_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(p: Pair) -> None:
        monkeypatch.setattr(p.prefill.role, "on_layers", lambda progress: pytest.fail("called"))
        p.start(p.grant())
        assert await p.finish() == expected()

    run(scenario)


def test_a_step_that_fails_after_its_first_layers_ends_the_handoff() -> None:
    """Their KV has left already; the decode node must not use it."""

    async def scenario(p: Pair) -> None:
        in_two_groups(p)
        p.start(p.grant(ID, LONG), ID, LONG)

        def fail() -> None:
            raise ArithmeticError

        cast(Any, p.prefill.engine._runner).during_run = fail
        handoff = p.prefill.role._sender._outgoing[ID].handoff
        with pytest.raises(ArithmeticError):
            p.prefill.step()
        assert handoff.bytes_sent
        p.prefill.role.fail(p.prefill.engine.step_request_ids, "internal", "the step failed")
        assert handoff.cause == "internal"
        cast(Any, p.prefill.engine._runner).during_run = lambda: None
        p.decode.tell(Abort(ID))  # as the router does
        await p.until(lambda: p.decode.role.num_attempts == 0)
        p.start(p.grant(LATER, LONG), LATER, LONG)
        assert await p.finish(LATER) == expected(LONG)

    run(scenario, max_num_batched_tokens=8)


def test_progress_that_comes_late_is_about_nothing() -> None:
    """The loop hears of a step's first layers when the request was aborted, or has other blocks."""

    async def scenario(p: Pair) -> None:
        in_two_groups(p)
        late: list[LayerProgress] = []
        p.start(p.grant(ID, LONG), ID, LONG)
        result = p.prefill.engine.step(late.append)
        assert late
        assert result is not None
        p.prefill.tell(Abort(ID))
        p.prefill.role.on_layers(late[0])
        p.start(p.grant(LATER, LONG), LATER, LONG)
        renamed = [(str(LATER), blocks) for _, blocks in late[0].finished_blocks]
        p.prefill.role.on_layers(replace(late[0], finished_blocks=tuple(renamed)))
        assert await p.finish(LATER) == expected(LONG)

    run(scenario, max_num_batched_tokens=8, enable_prefix_caching=False)


# ---------------------------------------------------------------- asked twice


def test_everything_may_be_asked_twice() -> None:
    async def scenario(p: Pair) -> None:
        grant = p.grant()
        assert p.grant() == grant
        p.start(grant)
        p.start(grant)
        assert p.prefill.engine.load().num_waiting == 1
        await p.until(lambda: p.decode.link.updates())
        again = p.reserve()
        assert isinstance(again, Refused)
        assert again.cause == "superseded"
        assert await p.finish() == expected()
        p.both(Ack(ID))
        for _ in range(2):
            p.both(Abort(ID))
        assert not p.prefill.link.failures()

    run(scenario)


def test_tokens_are_repeated_until_they_are_acknowledged() -> None:
    async def scenario(p: Pair) -> None:
        p.start(p.grant())
        await p.until(lambda: p.decode.link.output()[1])
        p.decode.tell(Resend(ID, 2))
        tokens, finish = expected()
        last = p.decode.link.updates()[-1]
        assert (last.index, list(last.tokens), last.finish) == (2, tokens[2:], finish)
        p.decode.tell(Ack(ID))
        assert len(p.decode.role._outbox) == 0

    run(scenario)


def test_what_a_decode_node_does_not_know_has_failed() -> None:
    """Else a router that lost its failure would ask again until the request's deadline."""

    async def scenario(p: Pair) -> None:
        p.decode.tell(Resend(ID, 0))
        (failure,) = p.decode.link.failures()
        assert (failure.cause, failure.retryable) == ("gone", True)
        p.grant(LATER)
        p.decode.tell(Resend(LATER, 0))
        assert not p.decode.link.failures(LATER), "its KV is still to come"
        p.decode.tell(Abort(LATER))

    run(scenario)


# ---------------------------------------------------------------- aborts


def test_an_abort_before_its_reserve() -> None:
    async def scenario(p: Pair) -> None:
        p.decode.tell(Abort(ID))
        answer = p.reserve()
        assert isinstance(answer, Refused)
        assert answer.cause == "superseded"
        p.start(p.grant(LATER), LATER)
        assert await p.finish(LATER) == expected()

    run(scenario)


def test_an_abort_between_grant_and_commit() -> None:
    async def scenario(p: Pair) -> None:
        p.start(p.grant())
        p.decode.tell(Abort(ID))
        assert p.decode.role.num_attempts == 0
        await p.until(lambda: p.prefill.role.num_attempts == 0)
        assert [f.retryable for f in p.prefill.link.failures()] == [True]
        assert not p.decode.link.failures()

    run(scenario)


@pytest.mark.parametrize("moment", ["waiting", "in a step", "after a step", "after the last"])
def test_an_abort_during_prefill(moment: str) -> None:
    async def scenario(p: Pair) -> None:
        p.start(p.grant(ID, LONG), ID, LONG)
        result = None
        if moment == "after the last":
            for _ in range(4):
                p.prefill.work()
        if moment == "in a step":
            cast(Any, p.prefill.engine._runner).during_run = lambda: p.prefill.tell(Abort(ID))
        if moment != "waiting":
            result = p.prefill.step()
        p.prefill.tell(Abort(ID))
        if result is not None:
            p.prefill.role.on_step(result)
        assert p.prefill.role.num_attempts == len(p.prefill.role._outbox) == 0
        await p.until(lambda: p.decode.role.num_attempts == 0)
        assert not p.prefill.link.heard
        assert not p.decode.link.failures(), "the router knows"

    run(scenario, max_num_batched_tokens=8)


@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("moment", ["in a step", "after a step"])
def test_an_abort_during_decode(moment: str, async_scheduling: bool) -> None:
    async def scenario(p: Pair) -> None:
        p.start(p.grant())
        await p.until(lambda: p.decode.engine.has_work())
        heard = len(p.decode.link.heard)
        if moment == "in a step":
            cast(Any, p.decode.engine._runner).during_run = lambda: p.decode.tell(Abort(ID))
        result = p.decode.step()
        p.decode.tell(Abort(ID))
        assert result is not None
        p.decode.role.on_step(result)
        assert len(p.decode.link.heard) == heard
        assert len(p.decode.role._outbox) == 0

    run(scenario, async_scheduling=async_scheduling)


def test_an_abort_of_an_earlier_attempt_changes_nothing() -> None:
    async def scenario(p: Pair) -> None:
        p.start(p.grant(LATER), LATER)
        p.both(Abort(ID))
        assert await p.finish(LATER) == expected()

    run(scenario)


# ---------------------------------------------------------------- later attempts


def test_a_later_attempt_ends_a_pending_one_and_takes_its_room() -> None:
    async def scenario(p: Pair) -> None:
        first = p.grant()
        p.start(first)
        p.prefill.work()
        second = p.grant(LATER)
        assert second.lease != first.lease
        assert p.decode.role.num_attempts == 1
        p.start(second, LATER)
        assert p.prefill.role.num_attempts == 1
        assert await p.finish(LATER) == expected()
        assert not p.decode.link.updates()
        assert not p.decode.link.failures()

    run(scenario, decode_blocks=4)


def test_a_later_attempt_ends_a_running_one() -> None:
    async def scenario(p: Pair) -> None:
        p.start(p.grant())
        await p.until(lambda: len(p.decode.link.output()[0]) == 2)
        tokens = tuple(p.decode.link.output()[0])
        more = PROMPT + tokens
        p.start(
            p.grant(LATER, more, num_prompt_tokens=len(PROMPT)),
            LATER,
            more,
            num_prompt_tokens=len(PROMPT),
        )
        assert await p.finish(LATER) == expected()
        assert p.decode.link.output(ID)[1] is None
        assert len(p.decode.role._outbox) == 0

    run(scenario)


def test_an_earlier_attempt_comes_too_late() -> None:
    async def scenario(p: Pair) -> None:
        grant = p.grant(LATER)
        p.start(grant, LATER)
        answer = p.reserve(ID)
        assert isinstance(answer, Refused)
        assert answer.cause == "superseded"
        p.start(grant, ID)
        assert [f.cause for f in p.prefill.link.failures()] == ["superseded"]
        assert await p.finish(LATER) == expected()

    run(scenario)


# ---------------------------------------------------------------- the end at the first token


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_tokens": 1}, FinishReason.LENGTH),
        ({"stop_token_ids": tuple(range(24))}, FinishReason.STOP),
    ],
)
def test_the_first_token_may_be_the_last(change: dict[str, Any], reason: FinishReason) -> None:
    async def scenario(p: Pair) -> None:
        sampling = replace(SAMPLING, **change)
        grant = None if "max_tokens" in change else p.grant(sampling=sampling)
        p.start(grant, sampling=sampling)
        await p.until(lambda: p.prefill.link.output()[1])
        assert p.prefill.link.output() == expected(sampling=sampling)
        assert p.prefill.link.output()[1] is reason
        await p.until(lambda: p.decode.role.num_attempts == 0)
        assert not p.decode.link.failures(), "the lease was given back"
        p.prefill.tell(Ack(ID))
        assert len(p.prefill.role._outbox) == 0

    run(scenario, lease_ttl_s=1000.0)


def test_eos_at_the_first_token() -> None:
    async def scenario(p: Pair) -> None:
        sampling = replace(SAMPLING, ignore_eos=False, logit_bias={0: 100.0})
        p.start(p.grant(sampling=sampling), sampling=sampling)
        await p.until(lambda: p.prefill.link.output()[1])
        assert p.prefill.link.output() == ([0], FinishReason.STOP)

    run(scenario)


# ---------------------------------------------------------------- what cannot be


def test_a_lease_expires() -> None:
    async def scenario(p: Pair) -> None:
        p.grant()
        await p.until(lambda: p.decode.link.failures())
        (failure,) = p.decode.link.failures()
        assert (failure.cause, failure.retryable) == ("expired", True)
        assert p.decode.role.num_attempts == 0

    run(scenario, lease_ttl_s=0.03)


def test_the_first_token_contradicts_the_reservation(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(p: Pair) -> None:
        p.start(p.grant())
        out = next(iter(p.prefill.role._sender._outgoing.values()))
        finish = out.handoff.finish
        monkeypatch.setattr(out.handoff, "finish", lambda tokens, more: finish((1, 2, 3)))
        await p.until(lambda: p.decode.link.failures())
        assert p.decode.link.failures()[0].cause == "manifest"
        assert p.decode.role.num_attempts == 0

    run(scenario)


def test_an_engine_that_does_not_adopt(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(p: Pair) -> None:
        p.start(p.grant())

        def refuse(reservation: int, request: Any, row: bytes) -> None:
            raise ValueError("something does not fit")

        monkeypatch.setattr(p.decode.engine, "adopt", refuse)
        await p.until(lambda: p.decode.link.failures())
        (failure,) = p.decode.link.failures()
        assert (failure.cause, failure.retryable) == ("internal", True)
        assert not p.decode.link.updates()

    run(scenario)


BAD: dict[str, dict[str, Any]] = {
    "no tokens": {"tokens": (), "num_prompt_tokens": 0},
    "no prompt": {"tokens": (1, 2), "num_prompt_tokens": 0},
    "a prompt beyond the tokens": {"tokens": (1, 2), "num_prompt_tokens": 3},
    "a token that the model has not": {"tokens": (1, 24), "num_prompt_tokens": 2},
}


@pytest.mark.parametrize("name", BAD)
def test_what_makes_no_sense_is_refused(name: str) -> None:
    async def scenario(p: Pair) -> None:
        answer = p.reserve(**BAD[name])
        assert isinstance(answer, Refused)
        assert answer.cause == "invalid"
        grant = p.grant(LATER)
        p.start(grant, LATER, **BAD[name])
        (failure,) = p.prefill.link.failures(LATER)
        assert (failure.cause, failure.retryable) == ("invalid", False)
        assert not p.prefill.engine.has_work()
        p.decode.tell(Abort(LATER))

    run(scenario)


def test_too_long_for_the_model() -> None:
    async def scenario(p: Pair) -> None:
        answer = p.reserve(tokens=tuple([1] * 63))
        assert isinstance(answer, Refused)
        assert answer.cause == "too_long"
        p.start(None, tokens=tuple([1] * 64))
        (failure,) = p.prefill.link.failures()
        assert (failure.cause, failure.retryable) == ("too_long", False)

    run(scenario)


def test_too_long_for_the_pool_is_not_a_matter_of_time() -> None:
    async def scenario(p: Pair) -> None:
        answer = p.reserve(tokens=LONG)
        assert isinstance(answer, Refused)
        assert answer.cause == "too_long"
        p.start(None, tokens=LONG)
        (failure,) = p.prefill.link.failures()
        assert (failure.cause, failure.retryable) == ("too_long", False)

    run(scenario, prefill_blocks=9, decode_blocks=11)


def test_no_room_now() -> None:
    async def scenario(p: Pair) -> None:
        p.grant()
        answer = p.reserve(AttemptId("other", 1))
        assert isinstance(answer, Refused)
        assert answer.cause == "capacity"
        p.decode.tell(Abort(ID))
        p.grant(AttemptId("other", 1))
        p.decode.tell(Abort(AttemptId("other", 1)))

    run(scenario, decode_blocks=6)


def test_too_many_wait() -> None:
    """Another node may have room: that is not the client's mistake."""

    async def scenario(p: Pair) -> None:
        object.__setattr__(p.prefill.engine.config, "max_num_waiting", 1)
        other = AttemptId("other", 1)
        p.start(p.grant())
        p.start(p.grant(other), other)
        (failure,) = p.prefill.link.failures(other)
        assert (failure.cause, failure.retryable) == ("capacity", True)
        p.decode.tell(Abort(other))  # as the router does
        assert await p.finish() == expected()

    run(scenario)


def test_a_grant_of_another_layout() -> None:
    async def scenario(p: Pair) -> None:
        grant = p.grant()
        p.start(replace(grant, layout=replace(grant.layout, num_layers=9)))
        (failure,) = p.prefill.link.failures()
        assert (failure.cause, failure.retryable) == ("layout", False)
        p.decode.tell(Abort(ID))

    run(scenario)


@pytest.mark.parametrize("url", ["tcp://no such host:1", "tcp://127.0.0.1:99999", "what?"])
def test_a_peer_address_that_is_none(url: str) -> None:
    """The tick that asks for the commit must survive it, and so must the other requests."""

    async def scenario(p: Pair) -> None:
        other = AttemptId("other", 1)
        p.start(p.grant(other), other)
        grant = replace(p.grant(), peer_url=url, decode=NodeId("elsewhere", 1))
        p.start(grant)
        assert await p.finish(other) == expected()
        await p.until(lambda: p.prefill.role.stats.messages_unsent)
        p.both(Abort(ID))

    run(scenario)


# ---------------------------------------------------------------- endings from outside


async def busy(p: Pair) -> list[AttemptId]:
    """Attempts in every state: waiting and computing on one node, pending and running on the
    other."""
    ids = [AttemptId(f"r{i}", 1) for i in range(4)]
    p.start(p.grant(ids[0]), ids[0])
    await p.until(lambda: p.decode.engine.has_work())
    await p.hear(lambda: not p.prefill.role.num_attempts)
    for id in ids[1:]:
        p.start(p.grant(id, LONG), id, LONG)
    p.prefill.work()
    assert (p.prefill.role.num_attempts, p.decode.role.num_attempts) == (3, 4)
    return ids


def test_fail_all_tells_everybody() -> None:
    async def scenario(p: Pair) -> None:
        ids = await busy(p)
        for node in (p.prefill, p.decode):
            node.role.fail_all("drained", "the node is shutting down" * 1000)
            assert node.role.num_attempts == len(node.role._outbox) == 0
        for id in ids:
            told = [*p.prefill.link.failures(id)[:1], *p.decode.link.failures(id)]
            assert {(f.cause, f.retryable) for f in told} == {("drained", True)}
            assert len(told) == (1 if id == ids[0] else 2)

    run(scenario, decode_blocks=80, max_num_batched_tokens=8)


def test_a_failed_step_ends_only_its_own_requests() -> None:
    async def scenario(p: Pair) -> None:
        ids = await busy(p)
        p.decode.role.fail([str(ids[0])], "internal", "boom")
        p.prefill.role.fail([str(ids[1]), "unknown/1"], "internal", "boom")
        assert [len(p.decode.link.failures(id)) for id in ids] == [1, 0, 0, 0]
        assert [len(p.prefill.link.failures(id)) for id in ids] == [0, 1, 0, 0]
        for id in ids[2:]:
            assert await p.finish(id) == expected(LONG)
        p.both(Abort(ids[1]))

    run(scenario, decode_blocks=80, max_num_batched_tokens=8)


def test_a_lost_router_leaves_nothing() -> None:
    async def scenario(p: Pair) -> None:
        other, id = FakeLink(), AttemptId("other", 1)
        await busy(p)
        last = replace(SAMPLING, max_tokens=1)
        p.prefill.tell(Prefill(id, PROMPT, len(PROMPT), last, None), other)
        for node in (p.prefill, p.decode):
            node.link.heard.clear()
            node.role.router_lost(cast(RouterLink, node.link))
        assert (p.prefill.role.num_attempts, p.decode.role.num_attempts) == (1, 0)
        assert (len(p.prefill.role._outbox), len(p.decode.role._outbox)) == (1, 0)
        await p.until(lambda: other.output(id)[1])

    run(scenario, decode_blocks=80, max_num_batched_tokens=8)


def test_a_router_lost_with_finished_requests_is_owed_nothing() -> None:
    async def scenario(p: Pair) -> None:
        p.start(p.grant())
        await p.until(lambda: p.decode.link.output()[1])
        assert len(p.decode.role._outbox) == 1
        p.decode.role.router_lost(cast(RouterLink, p.decode.link))
        assert len(p.decode.role._outbox) == 0

    run(scenario)


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_a_router_may_get_lost_while_it_is_told(name: str) -> None:
    """The first message that cannot be sent ends all its requests, in the middle of a loop."""

    async def scenario(p: Pair) -> None:
        await busy(p)
        node = p.prefill if name == "prefill" else p.decode
        node.link.on_lost = node.role.router_lost
        node.role.fail_all("drained", "the node is shutting down")
        assert node.role.num_attempts == len(node.role._outbox) == 0
        other = p.decode if name == "prefill" else p.prefill
        other.role.fail_all("drained", "")

    run(scenario, decode_blocks=80, max_num_batched_tokens=8)


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_a_router_may_get_lost_while_it_gets_tokens(name: str) -> None:
    async def scenario(p: Pair) -> None:
        await busy(p)
        node = p.prefill if name == "prefill" else p.decode
        node.link.on_lost = node.role.router_lost
        await p.until(lambda: not node.role.num_attempts)
        other = p.decode if name == "prefill" else p.prefill
        other.role.fail_all("drained", "")

    run(scenario, decode_blocks=80, max_num_batched_tokens=8)


def test_draining_takes_nothing_new_and_ends_what_is_there() -> None:
    async def scenario(p: Pair) -> None:
        grant = p.grant()
        p.decode.role.drain()
        p.start(grant)
        p.prefill.role.drain()
        other = AttemptId("other", 1)
        answer = p.reserve(other)
        assert isinstance(answer, Refused)
        assert answer.cause == "draining"
        p.start(None, other, sampling=replace(SAMPLING, max_tokens=1))
        (failure,) = p.prefill.link.failures(other)
        assert (failure.cause, failure.retryable) == ("drained", True)
        assert isinstance(p.reserve(), Granted)
        assert await p.finish() == expected()

    run(scenario)


def test_an_error_with_one_request_leaves_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(p: Pair) -> None:
        other = AttemptId("other", 1)
        p.start(p.grant())
        p.start(p.grant(other), other)
        sender = p.prefill.role._sender
        first_token = sender.first_token

        def fail_once(id: AttemptId, tokens: Any, logprobs: Any) -> None:
            if id == ID:
                raise AssertionError("units are missing")
            first_token(id, tokens, logprobs)

        monkeypatch.setattr(sender, "first_token", fail_once)
        assert await p.finish(other) == expected()
        (failure,) = p.prefill.link.failures()
        assert (failure.cause, failure.retryable) == ("internal", True)
        p.decode.tell(Abort(ID))  # as the router does

    run(scenario)


# ---------------------------------------------------------------- logprobs

TELLING = replace(SAMPLING, logprobs=2, prompt_logprobs=1)


def check_logprobs(updates: list[TokenUpdate], prompt: tuple[int, ...], first: int = 0) -> None:
    """Each token with its logprobs from output index `first` on, the prompt's with index 0."""
    for update in updates:
        told = update.logprobs
        assert told is not None
        assert len(told.tokens) == len(update.tokens)
        tokens = [*prompt, *expected(prompt, TELLING)[0]]
        for index, row in enumerate(told.tokens, start=update.index):
            place = len(prompt) + index
            if index < first:
                assert row == UNKNOWN
            else:
                check_row(row, logits_after(chain(tokens[:place])[-1]), tokens[place], 2)
        if update.index or first:
            assert not told.prompt
        else:
            after = [logits_after(state) for state in chain(prompt)]
            check_prompt_rows(told.prompt, after, prompt, 1)


def test_both_holders_tell_all_logprobs() -> None:
    """The decode node repeats the first token's and the prompt's, which it never computed."""

    async def scenario(p: Pair) -> None:
        p.start(p.grant(ID, LONG, TELLING), ID, LONG, TELLING)
        assert await p.finish() == expected(LONG, TELLING)
        for node in (p.prefill, p.decode):
            assert node.link.updates()[0].index == 0
            check_logprobs(node.link.updates(), LONG)

    run(scenario, max_num_batched_tokens=8, decode_blocks=64)


def test_logprobs_of_a_later_attempt_begin_where_it_begins() -> None:
    async def scenario(p: Pair) -> None:
        known = (*PROMPT, *expected(PROMPT, TELLING)[0][:3])
        more = {"num_prompt_tokens": len(PROMPT)}
        p.start(p.grant(ID, known, TELLING, **more), ID, known, TELLING, **more)
        assert await p.finish() == expected(PROMPT, TELLING)
        assert p.prefill.link.updates()[0].index == 3
        for node in (p.prefill, p.decode):
            check_logprobs(node.link.updates(), PROMPT, first=3)

    run(scenario)


def test_a_commit_with_too_few_logprobs_contradicts(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(p: Pair) -> None:
        p.start(p.grant(ID, PROMPT, TELLING), ID, PROMPT, TELLING)
        out = next(iter(p.prefill.role._sender._outgoing.values()))
        finish = out.handoff.finish
        monkeypatch.setattr(
            out.handoff, "finish", lambda tokens, more: finish(tokens, Logprobs((b"", b"")))
        )
        await p.until(lambda: p.decode.link.failures())
        assert p.decode.link.failures()[0].cause == "manifest"

    run(scenario)


def test_more_logprobs_than_a_message_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(p: Pair) -> None:
        monkeypatch.setattr("node.build.MAX_PAIRS", 2 * len(PROMPT))
        refused = p.reserve(ID, PROMPT, TELLING)
        assert isinstance(refused, Refused)
        assert refused.cause == "invalid"
        p.start(None, ID, PROMPT, replace(TELLING, max_tokens=1))
        (failure,) = p.prefill.link.failures()
        assert failure.cause == "invalid"

    run(scenario)
