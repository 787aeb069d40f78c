"""The response of an event stream: when its status and headers leave."""

from __future__ import annotations

from aiohttp import web

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # else proxies collect events before they pass them on
}


class EventStream(web.StreamResponse):
    """Args:
    more: headers beside those that every stream has.
    with_event: an event follows at once; the headers leave together with it, in one write.
    """

    def __init__(self, more: dict[str, str], *, with_event: bool) -> None:
        super().__init__(headers={**HEADERS, **more})
        # aiohttp's own switch for answers in one piece; a version without it writes twice.
        self._send_headers_immediately = not with_event
