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
from router.app import make_app, make_private_app
from router.choice import Choice
from router.choice_maker import ChoiceMaker
from router.config import RouterConfig, is_loopback
from router.control import Control
from router.debug_pages import DebugPages
from router.deliveries import Deliveries
from router.errors import unavailable
from router.fleet import Fleet
from router.judge import Judge
from router.metrics import RouterMetrics
from router.node_chooser import NodeChooser
from router.pace import LivePace
from router.request_log import RequestLog
from router.requests import Requests
from router.responses.sqlite_store import SqliteStore, StoreLimits
from router.serving import Serving
from router.tokenizer import load_tokenizer
from router.tuning import FleetTuner
from router.worker_sites import WorkerSites
from tuner.goodput import Slo
from tuner.profile import load_profile
from wire.errors import ConfigError
from wire.fleet_key import load_key
from wire.messages import Message
from wire.types import NodeId

log = logging.getLogger(__name__)

_POLL_S = 0.02
_CHAINED_BODIES = 4  # a conversation may be so many times larger than one body
_REJOIN_S = 10.0  # after it a worker that returns serves without nodes, as a first one does


class RouterServer:
    """One router in the running event loop."""

    def __init__(self, config: RouterConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._metrics = RouterMetrics()
        self._log = RequestLog(config.debug_requests)
        self._clock = clock
        self._runner: web.AppRunner | None = None
        self._site: web.TCPSite | None = None
        self._access = Access(config.access, clock, config.place)
        self._pace = LivePace()
        self._judge = Judge(config.rules, self._pace)
        self._worker = None if config.place is None else WorkerSites(config.place)
        self._ssl = config.access.ssl_context()
        tokenizer = None if config.tokenizer is None else load_tokenizer(config.tokenizer)
        fleet = Fleet(config.node_timeout_s, config.node_stall_s)
        self._chooser = NodeChooser(fleet, self._judge)
        self.control = Control(
            config.control_url,
            fleet,
            self._make_requests,
            heartbeat_s=config.heartbeat_s,
            tokenizer=tokenizer,
            key=load_key(config.key_file),
            control_ports=() if config.place is None else config.place.control_ports,
            clock=clock,
            on_switch=lambda switch: self._metrics.switched(switch.outcome, switch.seconds or 0.0),
        )
        choices = ChoiceMaker(self._chooser, config.limits, self._metrics, clock)
        self.serving = Serving(
            config, self.control, choices, self._metrics, self._log, self._access.charge, clock
        )
        self._store = open_store(config)
        self._tuner = self._make_tuner()
        self.http_url = ""

    def _make_requests(self, fleet: Fleet, send: Callable[[NodeId, Message], None]) -> Requests:
        admission: Admission[Choice] = Admission(self._config.max_streams, self._config.max_queue)
        metrics, clock = self._metrics, self._clock
        deliveries = Deliveries(fleet, self._chooser, metrics, send, clock)
        return Requests(fleet, admission, metrics, self._log, self._pace, deliveries, clock)

    def _make_tuner(self) -> FleetTuner | None:
        """Of several workers the first one tunes. Raises ConfigError."""
        config = self._config
        if config.tune == "off" or config.tune_profile is None:
            return None
        if config.place is not None and config.place.index:
            return None
        tuner = FleetTuner(
            load_profile(config.tune_profile),
            Slo(config.slo_ttft_ms / 1e3, config.slo_tpot_ms / 1e3),
            self.control,
            self._metrics,
            self._clock,
            dry_run=config.tune == "dry-run",
            num_workers=1 if config.place is None else len(config.place.control_ports),
        )
        self.control.requests.observed = tuner.observed
        self.control.describe_tuner = tuner.as_json
        return tuner

    async def start(self) -> None:
        """Begin to serve, and bind HTTP. Raises ConfigError."""
        config = self._config
        self.control.start()
        if self._tuner is not None:
            self._tuner.start()
        if config.place is not None and config.place.returns:
            await self._until_ready()
        app = make_app(
            self.serving,
            self.control,
            self._judge,
            self._metrics,
            self._access,
            config.max_body_bytes,
            self._store,
            self._debug_pages(),
            self._worker,
            config.console,
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
            self._runner,
            config.host,
            config.port,
            backlog=1024,
            ssl_context=self._ssl,
            reuse_port=config.place is not None or None,
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
        if self._worker is not None:
            await self._worker.start(self.private_app())

    def private_app(self) -> web.Application:
        """What this worker alone has to tell, for the launcher that sums it up."""
        debug = DebugPages(self._log, self._clock) if self._log.enabled else None
        return make_private_app(self.serving, self.control, self._metrics, debug)

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
        if self._tuner is not None:
            await self._tuner.close()
        if self._site is not None and self.http_url:
            await self._site.stop()
        await self._drain()
        self.control.requests.fail_all(unavailable("The server is shutting down.", "shutting_down"))
        if self._runner is not None:
            await self._runner.cleanup()
        if self._worker is not None:
            await self._worker.close()
        await self.control.close()
        await self._store.close()

    async def _until_ready(self) -> None:
        deadline = self._clock() + _REJOIN_S
        while not self.control.ready and self._clock() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)  # nodes and tokenizer come in many ways

    async def _drain(self) -> None:
        deadline = self._clock() + self._config.shutdown_timeout_s
        while len(self.control.requests) and self._clock() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)  # requests end in many places; nobody else waits for all


def open_store(config: RouterConfig) -> SqliteStore:
    """Where this router keeps responses. Raises ConfigError.

    Workers without a file of the operator's share one in their own folder, as the next request of
    a conversation may come to any of them.
    """
    path = config.response_store
    if path is None and config.place is not None:
        path = config.place.folder / "responses"
    limits = StoreLimits(
        config.response_ttl_s, config.response_store_bytes, _CHAINED_BODIES * config.max_body_bytes
    )
    return SqliteStore(path, limits)


async def run(config: RouterConfig, on_ready: Callable[[RouterServer], None]) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigError if it cannot start."""
    server = RouterServer(config)
    stop = asyncio.Event()
    _stop_on_signals(stop)
    stopped = asyncio.create_task(stop.wait())
    start = asyncio.create_task(server.start())
    try:
        await asyncio.wait((start, stopped), return_when=asyncio.FIRST_COMPLETED)
        if start.done():
            await start
            on_ready(server)
        await stopped
    finally:
        start.cancel()
        stopped.cancel()
        await asyncio.gather(start, stopped, return_exceptions=True)
        await server.close()


def _stop_on_signals(stop: asyncio.Event) -> None:
    """SIGINT is left alone where the parent ignores it (a launcher owns Ctrl-C then)."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        loop.add_signal_handler(signal.SIGINT, stop.set)
