"""The parts of `make bench-api` measure what they say."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks.api.bare import start
from benchmarks.api.frontend import measure_frontend
from benchmarks.api.reader import StreamBroken, read_streams
from benchmarks.api.sse import router


def test_frames_of_the_bare_server_are_counted() -> None:
    async def scenario() -> None:
        runner = await start(0)
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        request = b"GET /stream?frames=20&together=5 HTTP/1.1\r\nHost: x\r\n\r\n"
        arrivals = await read_streams(url, request, 5, 21)
        assert 5 * 20 >= arrivals.num_frames > 0
        assert arrivals.seconds > 0
        with pytest.raises(StreamBroken):
            await read_streams(url, request, 5, 99)
        await runner.cleanup()

    asyncio.run(scenario())


@pytest.mark.e2e
def test_a_round_through_the_router(tmp_path: Path) -> None:
    with router(tmp_path, num_tokens=100) as measure:
        rate = measure()
    assert rate.per_second > 0
    assert rate.per_cpu_second > 0


def test_the_frontend(tmp_path: Path) -> None:
    figures = measure_frontend(tmp_path, rounds=3)
    assert figures["frontend_cpu_ms_beyond_tokenizer"] > 0
