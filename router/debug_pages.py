"""`/debug/requests`: what the router remembers of requests, for whoever runs it.

As JSON, or as text with `?format=text` or `Accept: text/plain`. Node names and times are nobody
else's business: the routes exist only where the address is one of this machine, or a key is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aiohttp import web

from router.errors import ApiError
from router.request_json import detail, summary
from router.request_log import RequestLog
from router.waterfall import listing, waterfall


class DebugPages:
    """Handlers of the debug routes."""

    def __init__(self, log: RequestLog, clock: Callable[[], float]) -> None:
        self._log = log
        self._clock = clock

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/debug/requests", self.requests),
            web.get("/debug/requests/{id}", self.request),
        ]

    async def requests(self, request: web.Request) -> web.Response:
        """Running ones first, then finished ones, the latest first."""
        now = self._clock()
        return requests_page([summary(record, now) for record in self._log.all()], request)

    async def request(self, request: web.Request) -> web.Response:
        """One request by its response's id, or one choice by that id and `-0`, `-1`, …"""
        found = self._log.find(request.match_info["id"])
        if found is None:
            raise ApiError(404, "No such request is running or remembered.", code="unknown_request")
        record, index = found
        now = self._clock()
        if wants_text(request):
            return web.Response(text=waterfall(record, index, now))
        return web.json_response(detail(record, index, now))


def requests_page(summaries: list[dict[str, Any]], request: web.Request) -> web.Response:
    """The list as `request` wants it."""
    if wants_text(request):
        return web.Response(text=listing(summaries))
    return web.json_response({"requests": summaries})


def wants_text(request: web.Request) -> bool:
    """Whether text is asked for rather than JSON. Raises ApiError."""
    asked = request.query.get("format")
    if asked not in (None, "json", "text"):
        raise ApiError(400, "The formats are json and text.", param="format")
    return asked == "text" or (
        asked is None and request.headers.get("Accept", "").startswith("text/plain")
    )
