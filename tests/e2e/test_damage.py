"""KV that is damaged between two nodes, over every transport: it never becomes a token.

Each test has a control in which the decode node does not look: there the same damage reaches the
answer, so the test could see it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec

import pytest

from tests.e2e.conftest import MakeFleet
from tests.e2e.fleet import Fleet, Process, handoffs
from tests.e2e.questions import (
    Question,
    answer_to,
    asking,
    assert_right,
    assert_wrong,
    num_tokens,
    right_answer,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

THIS = Question("function", num_lines=5)
OTHER = Question("method", num_lines=5, seed=2)
FIRST, LAST = 0, -1  # token of the prompt; the last one is in a partly filled block
ALWAYS = 99
FLAGS = ("--lease-ttl-s", "2")
# Some damage is done to the memory of the prefill node, where no other attempt may find it. On the
# decode node a new request gets new blocks as long as there are any: what is missing stays missing.
NOT_CACHED = "--no-prefix-caching"


@pytest.fixture(scope="module", params=["shm", "zmq", "ucx"])
def shared(make_shared_fleet: MakeFleet, request: pytest.FixtureRequest) -> Fleet:
    if request.param == "ucx" and find_spec("ucxx") is None:
        pytest.skip("ucxx is not installed")
    fleet = make_shared_fleet()
    fleet.start_router()
    flags = (*FLAGS, "--transport", request.param)
    fleet.start_node("prefill", "prefill-0", *flags, NOT_CACHED)
    fleet.start_node("decode", "decode-0", *flags)
    for node in fleet.nodes.values():
        node.wait_ready()
    fleet.wait_for_nodes()
    for question in (THIS, OTHER):
        right_answer(fleet, question)
    assert num_tokens(fleet, THIS) == num_tokens(fleet, OTHER), "units could not change places"
    assert num_tokens(fleet, THIS) % 16, "there is no partly filled block"
    return fleet


@pytest.fixture
def fleet(shared: Fleet) -> Iterator[Fleet]:
    yield shared
    shared.heal()


@pytest.fixture
def prefill(fleet: Fleet) -> Process:
    return fleet.nodes["prefill-0"]


@pytest.fixture
def decode(fleet: Fleet) -> Process:
    return fleet.nodes["decode-0"]


@pytest.fixture(params=["checked", "control"])
def checked(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "checked")


@pytest.mark.parametrize("token", [FIRST, LAST])
def test_a_flipped_bit(fleet: Fleet, decode: Process, token: int, checked: bool) -> None:
    # The highest bit of an exponent, in a key of the first layer.
    decode.order("flip_bit", token=token % num_tokens(fleet, THIS), byte=4 * 40 + 3, bit=6, times=1)
    if not checked:
        decode.order("trust_digests")
    rejected = handoffs(decode, "digest")
    answer = answer_to(fleet, THIS)
    assert len(decode.look()["done"]) == 1
    if checked:
        assert rejected.since() == 1
        assert_right(fleet, THIS, answer)
    else:
        assert_wrong(fleet, THIS, answer)


def test_bits_that_flip_every_time(fleet: Fleet, decode: Process) -> None:
    """Two tries; then an error that says why, instead of an answer."""
    decode.order("flip_bit", token=FIRST, byte=0, bit=0, times=ALWAYS)
    rejected = handoffs(decode, "digest")
    answer = answer_to(fleet, THIS)
    assert answer.error is not None
    assert answer.error["code"] == "digest"
    assert fleet.known[THIS].text.startswith(answer.text)
    assert rejected.since() == 2


@pytest.mark.parametrize("token", [FIRST, LAST])
def test_a_truncated_block(
    fleet: Fleet, prefill: Process, decode: Process, token: int, checked: bool
) -> None:
    prefill.order("truncate", token=token % num_tokens(fleet, THIS), times=1)
    if not checked:
        decode.order("trust_lengths")
        decode.order("trust_digests")
    rejected = handoffs(decode, "transport")
    answer = answer_to(fleet, THIS)
    assert len(prefill.look()["done"]) == 1
    if checked:
        assert rejected.since() == 1
        assert_right(fleet, THIS, answer)
    else:
        assert_wrong(fleet, THIS, answer)


def test_a_truncated_block_fails_by_its_digest_too(
    fleet: Fleet, prefill: Process, decode: Process
) -> None:
    prefill.order("truncate", token=FIRST, times=1)
    decode.order("trust_lengths")
    rejected = handoffs(decode, "digest")
    assert_right(fleet, THIS, answer_to(fleet, THIS))
    assert rejected.since() == 1


def test_a_block_that_was_reused_while_it_was_sent(
    fleet: Fleet, prefill: Process, decode: Process, checked: bool
) -> None:
    prefill.order("reuse_sources")
    if not checked:
        decode.order("trust_digests")
    rejected = handoffs(decode, "digest")
    assert_right(fleet, OTHER, answer_to(fleet, OTHER))
    answer = answer_to(fleet, THIS)
    assert len(prefill.look()["done"]) > 1
    if checked:
        assert rejected.since() == 1
        assert_right(fleet, THIS, answer)
    else:
        assert_wrong(fleet, THIS, answer)


def test_blocks_of_two_requests_in_each_others_place(
    fleet: Fleet, prefill: Process, decode: Process, checked: bool
) -> None:
    prefill.order("swap_blocks")
    if not checked:
        decode.order("trust_digests")
    rejected = handoffs(decode, "digest")
    with ExitStack() as stack:
        answers = {q: stack.enter_context(asking(fleet, q)) for q in (THIS, OTHER)}
    assert len(prefill.look()["done"]) > 1
    if checked:
        assert rejected.since() == 2
    for question, answer in answers.items():
        (assert_right if checked else assert_wrong)(fleet, question, answer.result())
