"""Who may use the router and how much, through the real application."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import ssl
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import ClientResponse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.access_config import AccessConfig
from router.config import RouterConfig
from router.cors import Cors
from router.flags import add_arguments, from_args
from router.rate_limit import RateLimits
from tests.router.harness import Harness, alphabet, endless, eventually, router
from wire.errors import ConfigError

KEYS = AccessConfig(api_keys=("first", "second"))
SHORT = {"prompt": "hi", "max_tokens": 3}


async def ask(
    harness: Harness, method: str, path: str, **options: Any
) -> tuple[ClientResponse, bytes]:
    async with harness.session.request(method, harness.url + path, **options) as response:
        return response, await response.read()


async def complete(harness: Harness, key: str | None, **more: Any) -> tuple[ClientResponse, bytes]:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return await ask(harness, "POST", "/v1/completions", json=SHORT | more, headers=headers)


# ---------------------------------------------------------------- keys

COVERED = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/stub"),
    ("GET", "/version"),
    ("GET", "/load"),
    ("GET", "/debug/requests"),
    ("GET", "/no/such/route"),
    ("DELETE", "/v1/models"),
    ("OPTIONS", "/v1/completions"),
    ("GET", "/health/../v1/models"),
    ("GET", "//health"),
]


def test_every_route_but_the_open_ones_wants_a_key() -> None:
    async def scenario() -> None:
        async with router(endless, access=KEYS) as harness:
            served = {
                (route.method, resource.canonical)
                for resource in harness.routes
                for route in resource
                if route.method != "HEAD" and "{" not in resource.canonical
            }
            opened = {("GET", p) for p in ("/", "/health", "/ready", "/ping", "/metrics")}
            opened.add(("POST", "/ping"))
            for method, path in (*COVERED, *(served - opened)):
                for headers in ({}, {"Authorization": "Bearer wrong"}, {"x-api-key": "wrong"}):
                    response, _ = await ask(harness, method, path, headers=headers)
                    assert response.status == 401, (method, path)
                    assert response.headers["WWW-Authenticate"] == "Bearer"
                    error = (await response.json())["error"]
                    if path.startswith("/v1/messages"):
                        assert error["type"] == "authentication_error"
                        continue
                    assert error["code"] == "invalid_api_key"
                    assert error["type"] == "invalid_request_error"
            for method, path in opened:
                response, _ = await ask(harness, method, path)
                assert response.status == 200, (method, path)

    asyncio.run(scenario())


def test_each_key_opens_by_either_header() -> None:
    async def scenario() -> None:
        async with router(endless, access=KEYS) as harness:
            for headers in (
                {"Authorization": "Bearer first"},
                {"authorization": "bearer second"},
                {"x-api-key": "second"},
            ):
                response, _ = await ask(
                    harness, "POST", "/v1/completions", json=SHORT, headers=headers
                )
                assert response.status == 200
                assert "x-ratelimit-limit-requests" not in response.headers

    asyncio.run(scenario())


def _use_openai_client(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key"
    with openai.OpenAI(base_url=f"{url}/v1", api_key="second", max_retries=0) as client:
        answer = client.completions.create(model="stub", prompt="x", max_tokens=5)
        assert answer.choices[0].text == alphabet(5)
        assert answer._request_id
        stream = client.completions.create(model="stub", prompt="x", max_tokens=5, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == alphabet(5)
        with pytest.raises(openai.RateLimitError) as limited:
            client.completions.create(model="stub", prompt="x", max_tokens=5)
        assert limited.value.code == "rate_limit_exceeded"


def test_the_openai_client_with_a_wrong_and_a_right_key() -> None:
    access = AccessConfig(api_keys=KEYS.api_keys, limits=RateLimits(requests_per_minute=2))

    async def scenario() -> None:
        async with router(endless, access=access) as harness:
            await asyncio.to_thread(_use_openai_client, harness.url)

    asyncio.run(scenario())


HEADER_TEXT = st.text(
    st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=300
)


def test_no_authorization_header_gets_in_or_breaks_anything() -> None:
    async def scenario() -> None:
        async with router(endless, access=KEYS) as harness:
            host, port = harness.url.removeprefix("http://").split(":")
            loop = asyncio.get_running_loop()

            async def status(header: str) -> int:
                reader, writer = await asyncio.open_connection(host, int(port))
                head = (
                    f"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{header}\r\n\r\n"
                )
                writer.write(head.encode("latin-1"))
                answer = await reader.read()
                writer.close()
                with suppress(ConnectionError):
                    await writer.wait_closed()
                return int(answer.split()[1])

            @settings(
                max_examples=100,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            )
            @given(
                name=st.sampled_from(["Authorization", "x-api-key"]),
                scheme=st.sampled_from(["Bearer ", "bearer\t", "Basic ", "", "Bearer Bearer "]),
                rest=HEADER_TEXT,
            )
            def nobody_enters(name: str, scheme: str, rest: str) -> None:
                asked = status(f"{name}: {scheme}{rest}")
                found = asyncio.run_coroutine_threadsafe(asked, loop).result(20)
                right = rest.strip() in KEYS.api_keys
                assert found in ((200, 401) if right else (400, 401))

            await asyncio.to_thread(nobody_enters)
            assert await status("Authorization: Bearer first") == 200
            assert await status(f"Authorization: Bearer {'x' * 20_000}") == 400

    asyncio.run(scenario())


# ---------------------------------------------------------------- limits


def test_requests_per_minute_are_told_and_kept_for_each_key() -> None:
    access = AccessConfig(api_keys=KEYS.api_keys, limits=RateLimits(requests_per_minute=3))

    async def scenario() -> None:
        async with router(endless, access=access) as harness:
            for remaining in ("2", "1", "0"):
                response, _ = await complete(harness, "first", stream=remaining == "1")
                assert response.status == 200
                assert response.headers["x-ratelimit-limit-requests"] == "3"
                assert response.headers["x-ratelimit-remaining-requests"] == remaining
                assert response.headers["x-ratelimit-reset-requests"]
            response, _ = await complete(harness, "first")
            assert response.status == 429
            error = (await response.json())["error"]
            assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
            assert 1 <= int(response.headers["Retry-After"]) <= 20
            assert response.headers["x-ratelimit-remaining-requests"] == "0"
            response, _ = await complete(harness, "second")
            assert response.status == 200
            response, _ = await ask(
                harness, "GET", "/v1/models", headers={"Authorization": "Bearer first"}
            )
            assert response.status == 200  # looking is free

    asyncio.run(scenario())


def test_tokens_of_prompt_and_output_are_charged() -> None:
    access = AccessConfig(api_keys=KEYS.api_keys, limits=RateLimits(tokens_per_minute=100))

    async def scenario() -> None:
        async with router(endless, access=access) as harness:
            long = {"prompt": "x" * 40, "max_tokens": 20, "n": 2}
            response, _ = await complete(harness, "second", **long)
            assert response.headers["x-ratelimit-remaining-tokens"] == "20"
            long["max_tokens"] = 30
            response, _ = await complete(harness, "first", stream=True, **long)
            assert response.headers["x-ratelimit-remaining-tokens"] == "60"  # the prompt, so far
            response, _ = await complete(harness, "first")
            assert response.status == 429
            assert "100 tokens per minute" in (await response.json())["error"]["message"]

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [True, False])
def test_concurrency_is_bounded_and_given_back_when_a_client_leaves(stream: bool) -> None:
    access = AccessConfig(api_keys=KEYS.api_keys, limits=RateLimits(max_concurrency=1))

    async def scenario() -> None:
        async with router(endless, access=access, step_s=0.05) as harness:
            long = asyncio.create_task(complete(harness, "first", max_tokens=500, stream=stream))
            await eventually(lambda: len(harness.server.control.requests) > 0)
            response, _ = await complete(harness, "first")
            assert response.status == 429
            assert response.headers["Retry-After"] == "1"
            response, _ = await complete(harness, "second")
            assert response.status == 200
            long.cancel()
            await asyncio.gather(long, return_exceptions=True)
            await eventually(lambda: len(harness.server.control.requests) == 0)
            response, _ = await complete(harness, "first")
            assert response.status == 200

    asyncio.run(scenario())


def test_without_keys_the_limits_hold_for_all_together() -> None:
    access = AccessConfig(limits=RateLimits(requests_per_minute=1))

    async def scenario() -> None:
        async with router(endless, access=access) as harness:
            assert (await complete(harness, None))[0].status == 200
            assert (await complete(harness, "any"))[0].status == 429

    asyncio.run(scenario())


# ---------------------------------------------------------------- request ids


def test_request_ids() -> None:
    async def scenario() -> None:
        async with router(endless, access=KEYS) as harness:
            seen = set()
            for given_id, kept in (
                ("order-66_a.b:c/d", True),
                ("x" * 128, True),
                ("x" * 129, False),
                ("two words", False),
                ("<script>", False),
                ("é", False),
            ):
                headers = {"x-request-id": given_id}
                response, body = await ask(harness, "GET", "/v1/models", headers=headers)
                assert response.status == 401  # errors have one too
                assert (response.headers["x-request-id"] == given_id) is kept
                seen.add(response.headers["x-request-id"])
                assert given_id.encode() not in body
            assert len(seen) == 6
            headers = {"x-request-id": "mine", "Authorization": "Bearer first"}
            response, body = await ask(
                harness, "POST", "/v1/completions", json=SHORT | {"stream": True}, headers=headers
            )
            assert response.headers["x-request-id"] == "mine"
            assert b"mine" not in body  # no id within the fleet is a client's

    asyncio.run(scenario())


def test_a_failure_is_logged_with_the_request_id(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            monkeypatch.setattr(harness.server.serving, "check_room", None)
            headers = {"x-request-id": "find-me"}
            response, _ = await ask(harness, "POST", "/v1/completions", json=SHORT, headers=headers)
            assert response.status == 500

    asyncio.run(scenario())
    assert any("find-me" in record.getMessage() for record in caplog.records)


# ---------------------------------------------------------------- CORS

PAGE = "https://page.example"
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


@pytest.mark.parametrize("origins", [(PAGE,), ("*",)])
@pytest.mark.parametrize("credentials", [True, False])
def test_an_allowed_page_may_ask(origins: tuple[str, ...], credentials: bool) -> None:
    cors = Cors(allowed_origins=origins, allow_credentials=credentials)

    async def scenario() -> None:
        async with router(endless, access=AccessConfig(api_keys=("k",), cors=cors)) as harness:
            response, _ = await ask(harness, "OPTIONS", "/v1/completions", headers=PREFLIGHT)
            assert response.status == 204
            assert response.headers["Access-Control-Allow-Methods"] == "POST"
            assert response.headers["Access-Control-Allow-Headers"] == "authorization,content-type"
            origin = "*" if origins == ("*",) and not credentials else PAGE
            assert response.headers["Access-Control-Allow-Origin"] == origin
            for key in ("k", "wrong"):  # a page must be able to read its error
                headers = {"Origin": PAGE, "Authorization": f"Bearer {key}"}
                response, _ = await ask(
                    harness, "POST", "/v1/completions", json=SHORT, headers=headers
                )
                assert response.headers["Access-Control-Allow-Origin"] == origin
                assert ("Access-Control-Allow-Credentials" in response.headers) is credentials
                assert response.status == (200 if key == "k" else 401)

    asyncio.run(scenario())


def test_other_pages_may_not() -> None:
    async def scenario() -> None:
        cors = Cors(allowed_origins=("https://other.example",))
        for access, status in ((AccessConfig(cors=cors), 400), (AccessConfig(), 405)):
            async with router(endless, access=access) as harness:
                response, _ = await ask(harness, "OPTIONS", "/v1/completions", headers=PREFLIGHT)
                assert response.status == status
                assert "Access-Control-Allow-Origin" not in response.headers
                response, _ = await ask(harness, "GET", "/health", headers={"Origin": PAGE})
                assert response.status == 200
                assert "Access-Control-Allow-Origin" not in response.headers

    asyncio.run(scenario())


# ---------------------------------------------------------------- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl here to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    words = ["req", "-x509", "-nodes", "-days", "2", "-newkey", "ec"]
    words += ["-pkeyopt", "ec_paramgen_curve:prime256v1"]
    words += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    words += ["-keyout", str(key), "-out", str(cert)]
    subprocess.run([openssl, *words], check=True, capture_output=True, timeout=60)
    return cert, key


def test_https(certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    access = AccessConfig(api_keys=("k",), ssl_certfile=cert, ssl_keyfile=key)

    async def scenario() -> None:
        async with router(endless, access=access) as harness:
            assert harness.url.startswith("https://127.0.0.1:")
            trust = ssl.create_default_context(cafile=str(cert))
            for stream in (True, False):
                response, _ = await ask(
                    harness,
                    "POST",
                    "/v1/completions",
                    json=SHORT | {"stream": stream},
                    headers={"x-api-key": "k"},
                    ssl=trust,
                )
                assert response.status == 200

    asyncio.run(scenario())


def test_certificates_that_cannot_be_used(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = certificate
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no certificate")
    for certfile, keyfile in ((garbage, None), (tmp_path / "none", key), (cert, garbage)):
        with pytest.raises(ConfigError, match="cannot use the certificate"):
            AccessConfig(ssl_certfile=certfile, ssl_keyfile=keyfile).ssl_context()
    with pytest.raises(ConfigError, match="--ssl-keyfile needs --ssl-certfile"):
        AccessConfig(ssl_keyfile=key)


# ---------------------------------------------------------------- flags


def parsed(*words: str) -> RouterConfig:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return from_args(parser.parse_args(words))


def test_every_access_flag_arrives() -> None:
    made = parsed(
        *("--api-key", "a", "--api-key", "b", "--api-key-file", "keys"),
        *("--requests-per-minute", "1", "--tokens-per-minute", "2"),
        *("--max-concurrency-per-key", "3", "--ssl-certfile", "c", "--ssl-keyfile", "k"),
        *("--allowed-origins", '["https://a"]', "--allowed-methods", '["GET"]'),
        *("--allowed-headers", "[]", "--allow-credentials"),
    )
    assert made.access == AccessConfig(
        api_keys=("a", "b"),
        api_key_file=Path("keys"),
        limits=RateLimits(1, 2, 3),
        cors=Cors(("https://a",), ("GET",), (), True),
        ssl_certfile=Path("c"),
        ssl_keyfile=Path("k"),
    )
    assert parsed().access == AccessConfig()
    assert "'a'" not in repr(made)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--allowed-origins", "*"), "--allowed-origins must be a JSON list"),
        (("--allowed-methods", '"GET"'), "--allowed-methods must be a JSON list"),
        (("--allowed-headers", "[1]"), "--allowed-headers must be a JSON list"),
        (("--allowed-headers", '["a\\r\\nb"]'), "--allowed-headers must be printable"),
        (("--requests-per-minute", "-1"), "--requests-per-minute must not be negative"),
        (("--tokens-per-minute", "-1"), "--tokens-per-minute"),
        (("--max-concurrency-per-key", "-1"), "--max-concurrency-per-key"),
        (("--host", "0.0.0.0"), "--api-key-file.*--insecure"),
    ],
)
def test_mistakes_in_flags(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parsed(*words)


def test_keys_allow_other_machines() -> None:
    assert parsed("--host", "0.0.0.0", "--api-key", "k").host == "0.0.0.0"
    assert parsed("--host", "0.0.0.0", "--api-key-file", "f").host == "0.0.0.0"
