"""The router as a process: what it loads, prints, refuses, and how it ends."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import IO

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from router.__main__ import main
from router.config import RouterConfig, is_loopback
from router.server import RouterServer
from tests.router import tiny_tokenizer
from tests.router.harness import alphabet, endless, router
from wire.curve import knock
from wire.errors import ConfigError

ROUTER = (sys.executable, "-m", "router", "--port", "0", "--control-port", "0")


def test_loads_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, router.__main__\n"
        "heavy = {'torch', 'transformers', 'triton', 'engine', 'kernels'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_prints_a_ready_line_and_ends_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    files = tiny_tokenizer.files()
    (tmp_path / "tokenizer.json").write_bytes(files.tokenizer_json)
    command = [*ROUTER, "--tokenizer", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            fields = dict(part.split("=", 1) for part in _ready_line(process.stdout).split()[3:])
            assert fields["http"].startswith("http://127.0.0.1:")
            assert fields["control"].startswith("tcp://127.0.0.1:")
            process.send_signal(number)
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()


def _ready_line(stdout: IO[str] | None) -> str:
    assert stdout is not None
    line = stdout.readline()
    assert line.startswith("baton router ready "), line
    return line


def test_one_line_for_what_cannot_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, expected in (
            (["--control-port", "0", "--port", port], f"cannot listen on 127.0.0.1:{port}"),
            (["--port", "0", "--control-port", port], "cannot listen on 'tcp://127.0.0.1:"),
            (["--tokenizer", str(tmp_path)], "cannot read the tokenizer"),
            (["--host", "0.0.0.0"], "--insecure"),
            (["--control-host", "0.0.0.0"], "baton keygen"),
            (["--key-file", str(tmp_path / "none")], "there is no key file"),
        ):
            assert main(arguments) != 0
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("baton router: error: ")
            assert expected in line


def test_addresses_that_others_reach_need_insecure() -> None:
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org"):
        assert not is_loopback(host)
        with pytest.raises(ConfigError, match="--insecure"):
            RouterConfig(host=host)
        assert RouterConfig(host=host, insecure=True).host == host
    key = Path("fleet.key")
    assert RouterConfig(control_host="0.0.0.0", key_file=key).key_file == key
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        assert RouterConfig(host=host, control_host=host)


def ipv6_works() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.skipif(not ipv6_works(), reason="this machine has no IPv6")
def test_nodes_may_connect_over_ipv6() -> None:
    async def scenario() -> None:
        server = RouterServer(RouterConfig(port=0, control_host="::1", control_port=0))
        await server.start()
        assert server.control.url.startswith("tcp://[::1]:")
        assert await asyncio.to_thread(knock, server.control.url, None, 20) is None
        await server.close()

    asyncio.run(scenario())


def _use_openai_client(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["stub"]
        messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
        chat = client.chat.completions.create(
            model="stub",
            messages=messages,
            max_completion_tokens=30,
            seed=1,
        )
        assert chat.choices[0].message.content == alphabet(30)
        assert chat.choices[0].finish_reason == "length"
        stream = client.chat.completions.create(
            model="stub",
            messages=messages,
            max_tokens=30,
            n=2,
            stream=True,
            stream_options={"include_usage": True},
        )
        texts = {0: "", 1: ""}
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert texts == {0: alphabet(30), 1: alphabet(30)}
        assert chunk.usage is not None
        assert chunk.usage.completion_tokens == 60
        completion = client.completions.create(model="stub", prompt=["a", "b"], max_tokens=5)
        assert [choice.text for choice in completion.choices] == ["abcde", "abcde"]
        _read_logprobs(client, messages)
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="other", prompt="x")
        with pytest.raises(openai.BadRequestError, match="max_tokens") as caught:
            client.completions.create(model="stub", prompt="x", max_tokens=-1)
        assert caught.value.param == "max_tokens"


def _read_logprobs(client: openai.OpenAI, messages: list[ChatCompletionMessageParam]) -> None:
    chat = client.chat.completions.create(
        model="stub", messages=messages, max_tokens=3, logprobs=True, top_logprobs=2
    )
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content or []
    assert [entry.token for entry in content] == ["a", "b", "c"]
    assert [top.token for top in content[0].top_logprobs] == ["a", "b"]
    assert content[0].bytes == [97]
    completion = client.completions.create(
        model="stub", prompt="hi", max_tokens=3, logprobs=1, echo=True
    )
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["h", "i", "a", "b", "c"]
    assert logprobs.text_offset == [0, 1, 2, 3, 4]
    assert completion.choices[0].text == "hiabc"


def test_the_openai_client() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            await asyncio.to_thread(_use_openai_client, harness.url)

    asyncio.run(scenario())
