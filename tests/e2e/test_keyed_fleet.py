"""Real processes with a fleet key: they serve; a node with another key or none stays outside."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from baton.bundled_model import DEFAULT_MODEL
from tests.e2e.client import Client
from tests.e2e.conftest import MakeFleet
from tests.e2e.fleet import Fleet
from wire.fleet_key import make_key, write_key

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


def key_file(folder: Path, name: str) -> str:
    write_key(make_key(), folder / name)
    return str(folder / name)


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def keyed_fleet(fleet: Fleet, key: str, *flags: str) -> Fleet:
    fleet.start_router("--key-file", key)
    for role in ("prefill", "decode"):
        fleet.start_node(role, f"{role}-0", "--key-file", key, *flags)
    for node in fleet.nodes.values():
        node.wait_ready()
    fleet.wait_serving()
    return fleet


async def ask(fleet: Fleet) -> str:
    async with Client(fleet.url) as client:
        answer = await client.stream(
            model=DEFAULT_MODEL.name,
            prompt="def read(path):\n    " * 40,
            max_tokens=16,
            temperature=0,
            ignore_eos=True,
        )
    assert answer.done
    assert answer.error is None
    return answer.text


@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_a_fleet_with_a_key_serves(make_fleet: MakeFleet, tmp_path: Path, transport: str) -> None:
    fleet = keyed_fleet(make_fleet(), key_file(tmp_path, "key"), "--transport", transport)
    assert asyncio.run(ask(fleet))
    assert fleet.nodes["decode-0"].metrics()['baton_handoffs_total{outcome="committed"}'] == 1
    fleet.assert_balanced()


def test_a_node_without_the_key_stays_outside_and_says_why(
    make_fleet: MakeFleet, tmp_path: Path
) -> None:
    fleet = keyed_fleet(make_fleet(), key_file(tmp_path, "ours"))
    router = fleet.router
    assert router is not None
    for name, flags, reason in (
        ("alien", ("--key-file", key_file(tmp_path, "theirs")), "does not take this process's"),
        ("naked", (), "it wants a fleet key"),
    ):
        stranger = fleet.start_node("decode", name, *flags, "--router-timeout-s", "2")
        assert stranger.wait(60) == 1
        assert reason in stranger.log.read_text()
        assert "Traceback" not in stranger.log.read_text()
        del fleet.nodes[name]
    until(lambda: router.metrics()["baton_router_refused_connections"] >= 2)
    assert router.log.read_text().count("refused a peer") == 1
    assert asyncio.run(ask(fleet))  # nobody else is disturbed
