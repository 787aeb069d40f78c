"""A decode node that dies, stops or is closed while blocks go to it over UCX."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from kvtransfer.transport import TransferStats
from kvtransfer.ucx_receiver import UcxUnitReceiver
from kvtransfer.ucx_sender import UcxUnitSender
from tests.kvtransfer.rig import Rig, header, run, until
from tests.kvtransfer.ucx_peer import DECODE, PREFILL, PrefillEnd
from tests.kvtransfer.ucx_rig import check_delivered, peer
from wire.errors import TransferError


@pytest.mark.parametrize("kib", [4, 1024])
def test_a_killed_decode_node_ends_every_send(
    tmp_path: Path, kib: int, caplog: pytest.LogCaptureFixture
) -> None:
    """It is stopped first, so that the sends are under way when it dies."""

    async def body() -> None:
        async with peer("decode", tmp_path, kib) as other:
            end = PrefillEnd(other.post, kib)
            other.post.send(b"reserve", b"before", b"14")
            await until(lambda: end.ended)
            other.stop_when_granted("during")
            other.post.send(b"reserve", b"during", b"100")
            await until(lambda: "during" in end.source)
            await asyncio.sleep(0.05)
            assert kib == 4 or end.pool.touched  # small units are in the kernel's hands by now
            assert not end.ended.get("during")
            other.signal(signal.SIGKILL)
            await until(lambda: "during" in end.ended and not end.pool.touched)
            assert end.ended["during"].cause == "transport"
            assert end.stats.transport_failures == {"ucx": 1}
            end.close()

    run(body())
    assert "new handoffs avoid ucx" in caplog.text
    assert ("dropped" in caplog.text) is (kib == 1024)


def test_what_was_lost_a_moment_ago_is_not_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0

    async def body() -> None:
        nonlocal now
        receiver = UcxUnitReceiver(DECODE, Rig().receiver, TransferStats())
        url = receiver.address.url
        sender = UcxUnitSender(PREFILL, clock=lambda: now)
        done: list[int] = []

        def send() -> None:
            sender.send(url, DECODE, header(), memoryview(b"12345678"), lambda: done.append(1))

        send()
        send()
        receiver.close()
        await until(lambda: len(done) == 2)
        with pytest.raises(TransferError, match="a moment ago") as caught:
            send()
        assert caught.value.cause == "transport"
        now = 1.0
        with pytest.raises(TransferError, match="unreachable"):
            send()
        assert not sender.reaches(url, DECODE)
        sender.close()
        assert len(done) == 2

    run(body())
    assert "is gone; dropped 2 units" in caplog.text


def test_a_decode_node_that_was_killed_between_handoffs_costs_one_lane(tmp_path: Path) -> None:
    """Its successor has another address; the lane to the old one is closed when it is met."""

    async def body() -> None:
        async with peer("decode", tmp_path, 64) as other:
            end = PrefillEnd(other.post, 64)
            other.post.send(b"reserve", b"first", b"14")
            await until(lambda: end.ended)
            other.signal(signal.SIGKILL)
            await asyncio.to_thread(other.process.wait)
            await until(lambda: end.units._lanes[other.url].lost)
        async with peer("decode", tmp_path, 64) as successor:
            end.post = successor.post
            successor.post.handlers |= other.post.handlers
            successor.post.send(b"reserve", b"second", b"14")
            await until(lambda: len(end.ended) == 2 and not end.pool.touched)
            assert end.stats.handoffs == {"committed": 2}
            assert not end.stats.transport_failures  # no handoff was under way
            assert list(end.units._lanes) == [successor.url]
            await check_delivered(end, successor.post, ["second"], 14)
            end.close()

    run(body())


def test_a_stopped_decode_node_keeps_the_sends_until_the_lane_is_closed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        async with peer("decode", tmp_path, 1024, "impatient") as other:
            end = PrefillEnd(other.post, 1024, stall_s=0.5)
            other.post.send(b"reserve", b"first", b"14")
            await until(lambda: end.ended)
            other.stop_when_granted("second")
            other.post.send(b"reserve", b"second", b"100")
            await until(lambda: "second" in end.source)
            await asyncio.sleep(0.1)
            assert end.pool.touched
            await until(lambda: not end.pool.touched)
            assert end.ended["second"].cause == "transport"
            other.signal(signal.SIGCONT)
            await asyncio.sleep(1.1)  # no handoff is tried on a lane lost a moment ago
            other.post.send(b"reserve", b"third", b"14")
            await until(lambda: "third" in end.ended and not end.pool.touched)
            assert end.stats.handoffs["committed"] == 2
            await check_delivered(end, other.post, ["third"], 14)
            end.close()

    run(body())
    assert "takes no units" in caplog.text


def test_closing_with_sends_in_flight_gives_every_block_back_once(tmp_path: Path) -> None:
    """`Pool.end_io` fails on a second time."""

    async def body() -> None:
        async with peer("decode", tmp_path, 1024) as other:
            for number in range(3):
                end = PrefillEnd(other.post, 1024)
                other.post.send(b"reserve", f"r{number}".encode(), b"100")
                await until(lambda end=end: end.source)  # type: ignore[misc]
                await asyncio.sleep(0.005 * number)
                end.close()
                end.close()
                assert not end.pool.touched

    run(body())
