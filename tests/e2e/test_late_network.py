"""A network that stalls for longer than a lease lives, reorders connections or garbles bytes."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import MakeFleet
from tests.e2e.fleet import Count, Fleet, Process, handoffs, wait_until
from tests.e2e.network import REACHED_AT, Network, Relay
from tests.e2e.questions import (
    Question,
    answer_to,
    asking,
    assert_right,
    assert_wrong,
    right_answer,
)

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

QUESTION = Question()
LONG = Question(max_tokens=300)
FLAGS = ("--max-num-batched-tokens", "64", "--lease-ttl-s", "2")


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network() as network:
        yield network


def start(fleet: Fleet) -> Fleet:
    """One prefill node, which sends over TCP, and a decode node that is reached by relays."""
    fleet.start_router()
    fleet.start_node("prefill", "prefill-0", *FLAGS, "--transport", "zmq")
    fleet.start_node("decode", "decode-0", *FLAGS, "--advertise-host", REACHED_AT)
    for node in fleet.nodes.values():
        node.wait_ready()
    fleet.wait_for_nodes()
    return fleet


def relays_of(network: Network, node: Process) -> tuple[Relay, Relay]:
    """In front of its peer socket and of its zmq transport."""
    ports = node.look()["ports"]
    return network.relay(ports["peer"]), network.relay(ports["zmq"])


@pytest.fixture(scope="module")
def shared(make_shared_fleet: MakeFleet) -> Fleet:
    return start(make_shared_fleet())


@pytest.fixture(scope="module")
def relays(shared: Fleet, network: Network) -> tuple[Relay, Relay]:
    relays = relays_of(network, shared.nodes["decode-0"])
    right_answer(shared, QUESTION)  # and the connections are made
    return relays


@pytest.fixture
def fleet(shared: Fleet, relays: tuple[Relay, Relay]) -> Iterator[Fleet]:
    yield shared
    for relay in relays:
        relay.release()
    shared.heal()


POINTS = [("accepted", 1), ("chunk_sent", 1), ("chunk_sent", 3), ("commit_sent", 1)]


@pytest.mark.parametrize(("point", "nth"), POINTS)
def test_everything_arrives_after_the_lease(
    fleet: Fleet, relays: tuple[Relay, Relay], point: str, nth: int
) -> None:
    prefill, decode = fleet.nodes["prefill-0"], fleet.nodes["decode-0"]
    prefill.order("strike", act="stop", point=point, nth=nth)
    expired, committed = handoffs(decode, "expired"), handoffs(decode, "committed")
    with asking(fleet, QUESTION) as answer:
        wait_until(lambda: prefill.stopped, "the prefill node has come to the point")
        for relay in relays:
            relay.hold()
        prefill.send(signal.SIGCONT)
        wait_until(lambda: expired.since() + committed.since() > 0, "the lease has ended")
        for relay in relays:
            relay.release()
        assert_right(fleet, QUESTION, answer.result(60))
    assert point == "commit_sent" or expired.since() > 0


@pytest.mark.parametrize("first", ["commit", "units"])
def test_connections_that_overtake_each_other(
    fleet: Fleet, relays: tuple[Relay, Relay], first: str
) -> None:
    peers, units = relays
    late = units if first == "commit" else peers
    prefill, decode = fleet.nodes["prefill-0"], fleet.nodes["decode-0"]
    received = Count(decode, "baton_transfer_bytes_received_total")
    sent = Count(prefill, "baton_transfer_bytes_sent_total")

    def first_is_there() -> bool:
        states = [state for _, state in decode.look()["leases"]]
        return "COMMITTING" in states if first == "commit" else 0 < received.since() == sent.since()

    late.hold()
    with asking(fleet, QUESTION) as answer:
        wait_until(first_is_there, f"{first} came first")
        late.release()
        assert_right(fleet, QUESTION, answer.result(60))


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "control"])
def test_garbled_bytes(fleet: Fleet, relays: tuple[Relay, Relay], checked: bool) -> None:
    _, units = relays
    decode = fleet.nodes["decode-0"]
    if not checked:
        decode.order("trust_digests")
    rejected = handoffs(decode, "digest")
    units.garble(units.num_bytes + 20_000, units.num_bytes + 30_000)  # within the first unit
    answer = answer_to(fleet, QUESTION)
    if checked:
        assert rejected.since() == 1
        assert_right(fleet, QUESTION, answer)
    else:
        assert_wrong(fleet, QUESTION, answer)


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "control"])
def test_a_dead_nodes_units_arrive_when_their_blocks_are_somebody_elses(
    make_fleet: MakeFleet, network: Network, checked: bool
) -> None:
    """They were under way when the node was killed; its request has taken another way since."""
    fleet = start(make_fleet())
    decode = fleet.nodes["decode-0"]
    _, units = relays_of(network, decode)
    sent = Count(fleet.nodes["prefill-0"], "baton_transfer_bytes_sent_total")
    right_answer(fleet, LONG)
    num_bytes = sent.since()
    decode.order("strike", act="stop", point="token", nth=5, retries=True)
    if not checked:
        decode.order("trust_late_units")
    dropped = Count(decode, 'baton_transfer_units_dropped_total{cause="expired"}')
    units.hold()
    before = units.num_bytes
    with asking(fleet, LONG) as answer:
        wait_until(lambda: units.num_bytes - before > num_bytes, "all units are under way")
        fleet.kill("prefill-0")
        fleet.start_node("prefill", "prefill-1", *FLAGS, "--transport", "shm").wait_ready()
        wait_until(lambda: decode.stopped, "the blocks are in use again")
        units.release()
        decode.send(signal.SIGCONT)
        (assert_right if checked else assert_wrong)(fleet, LONG, answer.result(60))
    assert dropped.since() > 0
    fleet.assert_balanced()
