"""A node that is asked for another role: its old life ends whole, the next one has its name."""

from __future__ import annotations

import asyncio

from tests.node.test_shell import World, run
from wire.fleet_messages import (
    Draining,
    FetchTokenizer,
    Goodbye,
    Heartbeat,
    Register,
    SwitchRefused,
    SwitchRole,
    TokenizerFiles,
)
from wire.types import Role


def ask(w: World, drain_s: float = 60.0) -> None:
    w.router.tell(SwitchRole(Role.PREFILL, drain_s))


def test_the_next_life() -> None:
    async def scenario(w: World) -> None:
        await w.until_ready()
        first = w.router.node
        w.role.num_attempts = 1
        ask(w)
        ask(w)
        await w.until(lambda: w.router.count(Draining))
        assert (await w.get("/ready"))[0] == 503
        assert "fail all: drained" not in w.role.calls, "it may finish"
        w.role.num_attempts = 0
        await w.until(lambda: w.router.node != first)
        kinds = w.router.kinds()
        assert kinds.index("Draining") < kinds.index("Goodbye") < len(kinds) - 1
        assert kinds[kinds.index("Goodbye") + 1] == "Register"
        assert w.role.calls == ["drain", "fail all: drained", "close"]
        register = next(m for m in reversed(w.router.heard) if isinstance(m, Register))
        assert register.role is Role.PREFILL
        assert w.router.node is not None
        assert first is not None
        assert w.router.node.name == first.name
        assert w.router.node != first
        assert w.shell.me == w.router.node
        w.router.heard.clear()
        await w.until(lambda: w.router.count(Heartbeat) > 1)
        w.router.tell(FetchTokenizer())
        await w.until(lambda: w.router.count(TokenizerFiles))
        assert (await w.get("/ready"))[0] == 200
        assert "baton_handoffs_open" in (await w.get("/metrics"))[1], "as a prefill node tells"
        assert len(w.ready) == 1
        w.shell.stop()
        assert await w.end() == 0
        assert w.other is not None
        assert w.other.calls == ["drain", "fail all: drained", "close"]

    run(scenario)


def test_what_does_not_finish_in_time_moves() -> None:
    async def scenario(w: World) -> None:
        await w.until_ready()
        first = w.router.node
        w.role.num_attempts = 1
        ask(w, drain_s=0.0)
        await w.until(lambda: w.router.node != first)
        assert w.role.calls == ["drain", "fail all: drained", "close"]

    run(scenario)


def test_a_role_that_it_has() -> None:
    async def scenario(w: World) -> None:
        await w.until_ready()
        w.router.tell(SwitchRole(Role.DECODE, 1.0))
        await w.until(lambda: w.router.count(SwitchRefused))
        assert w.role.calls == []
        assert w.router.count(Draining) == 0

    run(scenario)


def test_told_to_end_while_it_drains_it_ends_as_what_it_was() -> None:
    async def scenario(w: World) -> None:
        await w.until_ready()
        me = w.router.node
        w.role.num_attempts = 1
        ask(w)
        await w.until(lambda: w.router.count(Draining))
        w.shell.stop()
        await w.until(lambda: w.router.count(Draining) == 2)
        assert "fail all: drained" not in w.role.calls, "its own time to drain has just begun"
        w.role.num_attempts = 0
        assert await w.end() == 0
        await asyncio.sleep(0.05)
        assert w.router.node == me
        assert w.router.count(Goodbye) == 1
        assert w.other is not None
        assert w.other.calls == []

    run(scenario)


def test_an_order_from_before_a_pause_is_not_followed() -> None:
    """Its router may have given it up meanwhile; one that still means it asks again."""

    async def scenario(w: World) -> None:
        await w.until_ready()
        w.shell._beating.cancel()
        (link,) = w.shell._links
        link._last_beat -= 3  # it stood still
        ask(w)
        w.router.tell(FetchTokenizer())
        await w.until(lambda: w.router.count(TokenizerFiles))
        assert w.role.calls == []
        w.shell._begin_to_beat()
        await w.until(lambda: not link.reads_backlog)
        first = w.router.node
        ask(w)
        await w.until(lambda: w.router.node != first)

    run(scenario)


def test_a_next_life_that_cannot_begin_ends_the_node() -> None:
    async def scenario(w: World) -> None:
        await w.until_ready()
        w.other = None
        ask(w)
        assert await w.end() == 1

    run(scenario)
