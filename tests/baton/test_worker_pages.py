"""Asking all workers: once for all who ask at the same time, and without those who are silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
from aiohttp import web

from baton.worker_pages import Life, WorkerPages


class Worker:
    """Answers `/metrics` with a counter of how often it was asked."""

    def __init__(self, socket: Path) -> None:
        self.life = Life(socket)
        self.num_asked = 0
        self.may_answer = asyncio.Event()
        app = web.Application()
        app.add_routes([web.get("/metrics", self._metrics)])
        self.runner = web.AppRunner(app)

    async def start(self) -> None:
        await self.runner.setup()
        await web.UnixSite(self.runner, str(self.life.socket)).start()

    async def _metrics(self, request: web.Request) -> web.Response:
        self.num_asked += 1
        await self.may_answer.wait()
        return web.Response(text=f"# TYPE asked_total counter\nasked_total {self.num_asked}\n")


@asynccontextmanager
async def asked(folder: Path) -> AsyncIterator[tuple[Worker, WorkerPages, aiohttp.ClientSession]]:
    worker = Worker(folder / "0.sock")
    absent = Life(folder / "1.sock")
    pages = WorkerPages(folder / "all.sock", lambda: [worker.life, absent])
    await worker.start()
    await pages.start()
    connector = aiohttp.UnixConnector(path=str(folder / "all.sock"))
    try:
        async with aiohttp.ClientSession("http://all", connector=connector) as session:
            yield worker, pages, session
    finally:
        worker.may_answer.set()
        await pages.close()
        await worker.runner.cleanup()


async def get(session: aiohttp.ClientSession) -> list[str]:
    async with session.get("/metrics") as answer:
        return (await answer.text()).splitlines()


def test_who_asks_at_the_same_time_gets_one_answer(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with asked(tmp_path) as (worker, _, session):
            several = [asyncio.create_task(get(session)) for _ in range(5)]
            async with asyncio.timeout(20):
                while not worker.num_asked:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            worker.may_answer.set()
            for lines in await asyncio.gather(*several):
                assert "asked_total 1.0" in lines
                assert "baton_router_workers 1.0" in lines, "the other one does not answer"
            assert worker.num_asked == 1
            assert "asked_total 2.0" in await get(session)

    asyncio.run(scenario())


def test_what_a_dead_worker_told_stays(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with asked(tmp_path) as (worker, pages, session):
            worker.may_answer.set()
            assert "asked_total 1.0" in await get(session)
            pages.died(worker.life)
            worker.life = Life(worker.life.socket)
            worker.num_asked = 0  # a new life counts from the start
            assert "asked_total 2.0" in await get(session)

    asyncio.run(scenario())
