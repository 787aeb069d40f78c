"""What `baton serve` starts, what it starts again, and when it gives up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from baton import launcher
from baton.children import Child
from baton.launcher import Launcher
from baton.serve import make_parser


class FakeChild:
    """Ready or dead when a test says so."""

    made: list[FakeChild]

    def __init__(self, name: str, argv: list[str], env: dict[str, str]) -> None:
        self.name = name
        self.argv = argv
        self.is_ready = asyncio.Event()
        self.is_dead = asyncio.Event()
        self.stopped = False
        self.made.append(self)

    async def start(self) -> None:
        if self.name == "router":
            self.is_ready.set()

    async def ready(self) -> dict[str, str] | None:
        waits = [asyncio.create_task(e.wait()) for e in (self.is_ready, self.is_dead)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        return None if self.is_dead.is_set() else {"http": "http://h", "control": "tcp://c:1"}

    async def wait(self) -> int:
        await self.is_dead.wait()
        return 1

    def obituary(self) -> str:
        return f"{self.name} ended with 1: bad luck"

    async def stop(self, timeout_s: float) -> None:
        self.stopped = True


class World:
    """A launcher with fake children; time does not pass while it sleeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
        FakeChild.made = []
        monkeypatch.setattr(launcher, "Child", cast(type[Child], FakeChild))
        monkeypatch.setattr(launcher, "_BACKOFF_S", 0.0)
        self.launcher = Launcher(make_parser().parse_args(flags))
        self.run = asyncio.create_task(self.launcher.run())

    @property
    def children(self) -> list[FakeChild]:
        return FakeChild.made

    def latest(self, name: str) -> FakeChild:
        return [child for child in self.children if child.name == name][-1]

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not holds():
                assert not self.run.done(), self.run
                await asyncio.sleep(0.001)

    async def ready(self) -> None:
        await self.until(lambda: len(self.children) > 2)
        for child in self.children:
            child.is_ready.set()
        await self.until(lambda: any("_keep" in str(task) for task in asyncio.all_tasks()))

    async def end(self) -> int:
        async with asyncio.timeout(20):
            code = await self.run
        await self.launcher.stop()
        return code


def in_world(
    monkeypatch: pytest.MonkeyPatch, scenario: Callable[[World], Any], *flags: str
) -> None:
    async def body() -> None:
        w = World(monkeypatch, *flags)
        try:
            await scenario(w)
        finally:
            w.run.cancel()
            await asyncio.gather(w.run, return_exceptions=True)

    asyncio.run(body())


def test_what_is_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = tmp_path / "tiny"
    model.mkdir()

    async def scenario(w: World) -> None:
        await w.until(lambda: len(w.children) == 4)
        assert [c.name for c in w.children] == ["router", "prefill-0", "decode-0", "decode-1"]
        node = w.latest("decode-1").argv
        assert node[1:4] == ["-m", "baton.node", "decode"]
        assert node[node.index("--router") + 1] == "tcp://c:1"
        assert node[-4:] == ["--block-size", "8", "--transfer-dtype", "int8"]
        assert "--transfer-dtype" in w.latest("prefill-0").argv, "it may become a decode node"
        assert "--max-queue" in w.latest("router").argv
        assert "--max-queue" not in node
        for child in w.children:
            assert not capsys.readouterr().out
            child.is_ready.set()
        out = ""
        while not out:
            await asyncio.sleep(0.001)
            out = capsys.readouterr().out
        assert out.startswith("baton ready http://h (1 prefill, 2 decode) in ")

    flags = ("--decode", "2", "--block-size", "8", "--transfer-dtype", "int8", "--max-queue", "7")
    in_world(monkeypatch, scenario, str(model), *flags)


@pytest.mark.parametrize(("workers", "program"), [(1, ["router"]), (2, ["baton", "router"])])
def test_several_workers_have_a_launcher_of_their_own(
    monkeypatch: pytest.MonkeyPatch, workers: int, program: list[str]
) -> None:
    async def scenario(w: World) -> None:
        await w.until(lambda: len(w.children) == 3)
        argv = w.latest("router").argv
        assert argv[2 : argv.index("--tokenizer")] == program
        assert ("--workers" in argv) == (workers > 1)

    in_world(monkeypatch, scenario, "--workers", str(workers))


@pytest.mark.parametrize("name", ["router", "prefill-0", "decode-0"])
def test_a_death_before_all_are_ready_is_noticed_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    async def scenario(w: World) -> None:
        await w.until(lambda: len(w.children) == 3)
        w.latest(name).is_dead.set()
        assert await w.end() == 1
        assert all(child.stopped for child in w.children)

    in_world(monkeypatch, scenario)
    assert f"{name} ended with 1: bad luck" in capsys.readouterr().err


def test_a_dead_node_is_started_again_until_it_is_hopeless(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario(w: World) -> None:
        await w.ready()
        for deaths in range(1, 4):
            w.latest("decode-0").is_dead.set()
            await w.until(lambda n=deaths: len(w.children) == 3 + n)  # type: ignore[misc]
            assert w.children[-1].argv == w.children[2].argv
        w.latest("decode-0").is_dead.set()
        assert await w.end() == 1

    in_world(monkeypatch, scenario)
    said = capsys.readouterr().err
    assert said.count("decode-0 ended with 1: bad luck; starting it again") == 3
    assert "decode-0 died 4 times in 60 s; giving up" in said


def test_the_others_are_watched_while_one_waits_to_be_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario(w: World) -> None:
        await w.ready()
        w.latest("decode-0").is_dead.set()
        await w.until(lambda: len(w.children) == 4)
        monkeypatch.setattr(launcher, "_BACKOFF_S", 1000.0)
        w.latest("decode-0").is_dead.set()
        await asyncio.sleep(0.01)
        assert len(w.children) == 4, "the second time it waits"
        w.latest("prefill-0").is_dead.set()
        await w.until(lambda: len(w.children) == 5)

    in_world(monkeypatch, scenario)


def test_old_deaths_are_forgiven(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(w: World) -> None:
        await w.ready()
        for deaths in range(1, 9):
            w.latest("decode-0").is_dead.set()
            await w.until(lambda n=deaths: len(w.children) == 3 + n)  # type: ignore[misc]

    monkeypatch.setattr(launcher, "_RESTART_WINDOW_S", -1.0)
    in_world(monkeypatch, scenario)


def test_the_routers_end_is_everybodys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def scenario(w: World) -> None:
        await w.ready()
        w.latest("router").is_dead.set()
        assert await w.end() == 1

    in_world(monkeypatch, scenario)
    assert "router ended with 1" in capsys.readouterr().err


def test_flex_nodes_begin_as_one_and_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(w: World) -> None:
        await w.until(lambda: len(w.children) == 6)
        begins = {child.name: child.argv[3] for child in w.children[1:]}
        assert begins["flex-0"] == begins["decode-0"] == begins["flex-2"] == "decode"
        assert begins["flex-1"] == begins["prefill-0"] == "prefill"

    in_world(monkeypatch, scenario, "--flex", "3")
