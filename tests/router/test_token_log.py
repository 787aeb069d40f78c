"""The token log under reordering, repetition, loss and lies."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from router.token_log import MAX_HELD_TOKENS, NOTHING, Accepted, Divergence, Gap, TokenLog
from wire.logprobs import UNKNOWN, Logprobs
from wire.types import FinishReason

STOP = FinishReason.STOP


def new_log() -> TokenLog:
    log = TokenLog()
    log.begin_attempt(1)
    return log


def test_appends_in_order() -> None:
    log = new_log()
    assert log.accept(1, 0, (5, 6), None) == Accepted((5, 6))
    assert log.accept(1, 2, (7,), STOP) == Accepted((7,), STOP)
    assert log.tokens == [5, 6, 7]


def test_known_token_is_a_duplicate_and_the_rest_is_new() -> None:
    log = new_log()
    log.accept(1, 0, (5, 6), None)
    assert log.accept(1, 1, (6,), None) == NOTHING
    assert log.accept(1, 0, (5, 6, 7), None) == Accepted((7,))


def test_known_index_with_another_token_diverges_and_changes_nothing() -> None:
    log = new_log()
    log.accept(1, 0, (5, 6), None)
    assert log.accept(1, 1, (9, 8), None) == Divergence(1)
    assert log.tokens == [5, 6]


def test_a_finish_before_what_is_logged_diverges() -> None:
    log = new_log()
    log.accept(1, 0, (5, 6, 7), None)
    assert log.accept(1, 0, (5,), STOP) == Divergence(1)


def test_gap_is_held_until_it_is_filled() -> None:
    log = new_log()
    assert log.accept(1, 2, (7,), STOP) == Gap(0)
    assert log.has_gap
    assert log.accept(1, 0, (5, 6), None) == Accepted((5, 6, 7), STOP)
    assert not log.has_gap


def test_held_tokens_may_diverge_too() -> None:
    log = new_log()
    log.accept(1, 1, (9,), None)
    assert log.accept(1, 0, (5, 6), None) == Divergence(1)
    assert log.tokens == [5, 6]


def test_other_attempts_and_later_updates_are_ignored() -> None:
    log = new_log()
    log.accept(1, 0, (5,), None)
    log.begin_attempt(2)
    assert log.accept(1, 1, (6,), None) == NOTHING
    assert log.accept(3, 1, (6,), None) == NOTHING
    log.accept(2, 0, (5, 7), STOP)
    assert log.accept(2, 2, (8,), None) == NOTHING
    assert log.tokens == [5, 7]


def test_what_is_held_is_bounded() -> None:
    log = new_log()
    for index in range(1, 3 * MAX_HELD_TOKENS):
        log.accept(1, index, (0,), None)
    assert len(log._held) == MAX_HELD_TOKENS


@given(
    truth=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    pieces=st.lists(st.tuples(st.integers(0, 29), st.integers(0, 8)), max_size=40),
)
def test_random_walk_keeps_a_prefix_of_the_truth(
    truth: list[int], pieces: list[tuple[int, int]]
) -> None:
    """Whatever arrives in whatever order: new tokens in sequence are the truth, each one once."""
    log = new_log()
    seen: list[int] = []
    whole = (0, len(truth))
    for start, size in [*pieces, whole]:
        if start >= len(truth):
            continue
        tokens = tuple(truth[start : start + size])
        finish = STOP if start + size >= len(truth) else None
        known_before = len(seen)
        verdict = log.accept(1, start, tokens, finish)
        assert not isinstance(verdict, Divergence)
        if isinstance(verdict, Gap):
            assert verdict.resend_from == known_before < start
        else:
            seen.extend(verdict.tokens)
        assert seen == log.tokens == truth[: len(seen)]
    assert seen == truth
    assert log.finish is STOP


@given(
    truth=st.lists(st.integers(0, 3), min_size=1, max_size=20),
    lie=st.integers(0, 19),
    cut=st.integers(0, 20),
)
def test_a_lie_about_a_logged_token_is_always_noticed(truth: list[int], lie: int, cut: int) -> None:
    log = new_log()
    logged = truth[: max(1, cut)]
    log.accept(1, 0, tuple(logged), None)
    lie %= len(logged)
    told = list(truth)
    told[lie] += 1
    assert log.accept(1, 0, tuple(told), None) == Divergence(lie)
    assert log.tokens == logged


def rows_of(index: int, count: int) -> tuple[bytes, ...]:
    return tuple(b"row %d" % i for i in range(index, index + count))


def test_logprobs_enter_once_with_their_token() -> None:
    log = TokenLog(wants_rows=True)
    log.begin_attempt(1)
    accept = log.accept
    assert accept(1, 0, (5,), None, Logprobs(rows_of(0, 1))) == Accepted((5,), None, (b"row 0",))
    repeated = Logprobs(rows_of(0, 3))
    assert accept(1, 0, (5, 6, 7), None, repeated).rows == rows_of(1, 2)  # type: ignore[union-attr]
    assert accept(1, 0, (5, 6, 7), None, repeated) == NOTHING
    assert accept(1, 4, (9,), None, Logprobs(rows_of(4, 1))) == Gap(3)
    filled = accept(1, 3, (8,), None, Logprobs(rows_of(3, 1)))
    assert filled == Accepted((8, 9), None, rows_of(3, 2))


def test_a_new_token_without_its_logprobs_diverges() -> None:
    for told in (None, Logprobs(), Logprobs((UNKNOWN,)), Logprobs(rows_of(0, 2))):
        log = TokenLog(wants_rows=True)
        log.begin_attempt(1)
        assert log.accept(1, 0, (5,), None, told) == Divergence(0)
        assert log.tokens == []


def test_a_later_attempt_need_not_know_the_logprobs_of_logged_tokens() -> None:
    log = TokenLog(wants_rows=True, num_prompt_rows=2)
    log.begin_attempt(1)
    log.accept(1, 0, (5,), None, Logprobs(rows_of(0, 1), (b"p1", b"p2")))
    log.begin_attempt(2)
    later = log.accept(2, 0, (5, 6), None, Logprobs((UNKNOWN, b"row 1")))
    assert later == Accepted((6,), None, (b"row 1",))
    assert log.prompt_rows == (b"p1", b"p2")


def test_the_first_token_brings_the_prompts_logprobs_or_diverges() -> None:
    for told in (None, Logprobs(), Logprobs((), (b"p1",)), Logprobs((), (b"p1", UNKNOWN))):
        log = TokenLog(num_prompt_rows=2)
        log.begin_attempt(1)
        assert log.accept(1, 0, (5,), None, told) == Divergence(0)
    log = TokenLog(num_prompt_rows=2)
    log.begin_attempt(1)
    assert log.accept(1, 0, (5,), None, Logprobs((), (b"p1", b"p2"))) == Accepted((5,))
    assert log.accept(1, 1, (6,), None, None) == Accepted((6,))
