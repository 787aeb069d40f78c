"""Nodes that say the wrong thing: commits again and again, or for a lease that is somebody else's;
nodes of another model, another layout or another version.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.bundled_model import DEFAULT_MODEL
from tests.e2e.conftest import MakeFleet
from tests.e2e.fleet import Count, Fleet, handoffs, wait_until
from tests.e2e.questions import (
    Question,
    answer_to,
    asking,
    assert_right,
    assert_wrong,
    num_tokens,
    right_answer,
)
from wire.messages import PROTOCOL_VERSION

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

# Equally long, with different first tokens.
MINE = Question("method", num_lines=5, seed=4, tail="    return self.")
THEIRS = Question("function", num_lines=5, seed=1, tail="    return self.")


@pytest.fixture(scope="module")
def shared(make_shared_fleet: MakeFleet) -> Fleet:
    fleet = make_shared_fleet()
    fleet.start_router()
    for name in ("prefill-0", "prefill-1", "decode-0"):
        fleet.start_node(name[:-2], name, "--lease-ttl-s", "3")
    for node in fleet.nodes.values():
        node.wait_ready()
    fleet.wait_for_nodes()
    for question in (MINE, THEIRS):
        right_answer(fleet, question)
    assert num_tokens(fleet, MINE) == num_tokens(fleet, THEIRS), "manifests could not be confused"
    assert fleet.known[MINE].text[:3] != fleet.known[THEIRS].text[:3], "nor would that be seen"
    return fleet


@pytest.fixture
def fleet(shared: Fleet) -> Iterator[Fleet]:
    yield shared
    shared.heal()


def test_commits_that_are_said_again_and_again(fleet: Fleet) -> None:
    for node in fleet.role("prefill"):
        node.order("repeat_commits")
    committed = handoffs(fleet.nodes["decode-0"], "committed")
    for question in (MINE, THEIRS, MINE, THEIRS):
        assert_right(fleet, question, answer_to(fleet, question))
    assert committed.since() == 4
    assert sum(len(node.look()["done"]) for node in fleet.role("prefill")) == 4


@pytest.mark.parametrize(
    ("blind_to", "is_right"),
    [((), True), (("trust_claims",), True), (("trust_claims", "trust_digests"), False)],
    ids=["checked", "digests alone", "control"],
)
def test_a_commit_for_somebody_elses_lease(
    fleet: Fleet, blind_to: tuple[str, ...], is_right: bool
) -> None:
    """One node has sent its blocks and stands still; another one commits the lease as its own."""
    decode = fleet.nodes["decode-0"]
    for order in blind_to:
        decode.order(order)
    for node in fleet.role("prefill"):
        node.order("withhold_first_tokens")
    landed = Count(decode, "baton_transfer_bytes_received_total")
    with asking(fleet, MINE) as mine:
        wait_until(lambda: landed.since() == num_bytes(fleet, MINE), "all blocks are there")
        (silent,) = (node for node in fleet.role("prefill") if node.look()["leases"])
        (other,) = (node for node in fleet.role("prefill") if node is not silent)
        silent.send(signal.SIGSTOP)
        other.behave()
        ((lease, _),) = decode.look()["leases"]
        other.order("claim_lease", lease=lease)
        assert_right(fleet, THEIRS, answer_to(fleet, THEIRS))
        assert len(other.look()["done"]) == 1
        (assert_right if is_right else assert_wrong)(fleet, MINE, mine.result(60))
        silent.send(signal.SIGKILL)  # else it would wait for its own commit's turn
        silent.wait(10)


def num_bytes(fleet: Fleet, question: Question) -> int:
    """Of the KV of its prompt."""
    layers, kv_heads, head_dim, fp32 = 8, 2, 64, 4
    return num_tokens(fleet, question) * layers * 2 * kv_heads * head_dim * fp32


# ---------------------------------------------------------------- nodes that do not belong here


@pytest.fixture(scope="module")
def other_revision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model under the same name, with one number of one weight changed."""
    folder = tmp_path_factory.mktemp("revision") / DEFAULT_MODEL.name
    shutil.copytree(DEFAULT_MODEL, folder)
    weights = next(folder.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-2] ^= 1  # the lowest bit of an fp16
    weights.chmod(0o600)
    weights.write_bytes(data)
    return folder


def test_another_revision_of_the_model_is_refused(fleet: Fleet, other_revision: Path) -> None:
    stranger = fleet.start_stranger("decode", "stranger", model=other_revision)
    assert stranger.wait(30) == 1
    assert "refused this node: this fleet serves model" in stranger.log.read_text()
    assert_right(fleet, MINE, answer_to(fleet, MINE))


def test_another_layout_is_refused(fleet: Fleet) -> None:
    stranger = fleet.start_stranger(
        "decode", "stranger", orders=[("claim_layout", {"head_dim": 32})]
    )
    assert stranger.wait(30) == 1
    assert "refused this node: KV layouts do not fit" in stranger.log.read_text()
    assert_right(fleet, MINE, answer_to(fleet, MINE))


def test_another_version_of_the_protocol_is_refused(fleet: Fleet) -> None:
    assert fleet.router is not None
    malformed = Count(fleet.router, "baton_router_malformed_messages")
    stranger = fleet.start_stranger("prefill", "stranger", orders=[("speak", {"version": 77})])
    wait_until(lambda: malformed.since() > 0, "the router has heard it")
    assert_right(fleet, MINE, answer_to(fleet, MINE))
    assert "peer speaks version 77" in fleet.router.log.read_text()
    refusal = f"does not let this node in: peer speaks version {PROTOCOL_VERSION}, this node 77"
    wait_until(lambda: refusal in stranger.log.read_text(), "the stranger says why")
    stranger.send(signal.SIGKILL)
    stranger.wait(10)
