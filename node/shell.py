"""A node's life: register, serve, drain, end.

start     peer socket, role, engine thread, HTTP, router links
serve     the beat (heartbeats, expiry) runs off the step loop: a long step stops nothing
switch    on a router's word: drain, then begin a new life with another role; model, blocks and
          prefix cache stay, peer socket, role and router links are new
drain     on SIGTERM: take nothing new, finish what is here, hand back the rest
shutdown  in the reverse order of start
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, ExitStack
from functools import partial

import zmq

from engine.device import use_device
from engine.plan import LayerProgress, StepResult
from kvtransfer.transport import TransferStats
from node.build import BuiltEngine
from node.config import NodeConfig
from node.engine_thread import EngineThread
from node.http import NodeCollector, serve_http
from node.role import Role
from node.role_change import RoleChange
from node.router_link import RouterLink
from node.router_links import RouterLinks
from node.stats import NodeStats
from wire.codec import Envelope
from wire.curve import FleetContext
from wire.fleet_key import load_key
from wire.fleet_messages import (
    CacheEvents,
    Draining,
    FetchCacheSnapshot,
    FetchTokenizer,
    Goodbye,
    Heartbeat,
    Register,
    SwitchRole,
    TokenizerFiles,
)
from wire.messages import Message
from wire.sockets import Hub
from wire.types import NodeId, NodeLoad, new_node_id
from wire.types import Role as RoleName

log = logging.getLogger(__name__)

_TICK_S = 0.02
_LINGER_MS = 300  # how long last words may take to leave
_SHUTTING_DOWN = "the node is shutting down"
_OTHER_ROLE = "the node changes its role"


class NodeShell:
    """One node: the engine, one role, and what connects them to the fleet.

    Args:
        role: the first one.
        make_role: builds each role that this node can have; it gets this shell, with sockets.
        on_ready: called with the node's HTTP address when every router has welcomed it.
    """

    def __init__(
        self,
        config: NodeConfig,
        built: BuiltEngine,
        tokenizer: TokenizerFiles,
        role: RoleName,
        make_role: Mapping[RoleName, Callable[[NodeShell], Role]],
        me: NodeId,
        on_ready: Callable[[str], None],
    ) -> None:
        self.config = config
        self.built = built
        self.engine = built.engine
        self.me = me
        self.context = FleetContext(load_key(config.key_file))
        self.context.setsockopt(zmq.IPV6, config.ipv6)
        self.transfers = TransferStats()  # of all roles that it has had
        self.stats = NodeStats(graph_failures=built.num_failed_graphs)
        self._tokenizer = tokenizer
        self._first_role = role
        self._make_role = make_role
        self._life = ExitStack()  # ends what belongs to one incarnation
        self._change = RoleChange(
            built.engine,
            make_role,
            drain=lambda drain_s: self._drain(drain_s, _OTHER_ROLE),
            next_life=self._next_life,
            on_failure=self._die,
        )
        self._on_ready = on_ready
        self._stop = asyncio.Event()
        self._links = RouterLinks(self._router_lost)
        self._num_malformed_before = 0  # in earlier incarnations
        self._events_sent = 0
        self._ready_told = False
        self._draining = False
        self._exit_code = 0
        self._http_url = ""

    async def run(self) -> int:
        """Serve until told to stop; returns the process's exit code."""
        async with AsyncExitStack() as closing:
            await self._start(closing)
            self._begin_to_beat()
            tick = asyncio.create_task(self._every(lambda: _TICK_S, self._tick), name="tick")
            try:
                await self._stop.wait()
                await self._change.stop()
                await self._drain(self.config.drain_timeout_s, _SHUTTING_DOWN)
            finally:
                timers = (self._beating, tick)
                for timer in timers:
                    timer.cancel()
                await asyncio.gather(*timers, return_exceptions=True)
        return self._exit_code

    def _begin_to_beat(self) -> None:
        self._beating = asyncio.create_task(self._every(self._beat_s, self._beat), name="beat")

    def stop(self, exit_code: int = 0) -> None:
        """Begin to drain; a second call ends at once."""
        if self._stop.is_set():
            self._role.fail_all("drained", _SHUTTING_DOWN)
        self._exit_code = max(self._exit_code, exit_code)
        self._stop.set()

    def wake(self) -> None:
        """The engine may have work."""
        self._thread.wake()

    def send_peer(self, to: NodeId, message: Message) -> None:
        """Send to a node that is connected to this node's peer address. May raise WireError."""
        self._peers.send(to, message)

    # ------------------------------------------------------------ start

    async def _start(self, closing: AsyncExitStack) -> None:
        """What is begun here goes to `closing`, which ends it in the reverse order."""
        closing.callback(self.context.destroy, linger=_LINGER_MS)
        closing.callback(self._life.close)
        self._begin_life(self._first_role)
        self.built.tell_when_lost(self._die)
        self._thread = EngineThread(
            self.engine,
            on_result=self._on_step,
            on_layers=self._on_layers,
            on_failure=self._step_failed,
            on_death=self._die,
            on_start=partial(use_device, self.config.device),
        )
        self._thread.start()
        closing.push_async_callback(asyncio.to_thread, self._thread.stop)
        runner, self._http_url = await serve_http(
            self.config.host, self.config.port, self._collector(), self._is_ready
        )
        closing.push_async_callback(runner.cleanup)
        self._install_signals()
        closing.callback(self._leave)
        self._join()

    def _begin_life(self, role: RoleName) -> None:
        self._peers = Hub(self.me, self.config.bind_url, self._from_peer, self.context)
        self._life.callback(self._peers.close)
        self._role = self._make_role[role](self)
        self._life.callback(self._role.close)

    def _join(self) -> None:
        register = self._register_message()
        self._links.open(self.config.routers, lambda url: self._connect(url, register))

    def _collector(self) -> NodeCollector:
        name = self.config.served_model_name
        return NodeCollector(
            name,
            self.engine,
            self.stats,
            lambda: self._role,
            num_malformed=self._num_malformed,
            num_refused=lambda: self.context.num_refused,
            num_unstaged=lambda: self.built.memory.num_unstaged,
        )

    def _num_malformed(self) -> int:
        now = self._peers.num_malformed + self._links.num_malformed
        return self._num_malformed_before + now

    def _register_message(self) -> Register:
        return Register(
            role=self._role.name,
            model=self.built.info,
            layout=self.built.layout,
            num_blocks=self.built.num_blocks,
            peer_url=self.public_url(self._peers.url),
            transports=self._role.transports,
            http_url=self.config.url("http", self._http_url),
            speculation=self.config.speculative.words,
            num_seats=self.engine.num_seats,
        )

    def public_url(self, url: str) -> str:
        """`url` with the host that other machines use."""
        return self.config.url("tcp", url)

    @property
    def peer_url(self) -> str:
        return self.public_url(self._peers.url)

    def _connect(self, url: str, register: Register) -> RouterLink:
        return RouterLink(
            self.me,
            url,
            register,
            on_message=self._from_router,
            on_welcome=self._welcomed,
            on_lost=self._router_lost,
            on_unwelcome=self._die,
            context=self.context,
        )

    def _install_signals(self) -> None:
        """SIGINT is left alone where the parent ignores it (a launcher owns Ctrl-C then)."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.stop)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            loop.add_signal_handler(signal.SIGINT, self.stop)

    # ------------------------------------------------------------ events

    def _welcomed(self, link: RouterLink) -> None:
        log.info("registered with router %s", link.url)
        self._send_snapshot(link)
        if self._draining:
            link.send(Draining())
        self._links.welcomed(link)
        if not self._ready_told and self._links.all_registered:
            self._ready_told = True
            self._on_ready(self._http_url)

    def _router_lost(self, link: RouterLink) -> None:
        self._role.router_lost(link)
        self.wake()

    def _from_router(self, link: RouterLink, message: Message) -> None:
        if isinstance(message, FetchTokenizer):
            link.send(self._tokenizer)
        elif isinstance(message, FetchCacheSnapshot):
            self._send_snapshot(link)
        elif isinstance(message, SwitchRole):
            self._change.asked(link, message, self._role.name)
        else:
            self._role.handle(link, message)
            self.wake()

    def _from_peer(self, envelope: Envelope) -> None:
        self._role.handle_peer(envelope.sender, envelope.message)
        self.wake()

    def _on_step(self, result: StepResult) -> None:
        self.stats.count_step(result)
        self._role.on_step(result)
        if result.corrupted:  # in the request or in this machine: another node may be asked next
            log.error("logits of %s are not finite", ", ".join(result.corrupted))
            self._role.fail(result.corrupted, "internal", "its logits are not finite")
        if result.speculation is not None and result.speculation.failure:
            log.error("%s", result.speculation.failure)
        self._publish_cache_events()

    def _on_layers(self, progress: LayerProgress) -> None:
        self._role.on_layers(progress)

    def _step_failed(self, error: Exception, request_ids: tuple[str, ...]) -> None:
        self._role.fail(request_ids, "internal", f"a step failed: {error}")

    def _die(self, reason: str) -> None:
        if not self._exit_code:  # a router refuses as often as it is asked
            log.error("%s", reason)
        self.stop(exit_code=1)

    def _is_ready(self) -> bool:
        return not self._draining and self._links.any_registered

    # ------------------------------------------------------------ time

    async def _every(self, interval_s: Callable[[], float], act: Callable[[], None]) -> None:
        while True:
            try:
                act()
            except Exception:  # a bug met by one request must not stop the clock of the others
                log.exception("%s failed", act.__name__)
            await asyncio.sleep(interval_s())

    def _beat(self) -> None:
        heartbeat = Heartbeat(self._load())
        for link in self._links:
            link.beat(heartbeat)

    def _beat_s(self) -> float:
        return min(link.heartbeat_s for link in self._links)

    def _tick(self) -> None:
        self._role.tick()
        self._publish_cache_events()

    def _load(self) -> NodeLoad:
        load = self.engine.load()
        return NodeLoad(
            step=self.stats.steps,
            stalled_s=self._thread.stalled_s,
            num_running=load.num_running,
            num_waiting=load.num_waiting,
            queued_tokens=load.queued_tokens,
            blocks_total=load.blocks_total,
            blocks_free=load.blocks_free,
            blocks_promised=load.blocks_promised,
            prefill_steps=self.stats.prefill_steps,
            decode_steps=self.stats.decode_steps,
        )

    def _publish_cache_events(self) -> None:
        changes = self.engine.take_cache_events()
        if not changes:
            return
        self._events_sent += 1
        events = CacheEvents(self._events_sent, changes.added, changes.removed, changes.snapshot)
        for link in self._links:
            link.send(events)

    def _send_snapshot(self, link: RouterLink) -> None:
        hashes = tuple(self.engine.cached_hashes())
        link.send(CacheEvents(self._events_sent, hashes, snapshot=True))

    # ------------------------------------------------------------ end

    async def _drain(self, timeout_s: float, reason: str) -> None:
        """Take nothing new, let what is here finish for a while, give the rest to other nodes."""
        self._draining = True
        self._role.drain()
        for link in self._links:
            link.send(Draining())
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while self._role.num_attempts and loop.time() < deadline and not self._exit_code:  # noqa: ASYNC110
            await asyncio.sleep(_TICK_S)  # attempts end in many places; nobody waits for this
        # Whoever has to end because of a fault may have it from a request: that one must not go on
        # from node to node.
        self._role.fail_all("internal" if self._exit_code else "drained", reason)

    def _next_life(self, role: RoleName) -> None:
        """Everything that bears this life's name ends; the routers meet another node."""
        self._num_malformed_before = self._num_malformed()
        self._leave()
        self._life.close()
        self.engine.layer_marks = frozenset()
        self.me = new_node_id(self.me.name)
        self._links = RouterLinks(self._router_lost)
        self._begin_life(role)
        self._join()
        self._draining = False
        self._beating.cancel()  # it sleeps until the old life's next heartbeat
        self._begin_to_beat()
        log.info("serving as a %s node from now on, as %s", role, self.me)

    def _leave(self) -> None:
        for link in self._links:
            link.send(Goodbye())
        self._links.close()
