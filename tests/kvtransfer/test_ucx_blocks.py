"""Blocks arrive over UCX as they are, in another process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kvtransfer.rig import run, until
from tests.kvtransfer.ucx_peer import PrefillEnd
from tests.kvtransfer.ucx_rig import check_delivered, peer


@pytest.mark.parametrize("kib", [1, 47, 49, 1024, 4096])
def test_blocks_arrive_bit_identical(tmp_path: Path, kib: int) -> None:
    """Full ones and a partial one, on both sides of every threshold of UCX."""

    async def body() -> None:
        async with peer("decode", tmp_path, kib) as other:
            end = PrefillEnd(other.post, kib)
            names = [f"r{i}" for i in range(2)]
            for name in names:
                other.post.send(b"reserve", name.encode(), b"14")
            await until(lambda: len(end.ended) == 2 and not end.pool.touched)
            assert end.stats.handoffs == {"committed": 2}
            await check_delivered(end, other.post, names, 14)
            end.close()

    run(body())


def test_two_hundred_units_back_to_back(tmp_path: Path) -> None:
    """To a process that runs torch and ZMQ as well."""

    async def body() -> None:
        async with peer("decode", tmp_path, 64, "torch") as other:
            end = PrefillEnd(other.post, 64)
            other.post.send(b"reserve", b"long", b"800")
            await until(lambda: end.ended and not end.pool.touched)
            assert end.stats.handoffs == {"committed": 1}
            assert end.stats.bytes_sent == 200 * (64 << 10)
            await check_delivered(end, other.post, ["long"], 800)
            end.close()

    run(body())
