"""Sends one request to an OpenAI-compatible endpoint and times what comes back."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import aiohttp

from tuner.record import (
    ProtocolError,
    RequestRecord,
    StreamReader,
    error_text,
    server_phases,
)
from tuner.workload import RequestSpec
from wire.errors import ConfigError

Clock = Callable[[], float]


class Endpoint(StrEnum):
    """Which of the two generating routes is asked."""

    COMPLETIONS = "completions"
    CHAT = "chat"

    @property
    def route(self) -> str:
        return "/v1/chat/completions" if self is Endpoint.CHAT else "/v1/completions"


def base_url(text: str) -> str:
    """What stands before `/v1/completions`; users give it with or without the `/v1`."""
    return text.rstrip("/").removesuffix("/v1")


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go and how they are phrased."""

    url: str  # a `base_url`
    model: str | None  # None until `resolve_model`
    endpoint: Endpoint = Endpoint.COMPLETIONS
    temperature: float = 0.0
    ignore_eos: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float = 600.0


def request_body(target: Target, spec: RequestSpec) -> dict[str, Any]:
    """The JSON body for `spec`.

    `ignore_eos` is not part of OpenAI's API and is sent only where asked for.
    """
    body: dict[str, Any] = {
        "model": target.model,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": target.temperature,
    }
    if target.endpoint is Endpoint.CHAT:
        body["messages"] = [{"role": "user", "content": spec.prompt}]
        body["max_completion_tokens"] = spec.output_len
    else:
        body["prompt"] = spec.prompt
        body["max_tokens"] = spec.output_len
    if target.ignore_eos:
        body["ignore_eos"] = True
    return body


async def send(
    session: aiohttp.ClientSession, target: Target, spec: RequestSpec, due: float, clock: Clock
) -> RequestRecord:
    """Send `spec` and read its stream to the end; every failure ends up in the record."""
    reader = StreamReader()
    start = clock()
    kind, message = await _exchange(session, target, request_body(target, spec), reader, clock)
    record = RequestRecord(
        index=spec.index,
        due=due,
        start=start,
        end=clock(),
        chunk_times=tuple(reader.chunk_times),
        prompt_tokens=reader.prompt_tokens,
        output_tokens=reader.output_tokens,
        error=kind,
        message=message,
        phases=reader.phases,
    )
    if record.prompt_tokens or not isinstance(spec.prompt, tuple):
        return record
    return replace(record, prompt_tokens=len(spec.prompt))  # the server sent no usage


async def _exchange(
    session: aiohttp.ClientSession,
    target: Target,
    body: dict[str, Any],
    reader: StreamReader,
    clock: Clock,
) -> tuple[str | None, str]:
    """Fill `reader`; answers (None, "") or the kind and the text of what went wrong."""
    try:
        async with session.post(target.url + target.endpoint.route, json=body) as response:
            if response.status != 200:
                return f"http_{response.status}", await _refusal(response)
            if response.content_type == "application/json":
                return "bad_stream", "the answer is one JSON object, not a stream of events"
            reader.phases = server_phases(response.headers.get("Server-Timing", ""))
            async for data in response.content.iter_any():
                reader.feed(data, clock())
        reader.close()
    except ProtocolError as error:
        return error.kind, str(error)
    except TimeoutError:
        return "timeout", f"no complete response within {target.timeout_s:g} s"
    except aiohttp.ClientConnectorError as error:
        return "connect", reason(error)
    except (aiohttp.ClientError, OSError) as error:
        return "disconnect", reason(error)
    return None, ""


def reason(error: Exception) -> str:
    """The system's own words where there are any, else the library's."""
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, OSError) and cause.errno and cause.errno > 0:
        return os.strerror(cause.errno)
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__


async def _refusal(response: aiohttp.ClientResponse) -> str:
    text = (await response.content.read(65536)).decode(errors="replace")
    try:
        return error_text(json.loads(text))
    except ValueError:
        return text[:500] or str(response.reason)


def make_session(target: Target) -> aiohttp.ClientSession:
    """A session that opens as many connections as there are requests in flight."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=target.timeout_s, sock_connect=10),
        headers=target.headers,
    )


async def resolve_model(session: aiohttp.ClientSession, target: Target) -> Target:
    """`target` with a model: its own if that is served (or cannot be checked), else the first one.

    Raises:
        ConfigError: nothing answers there, or it does not serve that model.
    """
    served = await _served_models(session, target.url)
    if target.model is None:
        if not served:
            raise ConfigError(f"{target.url}/v1/models lists no model; give one with --model")
        return replace(target, model=served[0])
    if served and target.model not in served:
        known = ", ".join(served)
        raise ConfigError(f"{target.url} does not serve {target.model!r}; it serves {known}")
    return target


async def _served_models(session: aiohttp.ClientSession, url: str) -> list[str]:
    """Names of the served models; empty where the endpoint does not tell."""
    try:
        async with session.get(url + "/v1/models") as response:
            if response.status == 401:
                raise ConfigError(f"{url} wants a key; give it with --api-key")
            if response.status != 200:
                return []
            body = await response.json(content_type=None)
    except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError) as error:
        raise ConfigError(f"not a URL: {url}") from error
    except TimeoutError as error:
        raise ConfigError(f"no answer from {url}") from error
    except (aiohttp.ClientError, OSError) as error:
        raise ConfigError(f"cannot reach {url}: {reason(error)}") from error
    except ValueError:
        return []
    entries = body.get("data") if isinstance(body, dict) else None
    known = entries if isinstance(entries, list) else []
    return [str(entry["id"]) for entry in known if isinstance(entry, dict) and "id" in entry]
