"""Beginnings and ends of lanes, addresses, settings."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from kvtransfer.ucx_lane import parse, url_of
from kvtransfer.ucx_receiver import UcxUnitReceiver
from kvtransfer.ucx_sender import UcxUnitSender
from kvtransfer.ucx_worker import settings
from tests.kvtransfer.rig import DECODE as RIG_DECODE
from tests.kvtransfer.rig import header, nothing, run, until
from tests.kvtransfer.ucx_peer import DECODE, PREFILL
from tests.kvtransfer.ucx_rig import ROOT, UcxRig
from wire.errors import ConfigError, TransferError

GOOD = url_of(b"an address of UCX", bytes(16))


@pytest.mark.parametrize(
    "url",
    [
        *("smoke://signal", "", "ucx://", "ucx://127.0.0.1:7000", "ucx://\xe9", "tcp" + GOOD[3:]),
        *(GOOD[:-4], GOOD[:20] + "A" + GOOD[21:], url_of(b"", bytes(16))),
    ],
)
def test_an_impossible_address_is_a_transfer_error(url: str) -> None:
    async def body() -> None:
        sender = UcxUnitSender(PREFILL)
        with pytest.raises(TransferError, match="cannot send") as caught:
            sender.send(url, DECODE, header(), memoryview(b"12345678"), nothing)
        assert caught.value.cause == "transport"
        assert not sender._lanes
        sender.close()

    run(body())


def test_a_peer_is_closed_on_demand() -> None:
    async def body() -> None:
        both = UcxRig()
        url = both.receiver.address.url
        assert both.sender.reaches(url, RIG_DECODE)
        done: list[int] = []
        both.sender.send(
            url, RIG_DECODE, header(), memoryview(bytes(1 << 20)), lambda: done.append(1)
        )
        both.sender.close_peer(url)
        await until(lambda: done)
        await both.hand_over(30)
        both.close()
        both.close()  # twice is once

    run(body())


def test_lanes_to_peers_that_are_long_gone_are_closed() -> None:
    async def body() -> None:
        now = 0.0
        both = UcxRig()
        both.sender = UcxUnitSender(PREFILL, clock=lambda: now)
        both.rig.use(both.sender, both.receiver.address)
        await both.hand_over(5, "first")
        now = 301.0
        other = UcxUnitReceiver(RIG_DECODE, both.rig.receiver, both.rig.received)
        both.rig.address = other.address
        await both.hand_over(5, "second")
        assert list(both.sender._lanes) == [other.address.url]
        other.close()
        both.close()

    run(body())


def test_no_setting_lets_a_peer_write_here() -> None:
    with pytest.raises(ConfigError, match="put_zcopy"):
        settings(rendezvous="put_zcopy")
    assert settings(net_devices="eth0")["NET_DEVICES"] == "eth0"


def test_without_ucxx_it_is_one_clear_line() -> None:
    code = """
import sys
sys.modules["ucxx"] = None
from kvtransfer.ucx_receiver import UcxUnitReceiver
from kvtransfer.ucx_lane import parse, url_of
from kvtransfer.ucx_sender import UcxUnitSender
from kvtransfer.ucx_worker import why_unavailable
print(UcxUnitReceiver.__name__, UcxUnitSender.__name__, why_unavailable())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        "UcxUnitReceiver UcxUnitSender the ucx transport is not available: "
    )
    assert done.stdout.count("\n") == 1


def listening() -> set[tuple[str, int]]:
    """The addresses at which this process listens."""
    found = psutil.Process().net_connections("inet")
    listeners = [socket.laddr for socket in found if socket.status == psutil.CONN_LISTEN]
    return {(address.ip, address.port) for address in listeners}


def test_nobody_listens_but_on_loopback() -> None:
    """Unless told otherwise; and nobody does when all is closed."""
    before = listening()  # ucxx keeps the workers of sends that other tests have ended

    async def body() -> None:
        both = UcxRig()
        await both.hand_over(30)
        ours = listening() - before
        assert len(ours) == 3  # the door, and a worker at either end of the lane
        assert {host for host, _ in ours} == {"127.0.0.1"}
        both.close()

    run(body())
    assert not listening() - before


def test_lanes_end_with_their_senders() -> None:
    async def body() -> None:
        both = UcxRig()
        for count in range(3):
            sender = UcxUnitSender(PREFILL)
            both.rig.use(sender, both.receiver.address)
            await both.hand_over(30, f"r{count}")
            assert len(both.receiver._lanes) == 1
            sender.close()
            await until(lambda: not both.receiver._lanes)
        both.close()

    run(body())


def test_an_address_is_read_as_it_was_written() -> None:
    assert parse(GOOD) == (b"an address of UCX", bytes(16))
