"""/openapi.json is valid, complete and true; no request that is made from it, or wrongly, hurts."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from router.openapi import openapi_description
from tests.router.harness import MODEL, Harness, endless, router, saying

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


TOOL = {"name": "weather", "parameters": {"type": "object", "properties": {}}}
SAID = '<think>Hm.</think>So: <tool_call>{"name": "weather", "arguments": {}}</tool_call>'
TALK = [{"role": "user", "content": "hi"}]
TOLD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hi"},
    "/v1/chat/completions": {
        "messages": TALK,
        "tools": [{"type": "function", "function": TOOL}],
    },
    "/v1/responses": {"input": "hi", "tools": [{"type": "function", **TOOL}]},
    "/v1/messages": {
        "messages": TALK,
        "tools": [{"name": "weather", "input_schema": TOOL["parameters"]}],
    },
}


@pytest.mark.parametrize("path", TOLD)
def test_answers_with_calls_and_streams_are_described(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reasoning, text and a call; every event of the stream is one of those that it may have."""
    monkeypatch.setattr("tests.router.harness.MODEL", replace(MODEL, max_model_len=8192))
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    content = DESCRIPTION["paths"][path]["post"]["responses"]["200"]["content"]

    async def scenario() -> None:
        async with router(saying(SAID), reasoning_parser="think") as harness:
            body = {**TOLD[path], limit: 500}
            whole = await harness.post(path, body)
            check_against(content["application/json"]["schema"], whole.json)
            told = (await harness.post(path, {**body, "stream": True})).body.decode()
            lines = [line for line in told.split("\n") if line.startswith("data: {")]
            assert len(lines) > 5
            for line in lines:
                event = json.loads(line.removeprefix("data: "))
                check_against(content["text/event-stream"]["x-event"], event)
            if path != "/v1/completions":
                assert "weather" in told

    asyncio.run(scenario())


def check_against(reference: dict[str, str], value: Any) -> None:
    described = DESCRIPTION["components"]["schemas"][reference["$ref"].rpartition("/")[2]]
    Draft202012Validator(described).validate(value)
