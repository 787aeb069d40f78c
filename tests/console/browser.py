"""A headless Chromium over its DevTools protocol, as far as the tests of the page need it."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

START_S = 60.0
FETCHED = Path(__file__).parent / "js" / "node_modules" / "browser"
_FLAGS = (
    "--headless",
    "--no-sandbox",  # tests run as root in containers, and load nothing but our own page
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--remote-debugging-port=0",
)


def find_chromium() -> str | None:
    """A Chromium of this machine, else the one that `make browser` fetched, else none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = (shutil.which(name) for name in (*names, str(FETCHED / "chromium")))
    return next((path for path in found if path), None)


class Page:
    """One tab. Every problem that it tells of in its console is kept in `problems`."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self.problems: list[str] = []
        self.requested: list[str] = []

    async def read(self) -> None:
        """Take what the browser says, until it closes."""
        async for message in self._socket:
            told = json.loads(message.data)
            if "id" in told:
                self._answers.pop(told["id"]).set_result(told)
            elif told["method"] == "Runtime.exceptionThrown":
                self.problems.append(str(told["params"]["exceptionDetails"]))
            elif told["method"] == "Log.entryAdded":
                entry = told["params"]["entry"]
                if entry["level"] == "error":
                    self.problems.append(f"{entry['text']} {entry.get('url', '')}")
            elif told["method"] == "Network.requestWillBeSent":
                self.requested.append(told["params"]["request"]["url"])

    async def call(self, method: str, **params: Any) -> Any:
        """A command of the protocol. Raises AssertionError where the browser refuses it."""
        number = next(self._ids)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        told = await asyncio.wait_for(answer, START_S)
        assert "error" not in told, told
        return told["result"]

    async def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are waited for."""
        told = await self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    async def until(self, expression: str, seconds: float = 30.0) -> None:
        """Wait until `expression` is truthy in the page. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while not await self.run(f"Boolean({expression})"):  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def press(self, key: str, *, code: int, text: str = "", modifiers: int = 0) -> None:
        """A key, as a keyboard sends it; `code` is its Windows virtual key code."""
        told = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        if text:
            told["text"] = text
        await self.call("Input.dispatchKeyEvent", type="keyDown", **told)
        await self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    async def type(self, text: str) -> None:
        """Text into what has the focus."""
        await self.call("Input.insertText", text=text)

    async def show_as(self, width: int, height: int, *, dark: bool = False) -> None:
        """The size of the window, and whether its owner likes it dark."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def picture(self) -> bytes:
        """What a person would see, as PNG."""
        told = await self.call("Page.captureScreenshot", format="png")
        return base64.b64decode(told["data"])


@asynccontextmanager
async def browser(chromium: str, folder: Path, url: str) -> AsyncIterator[Page]:
    """A browser of its own with one page at `url`; ends with the block."""
    profile = folder / "profile"
    process = await asyncio.create_subprocess_exec(
        chromium,
        *_FLAGS,
        f"--user-data-dir={profile}",
        "about:blank",
        env={**os.environ, "LD_LIBRARY_PATH": str(FETCHED / "lib")},  # for machines without them
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with aiohttp.ClientSession() as session:
            address = await _page_address(session, profile / "DevToolsActivePort")
            async with session.ws_connect(address, max_msg_size=0) as socket:
                page = Page(socket)
                reading = asyncio.create_task(page.read())
                for domain in ("Page", "Runtime", "Log", "Network"):
                    await page.call(f"{domain}.enable")
                await page.call("Page.navigate", url=url)
                yield page
                await page.call("Page.navigate", url="about:blank")  # ends its streams
            await reading
    finally:
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), 10.0)
        except TimeoutError:
            process.kill()
            await process.wait()


async def _page_address(session: aiohttp.ClientSession, file: Path) -> str:
    """Where the one tab listens, once the browser has written its port into its profile."""
    async with asyncio.timeout(START_S):
        while not (port := _port_in(file)):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            pages = [target for target in await answer.json() if target["type"] == "page"]
    return str(pages[0]["webSocketDebuggerUrl"])


def _port_in(file: Path) -> str:
    """The first of the file's two lines; empty until both are there."""
    lines = file.read_text().split() if file.exists() else []
    return lines[0] if len(lines) == 2 else ""
