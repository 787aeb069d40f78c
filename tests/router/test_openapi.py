"""/openapi.json is valid, complete and true; no request that is made from it, or wrongly, hurts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from openapi_spec_validator import validate
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from router.openapi import openapi_description
from tests.router.harness import Harness, endless, router

DESCRIPTION = openapi_description("test")
SCHEMA = schemathesis.openapi.from_dict(DESCRIPTION)
CHECKS: list[Any] = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
OPERATIONS = [(path, method) for path, item in DESCRIPTION["paths"].items() for method in item]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A router with stub nodes in a thread, because requests are made from this one."""
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    urls: list[str] = []
    ready = threading.Event()

    async def serve() -> None:
        async with router(endless) as harness:
            urls.append(harness.url)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(20)
    yield urls[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(20)
    loop.close()


NOT_API = ("/debug", "/admin", "/console")  # for people, and for whoever runs the fleet


def test_it_is_valid() -> None:
    validate(DESCRIPTION)


def test_every_route_is_there() -> None:
    async def scenario(harness: Harness) -> None:
        served = {resource.canonical for resource in harness.routes}
        served = {path for path in served if not path.startswith(NOT_API)} - {"/", "/openapi.json"}
        described = {path.replace("{model}", "{name}") for path in DESCRIPTION["paths"]}
        assert served == described
        answer = await harness.get("/openapi.json")
        assert answer.json["paths"] == DESCRIPTION["paths"]
        for path, item in DESCRIPTION["paths"].items():
            if "post" in item and "requestBody" in item["post"]:
                content = item["post"]["requestBody"]["content"]["application/json"]
                example = content["examples"]["short"]["value"]
                assert (await harness.post(path, example)).status == 200

    run(scenario)


def run(scenario: Callable[[Harness], Any]) -> None:
    async def body() -> None:
        async with router(endless) as harness:
            await scenario(harness)

    asyncio.run(body())


@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_requests_made_from_it(path: str, method: str, mode: GenerationMode, url: str) -> None:
    operation = SCHEMA[path][method]
    if mode is GenerationMode.NEGATIVE and not _can_be_wrong(path, method):
        pytest.skip("there is nothing to get wrong")

    @settings(
        max_examples=25,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        case.call_and_validate(base_url=url, checks=CHECKS, timeout=30)

    check()


def _can_be_wrong(path: str, method: str) -> bool:
    return "requestBody" in DESCRIPTION["paths"][path][method]
