"""One of several workers: what it tells the launcher of itself, and what it asks it about all."""

from __future__ import annotations

import aiohttp
from aiohttp import web

from router.debug_pages import wants_text
from router.errors import unavailable
from router.place import Place

_TIMEOUT = aiohttp.ClientTimeout(total=10.0)  # the launcher waits less for each worker


class WorkerSites:
    """Pages on the shared port that speak for all workers, and the private ones of this worker."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._runner: web.AppRunner | None = None
        self._session: aiohttp.ClientSession | None = None

    async def start(self, private_app: web.Application) -> None:
        """Serve `private_app` to the launcher."""
        connector = aiohttp.UnixConnector(path=str(self._place.launcher_socket))
        self._session = aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT)
        self._runner = web.AppRunner(private_app, access_log=None)
        await self._runner.setup()
        await web.UnixSite(self._runner, str(self._place.own_socket)).start()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
        if self._runner is not None:
            await self._runner.cleanup()

    def routes(self, with_debug: bool) -> list[web.RouteDef]:
        """`/metrics`, `/load` and the debug pages, over all workers."""
        debug = [
            web.get("/debug/requests", self._forward_debug),
            web.get("/debug/requests/{id}", self._forward_debug),
        ]
        return [
            web.get("/metrics", self._forward),
            web.get("/load", self._forward),
            *(debug if with_debug else []),
        ]

    async def _forward(self, request: web.Request) -> web.Response:
        return await self._ask(request.path)

    async def _forward_debug(self, request: web.Request) -> web.Response:
        kind = "text" if wants_text(request) else "json"
        return await self._ask(f"{request.rel_url.raw_path}?format={kind}")

    async def _ask(self, path: str) -> web.Response:
        assert self._session is not None, "not started"
        try:
            async with self._session.get(f"http://all{path}") as answer:
                return web.Response(
                    status=answer.status,
                    body=await answer.read(),
                    headers={"Content-Type": answer.headers["Content-Type"]},
                )
        except (aiohttp.ClientError, TimeoutError) as error:
            raise unavailable("The other workers cannot be asked now.", "no_workers") from error
