"""The page in a real browser, over a router with stub nodes: what a person does with it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from router.access_config import AccessConfig
from tests.console.browser import Page, browser, find_chromium
from tests.router.harness import Harness, alphabet, endless, eventually, router
from wire.request_messages import Abort, Prefill

VIEWS = ("chat", "completion", "requests", "fleet")
ENTER = 13  # its virtual key code
CONTROL = 2  # held down
Scenario = Callable[[Harness, Page], Awaitable[None]]


def on_page(tmp_path: Path, scenario: Scenario, **options: object) -> None:
    """Run `scenario`; nothing but the router may have been asked, and nothing gone wrong."""
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium here (`make browser`, or Debian's package)")

    async def run() -> None:
        async with (
            router(endless, **options) as harness,
            browser(chromium, tmp_path, harness.url) as page,
        ):
            await page.show_as(1280, 800)
            await page.until("document.querySelector('[role=tab][aria-selected=true]')")
            await scenario(harness, page)
            own = [url for url in page.requested if url.startswith((harness.url, "about:"))]
            assert own == page.requested
            assert page.problems == []

    asyncio.run(run())


async def say(page: Page, text: str, max_tokens: int) -> None:
    """Send a message as a person with a keyboard does."""
    await page.until("document.getElementById('model').options.length")
    await page.run(f"document.querySelector('[name=max_tokens]').value = '{max_tokens}'")
    await page.run("document.getElementById('chat-input').focus()")
    await page.type(text)
    await page.press("Enter", code=ENTER, text="\r")


def test_a_chat_with_probabilities_and_its_waterfall(tmp_path: Path) -> None:
    async def scenario(harness: Harness, page: Page) -> None:
        await say(page, "hello", 12)
        await page.until("document.querySelector('.facts button')")
        assert await page.run("document.querySelector('.answer').textContent") == alphabet(12)
        assert await page.run("document.querySelectorAll('.answer .token').length") == 12
        facts = await page.run("document.querySelector('.facts').textContent")
        assert "length" in facts
        assert "tokens/s" in facts

        await page.run("document.querySelector('.token').focus()")
        await page.press("ArrowRight", code=39)
        await page.until("!document.getElementById('tip').hidden")
        assert await page.run("document.activeElement.textContent") == "b"
        rows = await page.run("document.querySelectorAll('#tip tr').length")
        assert rows == 5
        assert "%" in await page.run("document.querySelector('#tip tr.chosen').textContent")

        await page.run("document.querySelector('.facts button').click()")
        await page.until("document.querySelector('.waterfall')")
        phases = await page.run("document.querySelector('.waterfall').textContent")
        assert "prefill" in phases
        assert "After it" in phases

        await say(page, "again", 3)
        await page.until("document.querySelectorAll('.facts button').length === 2")
        first, second = harness.sent(Prefill)
        assert len(second.tokens) > len(first.tokens)  # the whole conversation goes along

    on_page(tmp_path, scenario)


def test_escape_stops_an_answer_and_frees_it(tmp_path: Path) -> None:
    async def scenario(harness: Harness, page: Page) -> None:
        await say(page, "hello", 400)
        await page.until("document.querySelector('.answer').textContent.length > 3")
        await page.press("Escape", code=27)
        await page.until("document.querySelector('.error')")
        assert await page.run("document.querySelector('.error').textContent") == "Stopped."
        await eventually(lambda: bool(harness.sent(Abort)))
        await page.until("!document.getElementById('chat-send').disabled")

    on_page(tmp_path, scenario, step_s=0.05)


def test_completion_and_a_refused_parameter(tmp_path: Path) -> None:
    async def scenario(harness: Harness, page: Page) -> None:
        await page.until("document.getElementById('model').options.length")
        await page.run("document.getElementById('tab-completion').click()")
        await page.run("document.querySelector('[name=max_tokens]').value = '8'")
        await page.run("document.getElementById('completion-input').focus()")
        await page.press("Enter", code=ENTER, modifiers=CONTROL)
        await page.until("!document.getElementById('completion-adopt').hidden")
        await page.run("document.getElementById('completion-adopt').click()")
        prompt = await page.run("document.getElementById('completion-input').value")
        assert prompt.endswith(alphabet(8))

        await page.run("document.querySelector('[name=schema]').value = '{'")
        await page.run("document.getElementById('completion-send').click()")
        await page.until("document.querySelector('#completion-output > .error')")
        assert "not JSON" in await page.run(
            "document.querySelector('#completion-output > .error').textContent"
        )

    on_page(tmp_path, scenario)


def test_requests_and_fleet_are_live(tmp_path: Path) -> None:
    async def scenario(harness: Harness, page: Page) -> None:
        await harness.complete(max_tokens=4)
        await page.run("location.hash = 'requests'")
        await page.until("document.querySelector('#request-list button')")
        await page.run("document.querySelector('#request-list button').click()")
        await page.until("document.querySelector('#request-detail .waterfall')")

        await page.run("location.hash = 'fleet'")
        await page.until("document.querySelectorAll('.node').length === 2")
        await harness.add_pair(endless)
        await page.until("document.querySelectorAll('.node').length === 4")
        assert await page.run("document.querySelector('.state').textContent") == "serving"

    on_page(tmp_path, scenario)


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone(tmp_path: Path, dark: bool) -> None:
    async def scenario(harness: Harness, page: Page) -> None:
        await page.show_as(360, 740, dark=dark)
        await say(page, "hello " * 40, 60)
        await page.until("document.querySelector('.facts button')")
        for view in VIEWS:
            await page.run(f"location.hash = '{view}'")
            await page.until(f"!document.getElementById('{view}').hidden")
            wide = await page.run("document.documentElement.scrollWidth - innerWidth")
            assert wide <= 0, view
        ink, paper = [
            await page.run(f"getComputedStyle(document.body).{name}")
            for name in ("color", "backgroundColor")
        ]
        assert (_brightness(ink) > _brightness(paper)) is dark

    on_page(tmp_path, scenario)


def _brightness(color: str) -> int:
    return sum(int(part) for part in color[color.index("(") + 1 : -1].split(",")[:3])


def test_a_key_is_asked_for_and_used(tmp_path: Path) -> None:
    async def scenario(harness: Harness, page: Page) -> None:
        await page.until("!document.getElementById('key-form').hidden")
        assert any("401" in problem for problem in page.problems)
        page.problems.clear()  # the browser tells of each 401, which was the point
        await page.run("document.getElementById('key').focus()")
        await page.type("secret")
        await page.press("Enter", code=ENTER, text="\r")
        await say(page, "hello", 5)
        await page.until("document.querySelector('.facts button')")
        assert await page.run("document.querySelector('.answer').textContent") == alphabet(5)
        page.problems.clear()

    on_page(tmp_path, scenario, access=AccessConfig(api_keys=("secret",)))
