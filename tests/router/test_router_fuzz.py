"""No input crashes the router: bodies, headers and chat templates that nobody would write."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.api import CompletionBody
from router.api_chat import ChatBody
from router.api_embeddings import EmbeddingBody
from router.responses.body import ResponsesBody
from tests.router.harness import Answer, Harness, endless, router
from tests.router.test_router_bad_input import check_error

PATHS = (
    *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings"),
    *("/tokenize", "/detokenize"),
)
USER = [{"role": "user", "content": "hi"}]
BOUNDED = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.text(max_size=20)
)
_JSON = st.recursive(
    _SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
_NAMES = st.sampled_from(
    sorted(
        {
            *(*CompletionBody.model_fields, *ChatBody.model_fields),
            *(*EmbeddingBody.model_fields, *ResponsesBody.model_fields),
        }
    )
)
_VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 2},
    "/v1/chat/completions": {"messages": USER, "max_tokens": 2},
    "/v1/responses": {"input": "x", "max_output_tokens": 2},
    "/v1/embeddings": {"input": "x"},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [1]},
}


class Served:
    """A router in a thread of its own, asked from this one."""

    def __init__(self, harness: Harness, loop: asyncio.AbstractEventLoop) -> None:
        self.harness = harness
        self._loop = loop

    def ask(self, asked: Coroutine[Any, Any, Answer]) -> Answer:
        return asyncio.run_coroutine_threadsafe(asked, self._loop).result(30)

    def post(self, path: str, body: Any) -> Answer:
        return self.ask(self.harness.post(path, body))


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    made: list[Served] = []
    ready = threading.Event()

    async def serve() -> None:
        async with router(endless, trust_request_chat_template=True) as harness:
            made.append(Served(harness, loop))
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(20)
    yield made[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(20)
    loop.close()


def check(answer: Answer) -> None:
    """An answer, or an error of the client's in OpenAI's shape."""
    if answer.status != 200:
        assert 400 <= answer.status < 500, answer.body
        check_error(answer, answer.status)


@BOUNDED
@given(path=st.sampled_from(PATHS), body=st.binary(max_size=60) | _JSON.map(json.dumps))
def test_any_body(served: Served, path: str, body: bytes | str) -> None:
    check(served.post(path, body if isinstance(body, bytes) else body.encode()))


@BOUNDED
@given(path=st.sampled_from(PATHS), fields=st.dictionaries(_NAMES, _JSON, max_size=3))
def test_any_fields(served: Served, path: str, fields: dict[str, Any]) -> None:
    check(served.post(path, json.dumps({**_VALID[path], **fields}).encode()))


@BOUNDED
@given(messages=st.lists(st.dictionaries(st.sampled_from(["role", "content", "name"]), _JSON)))
def test_any_messages(served: Served, messages: list[Any]) -> None:
    body = {"messages": messages, "max_tokens": 2}
    check(served.post("/v1/chat/completions", json.dumps(body).encode()))


_HEADER_NAMES = (
    *("Authorization", "x-api-key", "x-request-id", "Origin", "Accept", "Content-Type", "Cookie"),
    *("Accept-Encoding", "Access-Control-Request-Method", "If-None-Match", "Range", "Expect"),
)
# Where there is no such route, aiohttp answers `Expect` itself, and breaks where it is no text.
_ROUTES = ("GET /v1/models", "POST /v1/completions", "HEAD /health", "GET /openapi.json")


@BOUNDED
@given(
    headers=st.dictionaries(st.sampled_from(_HEADER_NAMES), st.binary(max_size=40)),
    route=st.sampled_from(_ROUTES),
)
def test_any_head(served: Served, headers: dict[str, bytes], route: str) -> None:
    lines = b"".join(
        name.encode() + b": " + value.replace(b"\r", b"").replace(b"\n", b"") + b"\r\n"
        for name, value in headers.items()
    )
    head = f"{route} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n".encode()
    status = asyncio.run(_status(served.harness.url, head + lines + b"Content-Length: 0\r\n\r\n"))
    assert status < 500


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "OPTIONS", "TRACE", "BREW"])
@pytest.mark.parametrize("target", ["/health", "/nowhere", "*", "//", "/%", "http://x/y", "x"])
def test_odd_request_lines(served: Served, method: str, target: str) -> None:
    head = f"{method} {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert asyncio.run(_status(served.harness.url, head.encode())) < 500


@pytest.mark.parametrize("expect", [b"nonsense", b"\x80", b"100-continue"])
def test_what_a_client_expects(served: Served, expect: bytes) -> None:
    head = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: " + expect
    status = asyncio.run(_status(served.harness.url, head + b"\r\n\r\n"))
    assert status == (100 if expect == b"100-continue" else 200)


@BOUNDED
@given(data=st.binary(max_size=80))
def test_any_bytes(served: Served, data: bytes) -> None:
    assert asyncio.run(_status(served.harness.url, data + b"\r\n\r\n", ends=True)) < 500
    assert served.ask(served.harness.get("/health")).status == 200


async def _status(url: str, data: bytes, *, ends: bool = False) -> int:
    """The answer's status; 0 if the connection ends without one.

    Args:
        ends: the client says that nothing follows, which may come before its answer is written.
    """
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(data)
        if ends:
            writer.write_eof()
        line = await asyncio.wait_for(reader.readline(), 20)
    except (ConnectionError, TimeoutError):
        return 0
    finally:
        writer.close()
    return int(line.split()[1]) if line.startswith(b"HTTP/1.") else 0


_PIECES = st.sampled_from(
    [
        "{{ messages }}",
        "{{ messages[0].content }}",
        "{% for m in messages %}",
        "{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ raise_exception('no') }}",
        "{% if x %}",
        "{% endif %}",
        "{{ 1 / 0 }}",
        "{{ undefined.attribute }}",
        "{{ range(10**9) }}",
        "{% include 'x' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 100 }}",
        "{{ '%n' | format(1) }}",
        "{{ cycler.__init__ }}",
        "{% set x = namespace(a=1) %}",
        "{{ messages | tojson }}",
        "{{ messages | no_such_filter }}",
        "{# ",
        "{{",
    ]
)


@BOUNDED
@given(
    template=st.lists(_PIECES | st.text(max_size=5), max_size=4).map("".join),
    kwargs=st.none() | st.dictionaries(st.text(max_size=8), _JSON, max_size=2),
)
def test_any_chat_template(served: Served, template: str, kwargs: dict[str, Any] | None) -> None:
    body = {
        **_VALID["/v1/chat/completions"],
        "chat_template": template,
        "chat_template_kwargs": kwargs,
    }
    answer = served.post("/v1/chat/completions", json.dumps(body).encode())
    check(answer)
    assert b"__globals__" not in answer.body or answer.status == 400
