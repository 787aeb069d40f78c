"""`/` and its files. They hold no secrets and need no key; what the page asks for does.

The page loads nothing from elsewhere and no frame may hold it: its headers say so to the browser.
"""

from __future__ import annotations

import hashlib
from importlib import resources

from aiohttp import web

HOME = "/"
FOLDER = "/console/"
_TYPES = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
}
_HEADERS = {
    "Cache-Control": "no-cache",  # asked again each time, answered 304 while it is the same
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def is_console(path: str) -> bool:
    """Whether everybody may read what lies at this path."""
    return path == HOME or path.startswith(FOLDER)


class ConsolePages:
    """Handlers of the page and its files, which are read once."""

    def __init__(self) -> None:
        folder = resources.files("router.console").joinpath("static")
        self._files = {file.name: file.read_bytes() for file in folder.iterdir()}
        self._tags = {
            name: hashlib.sha256(body).hexdigest()[:16] for name, body in self._files.items()
        }

    def routes(self) -> list[web.RouteDef]:
        return [web.get(HOME, self.home), web.get(FOLDER + "{name}", self.file)]

    async def home(self, request: web.Request) -> web.Response:
        """The page itself."""
        return self._answer(request, "index.html")

    async def file(self, request: web.Request) -> web.Response:
        """A script, the style or the icon."""
        name = request.match_info["name"]
        if name not in self._files:
            raise web.HTTPNotFound
        return self._answer(request, name)

    def _answer(self, request: web.Request, name: str) -> web.Response:
        tag = self._tags[name]
        headers = {**_HEADERS, "ETag": f'"{tag}"'}
        if any(known.value == tag for known in request.if_none_match or ()):
            return web.Response(status=304, headers=headers)
        kind = _TYPES[name.rpartition(".")[2]]
        return web.Response(
            body=self._files[name], content_type=kind, charset="utf-8", headers=headers
        )
