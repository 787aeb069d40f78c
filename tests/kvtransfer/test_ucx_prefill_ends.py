"""A prefill node that dies or stops while its blocks come over UCX."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from kvtransfer.lease import LeaseState
from tests.kvtransfer.rig import run, until
from tests.kvtransfer.ucx_peer import DecodeEnd
from tests.kvtransfer.ucx_rig import peer
from wire.types import AttemptId


@pytest.mark.parametrize(("kib", "after_s"), [(4, 0.003), (1024, 0.0), (1024, 0.01), (4096, None)])
def test_a_killed_prefill_node_touches_no_block_any_more(
    tmp_path: Path, kib: int, after_s: float | None
) -> None:
    """Killed before or between its units, or (None) within one; its successor finds order."""

    async def body() -> None:
        async with peer("prefill", tmp_path, kib) as other:
            end = DecodeEnd(other.post, kib)
            end.reserve("first", 14)
            await until(lambda: end.leases)
            end.reserve("second", 100)
            if after_s is None:
                await until(lambda: end.pool.touched)
                other.signal(signal.SIGSTOP)
                await asyncio.sleep(0.05)
                assert end.pool.touched
            else:
                await asyncio.sleep(after_s)
            other.signal(signal.SIGKILL)
            await asyncio.to_thread(other.process.wait)
            await until(lambda: not end.units._lanes and not end.pool.touched)
            for name in ("first", "second"):  # as the router does when it misses the node
                end.receiver.abort(AttemptId(name, 1))
        async with peer("prefill", tmp_path, kib) as successor:
            end.post = successor.post
            successor.post.handlers |= other.post.handlers
            end.reserve("third", 14)
            await until(lambda: len(end.leases) == 3 and not end.pool.touched)
            assert end.leases[-1].state is LeaseState.COMMITTED
            end.close()

    run(body())


def test_a_stopped_prefill_node_loses_its_lane(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What it began cannot be revoked; closing the endpoint ends it, and nothing comes later."""

    async def body() -> None:
        async with peer("prefill", tmp_path, 4096) as other:
            end = DecodeEnd(other.post, 4096, stall_s=0.5)
            end.reserve("first", 100)
            await until(lambda: end.pool.touched)
            other.signal(signal.SIGSTOP)
            await asyncio.sleep(0.05)
            assert end.pool.touched
            end.receiver.abort(AttemptId("first", 1))
            assert end.pool.quarantined
            await until(lambda: not end.pool.touched)
            assert not end.pool.quarantined
            for block in end.pool.blocks:
                block[:] = bytes(len(block))
            other.signal(signal.SIGCONT)
            await asyncio.sleep(0.3)
            assert not any(any(block) for block in end.pool.blocks)
            end.close()
            other.signal(signal.SIGKILL)

    run(body())
    assert "stopped within" in caplog.text
