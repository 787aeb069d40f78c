"""The router's side of its nodes' connections: registration, heartbeats, caches, tokenizer.

Nodes connect to one bound socket. A node that this router does not know (it was restarted, or gave
the node up) is answered `Gone`, and registers again.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import Any

from router.fleet import Fleet
from router.fleet_node import Node
from router.requests import Requests
from router.role_switch import RoleSwitch, RoleSwitches
from router.tokenizer import Tokenizer, tokenizer_from_files
from wire.codec import Envelope
from wire.curve import FleetContext
from wire.errors import ConfigError, OutboxFull, WireError
from wire.fleet_key import FleetKey
from wire.fleet_messages import (
    CacheEvents,
    Draining,
    FetchCacheSnapshot,
    FetchTokenizer,
    Gone,
    Goodbye,
    Heartbeat,
    Register,
    RouterHeartbeat,
    SwitchRefused,
    TokenizerFiles,
    Unwelcome,
    Welcome,
)
from wire.messages import Message
from wire.request_messages import (
    AttemptFailed,
    BeamsFound,
    Embedding,
    Granted,
    HandoffDone,
    Refused,
    Tokens,
)
from wire.sockets import Hub
from wire.types import NodeId

log = logging.getLogger(__name__)

_TICK_S = 0.1
_FETCH_AGAIN_S = 5.0
_UNREACHABLE_BEATS = 2  # one may be a connection that is just being made again


class Control:
    """Talks to the nodes.

    Args:
        make_requests: builds the table of running choices once messages can be sent.
        tokenizer: the operator's; None: ask the first node.
        control_ports: of all routers that share an HTTP port with this one; nodes are told them.
        key: the fleet's; None: hear every node.
        on_switch: called with each change of role that is over, as it went.
    """

    def __init__(
        self,
        url: str,
        fleet: Fleet,
        make_requests: Callable[[Fleet, Callable[[NodeId, Message], None]], Requests],
        *,
        heartbeat_s: float,
        tokenizer: Tokenizer | None,
        key: FleetKey | None,
        control_ports: tuple[int, ...] = (),
        clock: Callable[[], float],
        on_switch: Callable[[RoleSwitch], None] = lambda switch: None,
    ) -> None:
        self.fleet = fleet
        self._on_switch = on_switch
        self.describe_tuner: Callable[[], dict[str, Any] | None] = lambda: None
        self.switches = RoleSwitches(fleet, self._send, self._switch_over)
        self.tokenizer = tokenizer
        self.requests = make_requests(fleet, self._send)
        self._heartbeat_s = heartbeat_s
        self._control_ports = control_ports
        self._clock = clock
        self._tokenizer_of = "" if tokenizer is None else "*"  # fingerprint; "*": of any model
        self._fetching = ("", 0.0)  # fingerprint asked for, and when
        self._last_beat = clock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._context = FleetContext(key)
        self.me = NodeId("router", secrets.randbits(64))
        try:
            self._hub = Hub(self.me, url, self._receive, self._context)
        except ConfigError:
            self._context.term()
            raise
        self.url = self._hub.url

    @property
    def num_malformed(self) -> int:
        return self._hub.num_malformed

    @property
    def num_refused(self) -> int:
        return self._context.num_refused

    @property
    def now(self) -> float:
        """By the clock of the fleet's times."""
        return self._clock()

    @property
    def ready(self) -> bool:
        """Whether a request could be served now."""
        return self.fleet.ready and self.tokenizer is not None

    def start(self) -> None:
        """Begin to beat and tick."""
        self._spawn(self._every(self._heartbeat_s, self._beat))
        self._spawn(self._every(_TICK_S, self.requests.tick))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._hub.close()
        await asyncio.to_thread(self._context.term)

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _every(self, interval_s: float, act: Callable[[], None]) -> None:
        while True:
            try:
                act()
            except Exception:  # a bug met by one request must not stop the clock of the others
                log.exception("%s failed", act.__name__)
            await asyncio.sleep(interval_s)

    # ------------------------------------------------------------ time

    def _beat(self) -> None:
        now = self._clock()
        if now - self._last_beat > 2 * self._heartbeat_s:  # the nodes' heartbeats wait to be read
            self.fleet.excuse(now)
        self._last_beat = now
        for dead in self.fleet.expire(now):
            log.warning("node %s is silent and taken for dead", dead)
            self.requests.node_lost(dead)
            self.switches.died(dead, now)
        self.switches.tick(now)
        for node in list(self.fleet):
            self._beat_to(node)
        self._fetch_tokenizer()

    def _beat_to(self, node: Node) -> None:
        """A killed process closes its connection, which is known long before its silence is."""
        try:
            self._hub.send(node.id, RouterHeartbeat())
        except OutboxFull as error:
            log.warning("%s", error)
        except WireError:
            node.num_unreachable += 1
            if node.num_unreachable >= _UNREACHABLE_BEATS:
                self._leave(node.id, "has closed its connection")
        else:
            node.num_unreachable = 0

    def _fetch_tokenizer(self) -> None:
        """Ask a node for the tokenizer, unless there is one for this model."""
        node = next(iter(self.fleet), None)
        if node is None or self._tokenizer_of in ("*", node.info.model.fingerprint):
            return
        now = self._clock()
        fingerprint, asked = self._fetching
        if fingerprint != node.info.model.fingerprint or now - asked > _FETCH_AGAIN_S:
            self._fetching = (node.info.model.fingerprint, now)
            self.tokenizer = None
            self._tell(node.id, FetchTokenizer())

    # ------------------------------------------------------------ messages

    def _receive(self, envelope: Envelope) -> None:
        sender, message = envelope.sender, envelope.message
        if isinstance(message, Register):
            self._register(sender, message)
        elif sender not in self.fleet:
            if not isinstance(message, Gone | Goodbye):
                self._tell(sender, Gone(envelope.receiver or self.me))
        elif isinstance(message, Tokens):
            self.requests.tokens(sender, message)
        elif isinstance(message, Granted):
            self.requests.granted(sender, message)
        elif isinstance(message, Refused):
            self.requests.refused(sender, message)
        elif isinstance(message, AttemptFailed):
            self.requests.attempt_failed(sender, message)
        elif isinstance(message, Embedding):
            self.requests.embedding(sender, message)
        elif isinstance(message, BeamsFound):
            self.requests.beams_found(sender, message)
        elif isinstance(message, HandoffDone):
            self.requests.handoff_done(message)
        else:
            self._about_node(self.fleet[sender], message)

    def _about_node(self, node: Node, message: Message) -> None:
        if isinstance(message, Heartbeat):
            if self.fleet.heartbeat(node.id, message.load, self._clock()):
                log.warning("node %s makes no progress; its requests move", node.id)
                self.requests.node_lost(node.id, alive=True)
            self.requests.capacity_changed()
        elif isinstance(message, CacheEvents):
            if not node.cache.apply(message):
                self._tell(node.id, FetchCacheSnapshot())
        elif isinstance(message, TokenizerFiles):
            self._spawn(self._load_tokenizer(node, message))
        elif isinstance(message, Draining):
            log.info("node %s drains", node.id)
            self.fleet.drain(node.id)
            self.switches.draining(node.id)
        elif isinstance(message, SwitchRefused):
            self.switches.refused(node.id, message.reason, self._clock())
        elif isinstance(message, Goodbye):
            self.switches.left(node.id, self._clock())
            self._leave(node.id, "left", "drained")
        elif isinstance(message, Gone):
            self._leave(node.id, "does not know this router")
        else:
            log.warning("node %s sent an unexpected %s", node.id, type(message).__name__)

    def _register(self, sender: NodeId, message: Register) -> None:
        registration = self.fleet.register(sender, message, self._clock())
        if registration.refusal is not None:
            log.warning("node %s refused: %s", sender, registration.refusal)
            self._tell(sender, Unwelcome(registration.refusal))
            return
        cause = "drained" if self.switches.going(sender.name) else "node_lost"
        for lost in registration.lost:  # a switching node's goodbye may be overtaken
            self.requests.node_lost(lost, lost == sender, cause)
        log.info("node %s registered for %s", sender, message.role.value)
        self.switches.registered(sender, message.role, self._clock())
        self._tell(sender, Welcome(self._heartbeat_s, self._control_ports))
        self._tell(sender, FetchCacheSnapshot())
        self._fetch_tokenizer()
        self.requests.capacity_changed()

    def _leave(self, node: NodeId, reason: str, cause: str = "node_lost") -> None:
        log.info("node %s %s", node, reason)
        self.fleet.remove(node)
        self.requests.node_lost(node, cause=cause)
        self.switches.died(node, self._clock())

    def _switch_over(self, switch: RoleSwitch) -> None:
        if switch.outcome == "done":
            seconds = (switch.node.name, switch.new.value, switch.seconds)
            log.info("node %s serves as a %s node after %.2f s", *seconds)
        else:
            log.warning("node %s does not change roles: %s", switch.node.name, switch.reason)
        self._on_switch(switch)

    async def _load_tokenizer(self, node: Node, files: TokenizerFiles) -> None:
        fingerprint = node.info.model.fingerprint
        if self._tokenizer_of in ("*", fingerprint):
            return
        try:
            tokenizer = await asyncio.to_thread(tokenizer_from_files, files, str(node.id))
        except ConfigError as error:
            log.error("%s", error)
            return
        self.tokenizer, self._tokenizer_of = tokenizer, fingerprint
        log.info("tokenizer received from %s", node.id)

    def _send(self, to: NodeId, message: Message) -> None:
        self._hub.send(to, message)

    def _tell(self, to: NodeId, message: Message) -> None:
        """Send what may be lost: it is repeated, or the silence that follows is noticed."""
        try:
            self._hub.send(to, message)
        except WireError as error:
            log.debug("%s", error)
