"""Real nodes over each KV transport: the same text, and what is left when a node is killed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from baton.bundled_model import DEFAULT_MODEL
from kvtransfer.ucx_worker import why_unavailable
from tests.e2e.client import Answer, Client
from tests.e2e.conftest import MakeFleet
from tests.e2e.fleet import Fleet
from tests.e2e.wires import cut_ucx

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

COUNT = 6
needs_ucx = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))


async def ask_all(fleet: Fleet) -> list[Answer]:
    async with Client(fleet.url) as client:
        return await asyncio.gather(
            *(
                client.stream(
                    model=DEFAULT_MODEL.name,
                    prompt=f"def function_{index}(self, value):\n    " * (1 + 9 * index),
                    max_tokens=24,
                    temperature=0.8,
                    seed=index,
                    ignore_eos=True,
                )
                for index in range(COUNT)
            )
        )


def texts(fleet: Fleet) -> list[str]:
    answers = asyncio.run(ask_all(fleet))
    assert all(answer.done and answer.error is None for answer in answers)
    return [answer.text for answer in answers]


def said(fleet: Fleet, transport: str) -> int:
    """How often a prefill node said that blocks go by this transport."""
    return fleet.logs().count(f" by {transport}")


def test_shm_and_zmq_give_the_same_text(make_fleet: MakeFleet) -> None:
    found = {}
    for transport in ("shm", "zmq", "auto"):
        fleet = make_fleet().start(flags=("--transport", transport))
        found[transport] = texts(fleet)
        fleet.assert_balanced()
        assert said(fleet, "zmq" if transport == "zmq" else "shm") == 1
        handed_over = fleet.nodes["decode-0"].metrics()['baton_handoffs_total{outcome="committed"}']
        assert handed_over == COUNT
        fleet.close()
    assert found["shm"] == found["zmq"] == found["auto"]


def test_nodes_without_the_same_transports_find_the_common_one(make_fleet: MakeFleet) -> None:
    fleet = make_fleet()
    fleet.start_router()
    fleet.start_node("prefill", "prefill-0", "--transport", "auto")
    fleet.start_node("decode", "decode-0", "--transport", "zmq")
    for node in fleet.nodes.values():
        node.wait_ready()
    fleet.wait_serving()
    assert len(texts(fleet)) == COUNT
    assert (said(fleet, "shm"), said(fleet, "zmq")) == (0, 1)
    fleet.assert_balanced()


@needs_ucx
def test_ucx_gives_the_text_that_zmq_gives(make_fleet: MakeFleet) -> None:
    fleet = make_fleet().start(flags=("--transport", "ucx"))
    by_ucx = texts(fleet)
    fleet.assert_balanced()
    assert (said(fleet, "ucx"), said(fleet, "zmq")) == (1, 0)
    assert "UCX 1." in fleet.logs()
    assert "tcp/lo" in fleet.logs()
    assert all("UCX  " not in line for line in fleet.logs().splitlines())  # its own log is quiet
    fleet.close()
    fleet = make_fleet().start(flags=("--transport", "zmq"))
    assert texts(fleet) == by_ucx


@needs_ucx
def test_when_ucx_breaks_the_next_transport_stands_in(make_fleet: MakeFleet) -> None:
    fleet = make_fleet().start(flags=("--transport", "ucx,zmq"))
    before = texts(fleet)
    assert (said(fleet, "ucx"), said(fleet, "zmq")) == (1, 0)
    prefill, decode = fleet.nodes["prefill-0"], fleet.nodes["decode-0"]
    cut_ucx(prefill, decode)
    assert texts(fleet) == before
    assert said(fleet, "zmq") >= 1
    assert prefill.metrics()['baton_transport_failures_total{transport="ucx"}'] >= 1
    fleet.assert_balanced()


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
@pytest.mark.parametrize("transport", ["shm", pytest.param("ucx", marks=needs_ucx)])
def test_nothing_is_left_of_a_killed_node(
    make_fleet: MakeFleet, victim: str, transport: str
) -> None:
    fleet = make_fleet().start(prefill=2, decode=2, flags=("--transport", transport))
    before = texts(fleet)
    pids = [node.pid for node in fleet.nodes.values()]
    victim_pid = fleet.nodes[victim].pid
    fleet.kill(victim)
    assert texts(fleet) == before
    fleet.assert_balanced()
    assert not [path for path in Path("/dev/shm").iterdir() if "baton" in path.name]
    if victim.startswith("prefill"):
        for pid in set(pids) - {victim_pid}:
            assert num_foreign_pools(pid) <= 1
    fleet.close()


def num_foreign_pools(pid: int) -> int:
    """Pools of other processes that this one has mapped: read-only ones."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return sum("memfd:baton-kv" in line and " r--s " in line for line in lines)
