"""A node's way from one role to another: drain, become quiet, begin a new life.

    serving ── SwitchRole ──▶ draining ── nothing is left, or `drain_s` has passed ──▶ quieting
                                         ── every block is free or cached, or soon ──▶ next life

What must not outlive the old life is an attempt; the engine, its blocks and its prefix cache do. A
node that is told to end meanwhile ends as what it was.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress

from engine.engine import Engine
from node.router_link import RouterLink
from wire.fleet_messages import SwitchRefused, SwitchRole
from wire.types import Role

log = logging.getLogger(__name__)

_QUIET_S = 0.5  # a transfer that stands still is cut off after it
_LOOK_S = 0.005


class RoleChange:
    """At most one change at a time.

    Args:
        roles: that this node can have.
        drain: takes nothing new, and returns when every attempt is over; gets how long they have.
        next_life: begins the life in another role; from then on the old one is gone.
        on_failure: is told why there is no next life; the node ends.
    """

    def __init__(
        self,
        engine: Engine,
        roles: Collection[Role],
        *,
        drain: Callable[[float], Awaitable[None]],
        next_life: Callable[[Role], None],
        on_failure: Callable[[str], None],
    ) -> None:
        self._engine = engine
        self._roles = roles
        self._drain = drain
        self._next_life = next_life
        self._on_failure = on_failure
        self._to: Role | None = None  # while one is under way
        self._task: asyncio.Task[None] | None = None
        self._over = False

    def asked(self, link: RouterLink, message: SwitchRole, present: Role) -> None:
        """A router wants this node, which is a `present` one, for another role.

        It asks until it hears that the node drains. So an order that may be old is not followed: a
        node that stood still was perhaps given up, and the fleet has arranged itself without it.
        """
        if self._to is message.role:
            return  # asked twice
        if link.reads_backlog:
            log.info("asked to become a %s node, perhaps long ago; ignored", message.role)
            return
        obstacle = self._obstacle(message.role, present)
        if obstacle is not None:
            link.send(SwitchRefused(obstacle))
            return
        self._to = message.role
        self._task = asyncio.create_task(self._change(message), name="change of role")

    def _obstacle(self, role: Role, present: Role) -> str | None:
        if self._over:
            return "the node is shutting down"
        if self._to is not None:
            return f"the node is just becoming a {self._to} node"
        if role is present:
            return f"the node is a {role} node already"
        return None if role in self._roles else f"the node cannot be a {role} node"

    async def stop(self) -> None:
        """No more changes; one that is under way ends where it is."""
        self._over = True
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _change(self, message: SwitchRole) -> None:
        log.info("asked to become a %s node", message.role)
        try:
            await self._drain(message.drain_s)
            await self._become_quiet()
            self._next_life(message.role)
        except Exception as error:
            log.exception("the change of role failed")
            self._on_failure(f"cannot become a {message.role} node: {error}")
        finally:
            self._to = None

    async def _become_quiet(self) -> None:
        """A step or a transfer that was under way may still hold blocks of what has ended."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _QUIET_S
        while loop.time() < deadline:
            counts = self._engine.block_counts()
            if counts.free + counts.cached == counts.total and not self._engine.has_work():
                return
            await asyncio.sleep(_LOOK_S)
