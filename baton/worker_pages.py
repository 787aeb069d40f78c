"""What several routers on one port tell together: `/metrics`, `/load` and the debug pages.

A client's request reaches whichever worker the kernel picks; that worker asks here, and here all of
them are asked. One that does not answer in time counts with what it last told.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest

from router.debug_pages import requests_page
from telemetry import metrics
from telemetry.merge import Families, lasting, merge, parse, render

_TIMEOUT = aiohttp.ClientTimeout(total=3.0)


class WorkerMetrics:
    """What the launcher itself measures."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.workers = metrics.ROUTER_WORKERS.gauge(self.registry)
        self.restarts = metrics.ROUTER_WORKER_RESTARTS.counter(self.registry)


@dataclass(frozen=True, slots=True, eq=False)
class Life:
    """One life of a worker, and the Unix socket where it is asked."""

    socket: Path


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    body: bytes
    content_type: str


class WorkerPages:
    """Args:
    listen: the Unix socket where workers ask.
    workers: those that live.
    """

    def __init__(self, listen: Path, workers: Callable[[], Iterable[Life]]) -> None:
        self.metrics = WorkerMetrics()
        self._listen = listen
        self._workers = workers
        self._last: dict[Life, Families] = {}
        self._retired: Families = {}
        self._scrape: asyncio.Task[bytes] | None = None
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application()
        app.add_routes(
            [
                web.get("/metrics", self._metrics_page),
                web.get("/load", self._load_page),
                web.get("/debug/requests", self._requests_page),
                web.get("/debug/requests/{id}", self._request_page),
            ]
        )
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self._listen)).start()

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        if self._scrape is not None:
            await asyncio.wait([self._scrape])

    def died(self, worker: Life) -> None:
        """What it has counted stays."""
        self._retired = merge([self._retired, lasting(self._last.pop(worker, {}))])

    # ------------------------------------------------------------ pages

    async def _metrics_page(self, request: web.Request) -> web.Response:
        """All who ask at the same time get one answer: nobody needs a key, and it costs all."""
        if self._scrape is None or self._scrape.done():
            self._scrape = asyncio.create_task(self._sum_up())
        return web.Response(
            body=await asyncio.shield(self._scrape),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    async def _sum_up(self) -> bytes:
        answers = await self._ask_all("/metrics")
        for worker, answer in answers.items():
            self._last[worker] = parse(answer.body.decode())
        self.metrics.workers.set(len(answers))
        own = parse(generate_latest(self.metrics.registry).decode())
        return render(merge([*self._last.values(), self._retired, own]))

    async def _load_page(self, request: web.Request) -> web.Response:
        loads = [_json(answer)["server_load"] for answer in (await self._ask_all("/load")).values()]
        return web.json_response({"server_load": sum(loads)})

    async def _requests_page(self, request: web.Request) -> web.Response:
        answers = (await self._ask_all("/debug/requests")).values()
        found = [entry for answer in answers for entry in _json(answer)["requests"]]
        found.sort(key=lambda entry: (entry["state"] != "running", -entry["arrived_at"]))
        return requests_page(found, request)

    async def _request_page(self, request: web.Request) -> web.Response:
        """Of the worker that has it, or what any says that has not."""
        answers = (await self._ask_all(request.rel_url.raw_path_qs)).values()
        best = min(answers, key=lambda answer: answer.status, default=None)
        if best is None:
            return web.json_response({}, status=503)
        return web.Response(
            status=best.status, body=best.body, headers={"Content-Type": best.content_type}
        )

    # ------------------------------------------------------------ asking

    async def _ask_all(self, path: str) -> dict[Life, _Answer]:
        """The answers of the workers that live and answer in time."""
        workers = list(self._workers())
        answers = await asyncio.gather(*(_ask(worker, path) for worker in workers))
        alive = set(self._workers())  # one that has died while it was asked has been counted
        return {
            worker: answer
            for worker, answer in zip(workers, answers, strict=True)
            if answer is not None and worker in alive
        }


async def _ask(worker: Life, path: str) -> _Answer | None:
    connector = aiohttp.UnixConnector(path=str(worker.socket))
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT) as session,
            session.get(f"http://worker{path}") as answer,
        ):
            body = await answer.read()
            return _Answer(answer.status, body, answer.headers["Content-Type"])
    except (aiohttp.ClientError, TimeoutError):
        return None


def _json(answer: _Answer) -> Any:
    return json.loads(answer.body)
