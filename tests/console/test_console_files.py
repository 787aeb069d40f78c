"""The page's files: whole, from nowhere else, open to everybody, and what feeds them is not."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from router.access_config import AccessConfig
from tests.router.harness import endless, router

STATIC = Path(__file__).resolve().parents[2] / "router" / "console" / "static"
ADDRESS = re.compile(r"https?://[\w.-]+")
NAMESPACES = {"http://www.w3.org"}
REFERENCE = re.compile(r'(?:(?:href|src)="|from ")(?:/console/|\./)([\w.]+)"')


def test_every_file_is_there_and_used() -> None:
    files = {file.name for file in STATIC.iterdir()}
    used = {name for file in STATIC.iterdir() for name in REFERENCE.findall(file.read_text())}
    assert used | {"index.html"} == files


def test_nothing_comes_from_elsewhere() -> None:
    for file in STATIC.iterdir():
        assert set(ADDRESS.findall(file.read_text())) <= NAMESPACES, file.name


def test_ids_that_scripts_ask_for_are_on_the_page() -> None:
    page = (STATIC / "index.html").read_text()
    ids = set(re.findall(r' id="([\w-]+)"', page))
    for script in STATIC.glob("*.js"):
        asked = set(re.findall(r'\$\("([\w-]+)"\)', script.read_text()))
        assert asked <= ids, script.name


def test_files_are_served_with_their_types_and_asked_again_cheaply() -> None:
    async def scenario() -> None:
        async with router() as harness:
            for path, kind in (
                ("/", "text/html"),
                ("/console/app.js", "text/javascript"),
                ("/console/style.css", "text/css"),
                ("/console/icon.svg", "image/svg+xml"),
            ):
                answer = await harness.get(path)
                assert answer.status == 200
                assert answer.headers["Content-Type"] == f"{kind}; charset=utf-8"
                assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
                again = {"If-None-Match": answer.headers["Etag"]}
                async with harness.session.get(harness.url + path, headers=again) as same:
                    assert same.status == 304
                    assert await same.read() == b""
            for path in ("/console/no.js", "/console/..%2Fpages.py", "/console/"):
                assert (await harness.get(path)).status == 404, path

    asyncio.run(scenario())


def test_without_the_page() -> None:
    async def scenario() -> None:
        async with router(console=False) as harness:
            assert (await harness.get("/")).status == 404
            assert (await harness.get("/console/app.js")).status == 404
            assert (await harness.get("/health")).status == 200

    asyncio.run(scenario())


def test_the_page_needs_no_key_and_what_it_shows_does() -> None:
    async def scenario() -> None:
        async with router(endless, access=AccessConfig(api_keys=("k",))) as harness:
            assert (await harness.get("/")).status == 200
            assert (await harness.get("/console/app.js")).status == 200
            for path in ("/debug/fleet", "/debug/requests", "/v1/models"):
                assert (await harness.get(path)).status == 401, path

    asyncio.run(scenario())


def test_the_fleet_is_told_on_loopback() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            told = (await harness.get("/debug/fleet")).json
            assert [(n["role"], n["state"]) for n in told["nodes"]] == [
                ("decode", "serving"),
                ("prefill", "serving"),
            ]
            assert (told["running"], told["waiting"], told["open_pairs"]) == (0, 0, 0)
            (drained,) = [n for n in harness.server.control.fleet if n.info.role == "decode"]
            drained.draining = True
            (decode, _) = (await harness.get("/debug/fleet")).json["nodes"]
            assert decode["state"] == "draining"
            assert decode["load"]["blocks_total"] > 0

    asyncio.run(scenario())
