"""A router's life: bind, serve, and end cleanly on SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Callable

from aiohttp import web

from router.access import Access
from router.admission import Admission
from router.app import make_app
from router.choice import Choice
from router.config import RouterConfig, is_loopback
from router.control import Control
from router.debug_pages import DebugPages
from router.errors import unavailable
from router.fleet import Fleet
from router.metrics import RouterMetrics
from router.request_log import RequestLog
from router.requests import Requests
from router.serving import Serving
from router.tokenizer import load_tokenizer
from wire.errors import ConfigError
from wire.fleet_key import load_key
from wire.messages import Message
from wire.types import NodeId

log = logging.getLogger(__name__)

_POLL_S = 0.02


class RouterServer:
    """One router in the running event loop."""

    def __init__(self, config: RouterConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._metrics = RouterMetrics()
        self._log = RequestLog(config.debug_requests)
        self._clock = clock
        self._runner: web.AppRunner | None = None
        self._site: web.TCPSite | None = None
        self._access = Access(config.access, clock)
        self._ssl = config.access.ssl_context()
        tokenizer = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
        self.control = Control(
            config.control_url,
            Fleet(config.node_timeout_s, config.node_stall_s),
            self._make_requests,
            heartbeat_s=config.heartbeat_s,
            tokenizer=tokenizer,
            key=load_key(config.key_file),
            clock=clock,
        )
        self.serving = Serving(
            config, self.control, self._metrics, self._log, self._access.charge, clock
        )
        self.http_url = ""

    def _make_requests(self, fleet: Fleet, send: Callable[[NodeId, Message], None]) -> Requests:
        admission: Admission[Choice] = Admission(self._config.max_streams, self._config.max_queue)
        return Requests(fleet, admission, self._metrics, self._log, send, self._clock)

    async def start(self) -> None:
        """Bind HTTP and begin to serve. Raises ConfigError."""
        config = self._config
        app = make_app(
            self.serving,
            self.control,
            self._metrics,
            self._access,
            config.max_body_bytes,
            self._debug_pages(),
        )
        self._runner = web.AppRunner(
            app,
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=1.0,
            keepalive_timeout=config.idle_connection_s,
        )
        await self._runner.setup()
        self._site = web.TCPSite(
            self._runner, config.host, config.port, backlog=1024, ssl_context=self._ssl
        )
        try:
            await self._site.start()
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {config.host}:{config.port}: {error.strerror or error}"
            ) from error
        host, port = self._runner.addresses[0][:2]
        scheme = "http" if self._ssl is None else "https"
        self.http_url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        if self._ssl is None and config.access.has_keys and not is_loopback(config.host):
            log.warning("API keys travel unencrypted: give --ssl-certfile, or put a proxy in front")
        self.control.start()

    def _debug_pages(self) -> DebugPages | None:
        """They are for whoever runs the router: nobody else must reach them."""
        protected = is_loopback(self._config.host) or self._config.access.has_keys
        if not self._log.enabled or not protected:
            return None
        return DebugPages(self._log, self._clock)

    async def close(self) -> None:
        """Stop accepting, let requests finish for a while, end the others, close."""
        if self.serving.closing:
            return
        self.serving.closing = True
        if self._site is not None and self.http_url:
            await self._site.stop()
        await self._drain()
        self.control.requests.fail_all(unavailable("The server is shutting down.", "shutting_down"))
        if self._runner is not None:
            await self._runner.cleanup()
        await self.control.close()

    async def _drain(self) -> None:
        deadline = self._clock() + self._config.shutdown_timeout_s
        while len(self.control.requests) and self._clock() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)  # requests end in many places; nobody else waits for all


async def run(config: RouterConfig, on_ready: Callable[[RouterServer], None]) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigError if it cannot start."""
    server = RouterServer(config)
    stop = asyncio.Event()
    _stop_on_signals(stop)
    try:
        await server.start()
        on_ready(server)
        await stop.wait()
    finally:
        await server.close()


def _stop_on_signals(stop: asyncio.Event) -> None:
    """SIGINT is left alone where the parent ignores it (a launcher owns Ctrl-C then)."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        loop.add_signal_handler(signal.SIGINT, stop.set)
