"""Requests that a decode node serves alone, from their prompt on, beside what others hand over."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from node.router_link import RouterLink
from tests.node.pair import ID, PROMPT, SAMPLING, Pair, expected
from tests.node.test_roles import LATER, LONG, TELLING, check_logprobs, run
from tests.node.test_search_roles import SEARCH, check, found
from wire.request_messages import Abort, Ack, Generate, Granted, Refused, Resend, TokenUpdate
from wire.types import AttemptId, FinishReason, SamplingParams

OTHER = AttemptId("other", 1)


def generate(
    p: Pair,
    id: AttemptId = ID,
    tokens: tuple[int, ...] = PROMPT,
    sampling: SamplingParams = SAMPLING,
    *,
    num_known: int = 0,
) -> None:
    """As a router offers it; the last `num_known` tokens are output of an earlier attempt."""
    p.decode.tell(Generate(id, tokens, len(tokens) - num_known, sampling))


def refusal(p: Pair) -> str:
    answer = p.decode.link.heard[-1]
    assert isinstance(answer, Refused)
    return answer.cause


# ---------------------------------------------------------------- as it should be


def test_one_node_answers_alone() -> None:
    async def scenario(p: Pair) -> None:
        generate(p)
        assert p.decode.link.updates() == [TokenUpdate(ID, 0, ())], "taken, before any step"
        assert await p.finish() == expected()
        assert not p.prefill.link.heard
        assert p.decode.role.num_attempts == len(p.decode.role._outbox) == 0

    run(scenario)


def test_the_first_token_says_how_the_prompt_was_computed() -> None:
    async def scenario(p: Pair) -> None:
        generate(p)
        assert await p.finish() == expected()
        generate(p, OTHER, LONG)
        assert await p.finish(OTHER) == expected(LONG)
        generate(p, LATER)
        assert await p.finish(LATER) == expected()
        for id, steps, cached in ((ID, 2, 0), (OTHER, 4, 8), (LATER, 1, 8)):
            told = [u for u in p.decode.link.updates(id) if u.timing is not None]
            assert [u.num_cached_tokens for u in told] == [cached]
            assert told[0].timing is not None
            assert (told[0].timing.num_steps, len(told[0].tokens)) == (steps, 1)
        assert p.decode.shell.stats.prefix_hits == 16

    run(scenario, max_num_batched_tokens=8)


def test_prompts_are_computed_between_the_tokens_of_others() -> None:
    async def scenario(p: Pair) -> None:
        p.start(p.grant())
        await p.until(lambda: p.decode.engine.has_work())
        generate(p, OTHER, LONG)
        num_told = len(p.decode.link.updates())
        p.decode.work()
        p.decode.work()
        assert len(p.decode.link.updates()) == num_told + 2
        assert p.decode.link.output(OTHER)[0] == []
        assert await p.finish() == expected()
        assert await p.finish(OTHER) == expected(LONG)

    run(scenario, max_num_batched_tokens=8, decode_blocks=64)


def test_a_later_attempt_goes_on_and_repeats_what_is_known() -> None:
    async def scenario(p: Pair) -> None:
        known = tuple(expected(PROMPT, TELLING)[0][:3])
        generate(p, ID, (*PROMPT, *known), TELLING, num_known=3)
        (first,) = p.decode.link.updates()
        assert (first.index, first.tokens) == (0, known)
        assert await p.finish() == expected(PROMPT, TELLING)
        check_logprobs(p.decode.link.updates(), PROMPT, first=3)

    run(scenario)


def test_logprobs_of_tokens_and_of_a_prompt_in_chunks() -> None:
    async def scenario(p: Pair) -> None:
        generate(p, ID, LONG, TELLING)
        assert await p.finish() == expected(LONG, TELLING)
        taken, *updates = p.decode.link.updates()
        assert taken == TokenUpdate(ID, 0, ())
        check_logprobs(updates, LONG)

    run(scenario, max_num_batched_tokens=8, decode_blocks=64)


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_a_search(ignore_eos: bool) -> None:
    async def scenario(p: Pair) -> None:
        sampling = replace(SEARCH, ignore_eos=ignore_eos)
        generate(p, ID, PROMPT, sampling)
        await p.until(lambda: found(p))
        check(found(p), sampling)
        assert p.decode.link.output() == ([], None)
        (told,) = [u for u in p.decode.link.updates() if u.timing is not None]
        assert told.num_cached_tokens == 0
        assert p.decode.role.num_attempts == 0
        p.decode.tell(Resend(ID, 0))  # the answer got lost
        assert p.decode.link.heard[-1] == found(p)
        p.decode.tell(Ack(ID))

    run(scenario, decode_blocks=40, max_num_batched_tokens=8)


@pytest.mark.parametrize("num_tokens", [1, 5])
def test_what_got_lost_is_repeated(num_tokens: int) -> None:
    async def scenario(p: Pair) -> None:
        generate(p)
        await p.until(lambda: len(p.decode.link.output()[0]) == num_tokens)
        p.decode.link.heard.clear()
        p.decode.tell(Resend(ID, 0))
        assert len(p.decode.link.output()[0]) == num_tokens
        assert await p.finish() == expected()

    run(scenario)


# ---------------------------------------------------------------- what is refused


def test_no_room_now_is_said_at_once() -> None:
    """Reserved room counts, and so does that of prompts that wait for their turn."""

    async def scenario(p: Pair) -> None:
        p.grant()
        generate(p, OTHER)
        assert refusal(p) == "capacity"
        p.decode.tell(Abort(ID))
        generate(p, OTHER)
        generate(p, AttemptId("third", 1))
        assert refusal(p) == "capacity"
        answer = p.reserve(LATER)
        assert isinstance(answer, Refused)
        assert answer.cause == "capacity"
        assert await p.finish(OTHER) == expected()

    run(scenario, decode_blocks=6)


REFUSED: dict[str, dict[str, Any]] = {
    "invalid": {"tokens": (1, 24)},
    "too_long": {"tokens": tuple([1] * 64)},
}


@pytest.mark.parametrize("cause", REFUSED)
def test_what_cannot_be_served_is_refused(cause: str) -> None:
    async def scenario(p: Pair) -> None:
        generate(p, **REFUSED[cause])
        assert refusal(p) == cause
        assert p.decode.role.num_attempts == len(p.decode.role._outbox) == 0

    run(scenario)


def test_one_token_of_room_is_enough_without_a_handoff() -> None:
    async def scenario(p: Pair) -> None:
        prompt = tuple([1] * 63)
        assert isinstance(p.reserve(ID, prompt), Refused)
        generate(p, OTHER, prompt)
        tokens, finish = await p.finish(OTHER)
        assert (len(tokens), finish) == (1, FinishReason.LENGTH)

    run(scenario)


def test_draining_takes_nothing_new_and_ends_what_is_there() -> None:
    async def scenario(p: Pair) -> None:
        generate(p)
        p.decode.role.drain()
        generate(p, OTHER)
        assert refusal(p) == "draining"
        assert await p.finish() == expected()

    run(scenario)


# ---------------------------------------------------------------- attempts


def test_asked_again_nothing_more_happens() -> None:
    async def scenario(p: Pair) -> None:
        generate(p)
        generate(p)
        assert len(p.decode.link.updates()) == 1
        await p.until(lambda: p.decode.link.output()[1])
        generate(p)  # ended, and not acknowledged
        p.decode.tell(Ack(ID))
        assert p.decode.link.output() == expected()
        generate(p)
        assert refusal(p) == "superseded"

    run(scenario)


def test_an_abort_that_comes_first_is_remembered() -> None:
    async def scenario(p: Pair) -> None:
        p.decode.tell(Abort(ID))
        generate(p)
        assert refusal(p) == "superseded"
        generate(p, LATER)
        assert await p.finish(LATER) == expected()

    run(scenario)


@pytest.mark.parametrize("turns", [0, 1, 3])
def test_an_abort_frees_everything_within_a_step(turns: int) -> None:
    async def scenario(p: Pair) -> None:
        generate(p, ID, LONG)
        for _ in range(turns):
            p.decode.work()
        p.decode.tell(Abort(ID))
        assert p.decode.balanced
        assert p.decode.role.num_attempts == 0
        num_heard = len(p.decode.link.heard)
        p.decode.work()
        assert len(p.decode.link.heard) == num_heard

    run(scenario, max_num_batched_tokens=8)


def test_later_attempts_end_earlier_ones_of_either_kind() -> None:
    async def scenario(p: Pair) -> None:
        generate(p, ID)
        p.decode.work()
        p.start(p.grant(LATER), LATER)  # in place, then handed over
        assert p.decode.role.num_attempts == 1
        generate(p, ID)
        assert refusal(p) == "superseded"
        third = AttemptId(ID.request, 3)
        generate(p, third)  # and in place again, before it has arrived
        assert p.decode.role.num_attempts == 1
        p.prefill.tell(Abort(LATER))
        assert await p.finish(third) == expected()
        assert p.decode.link.output(LATER)[0] == []

    run(scenario, decode_blocks=48)


def test_an_engine_that_does_not_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(p: Pair) -> None:
        def refuse(request: Any, *, only_with_room: bool) -> None:
            raise ValueError("something does not fit")

        monkeypatch.setattr(p.decode.engine, "add", refuse)
        generate(p)
        (failure,) = p.decode.link.failures()
        assert (failure.cause, failure.retryable) == ("internal", True)
        assert p.decode.role.num_attempts == len(p.decode.role._outbox) == 0

    run(scenario)


@pytest.mark.parametrize("end", ["drained", "a failed step", "its router is lost"])
def test_endings_from_outside(end: str) -> None:
    async def scenario(p: Pair) -> None:
        generate(p)
        p.decode.work()
        role, link = p.decode.role, p.decode.link
        if end == "drained":
            role.fail_all("drained", "the node is shutting down")
        elif end == "a failed step":
            role.fail([str(ID)], "internal", "boom")
        else:
            role.router_lost(cast(RouterLink, link))
        assert [failure.retryable for failure in link.failures()] == [True]
        assert role.num_attempts == len(role._outbox) == 0
        assert isinstance(p.reserve(LATER), Granted)
        p.decode.tell(Abort(LATER))

    run(scenario)
