"""Flags of a node: what they become, and one clear line for each mistake."""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest
import zmq

from node.config import NodeConfig, is_loopback, split_url
from node.flags import add_arguments, add_decode_arguments, from_args, parse_bytes
from node.main import wait_for_routers
from node.performance import MODES
from node.tokenizer_files import read_tokenizer
from wire.curve import FleetContext
from wire.errors import ConfigError
from wire.fleet_key import make_key
from wire.sockets import Hub
from wire.types import NodeId


def config(*flags: str, model: str = "some/model") -> NodeConfig:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_arguments(parser)
    add_decode_arguments(parser)
    return from_args(parser.parse_args([model, *flags]), role="decode", pid=77)


def test_defaults() -> None:
    made = config()
    assert made.name == f"decode-{socket.gethostname()}-77"
    assert made.served_model_name == "model"
    assert made.routers == ("tcp://127.0.0.1:7400",)
    assert made == NodeConfig(Path("some/model"), made.name, served_model_name="model")


def test_every_flag_arrives() -> None:
    flags: dict[str, Any] = {
        "router": "tcp://10.0.0.1:1",
        "served-model-name": "gpt",
        "name": "n",
        "host": "0.0.0.0",
        "advertise-host": "box",
        "port": 9,
        "key-file": "the.key",
        "router-timeout": 3.5,
        "drain-timeout": 4.5,
        "device": "cpu",
        "gpu-memory-utilization": 0.5,
        "dtype": "bfloat16",
        "threads": 2,
        "max-model-len": 99,
        "block-size": 8,
        "kv-cache-memory": "1M",
        "max-num-seqs": 5,
        "max-num-batched-tokens": 6,
        "long-prefill-token-threshold": 4,
        "kv-overcommit": 1.5,
        "lease-ttl": 2.5,
        "transfer-dtype": "fp8",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    made = config(
        *words, "--router", "tcp://b:2", "--insecure", "--no-prefix-caching", "--async-scheduling"
    )
    assert made == NodeConfig(
        model=Path("some/model"),
        name="n",
        routers=("tcp://10.0.0.1:1", "tcp://b:2"),
        served_model_name="gpt",
        host="0.0.0.0",
        advertise_host="box",
        port=9,
        key_file=Path("the.key"),
        insecure=True,
        gpu_memory_utilization=0.5,
        dtype="bfloat16",
        threads=2,
        max_model_len=99,
        block_size=8,
        kv_memory=1 << 20,
        max_num_seqs=5,
        max_num_batched_tokens=6,
        long_prefill_token_threshold=4,
        kv_overcommit=1.5,
        enable_prefix_caching=False,
        async_scheduling=True,
        lease_ttl_s=2.5,
        transfer_dtype="fp8",
        router_timeout_s=3.5,
        drain_timeout_s=4.5,
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--host", "0.0.0.0"), "baton keygen.*--key-file.*--insecure"),
        (("--host", "::"), "--insecure"),
        (("--host", "example.org"), "--insecure"),
        (("--host", ""), "--host"),
        (("--port", "-1"), "--port"),
        (("--port", "65536"), "--port"),
        (("--threads", "-1"), "--threads"),
        (("--block-size", "0"), "--block-size"),
        (("--block-size", "2048"), "--block-size"),
        (("--kv-memory", "-1"), "--kv-cache-memory"),
        (("--long-prefill-token-threshold", "-1"), "--long-prefill-token-threshold"),
        (("--kv-overcommit", "0.5"), "--kv-overcommit"),
        (("--kv-overcommit", "nan"), "--kv-overcommit"),
        (("--kv-overcommit", "inf"), "--kv-overcommit"),
        (("--max-num-seqs", "0"), "--max-num-seqs"),
        (("--max-num-batched-tokens", "0"), "--max-num-batched-tokens"),
        (("--lease-ttl-s", "0"), "--lease-ttl-s"),
        (("--lease-ttl-s", "nan"), "--lease-ttl-s"),
        (("--router-timeout-s", "-1"), "--router-timeout-s"),
        (("--drain-timeout-s", "inf"), "--drain-timeout-s"),
        (("--name", "two words"), "--name"),
        (("--name", "x" * 257), "--name"),
        (("--served-model-name", "x" * 257), "--served-model-name"),
        (("--router", "http://127.0.0.1:80"), "is not an address"),
        (("--router", "tcp://127.0.0.1"), "is not an address"),
        (("--router", "tcp://127.0.0.1:x"), "is not an address"),
        (("--router", "tcp://127.0.0.1:99999"), "is not an address"),
        (("--router", "tcp://127.0.0.1:²"), "is not an address"),
        (("--router", ""), "is not an address"),
        (
            ("--async-scheduling", "--speculative-config", '{"method": "ngram"}'),
            "--async-scheduling.*--speculative-config",
        ),
    ],
)
def test_mistakes(flags: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        config(*flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--device", "cpu"), False),
        (("--device", "cpu", "--async-scheduling"), True),
        (("--device", "cuda:1"), True),
        (("--device", "cuda:1", "--no-async-scheduling"), False),
        (("--device", "cuda:1", "--speculative-config", '{"method": "ngram"}'), False),
    ],
)
def test_steps_are_looked_beyond_where_there_is_a_device(
    flags: tuple[str, ...], expected: bool
) -> None:
    assert config(*flags).async_scheduling is expected


def test_a_folder_without_a_name_needs_one() -> None:
    assert config("--served-model-name", "m", model="/").served_model_name == "m"
    with pytest.raises(ConfigError, match="--served-model-name"):
        config(model="/")


@pytest.mark.parametrize(
    ("text", "number"),
    [("4096", 4096), ("512M", 512 << 20), ("2g", 2 << 30), ("1.5KiB", 1536), ("3kb", 3072)],
)
def test_sizes(text: str, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "M", "lots", "1T", "1KK", "inf", "1e999", "nan"])
def test_not_sizes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size"):
        parse_bytes(text)


def test_addresses() -> None:
    assert split_url("tcp://127.0.0.1:7400") == ("127.0.0.1", 7400)
    assert split_url("tcp://[::1]:7400") == ("::1", 7400)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    assert NodeConfig(Path("m"), "n", host=host).public_host == host


def test_the_host_that_others_use() -> None:
    open_to_all = ("--host", "0.0.0.0", "--insecure")
    assert config(*open_to_all).public_host == socket.gethostname()
    assert config(*open_to_all, "--advertise-host", "box").public_host == "box"
    assert config("--host", "10.1.1.1", "--insecure").public_host == "10.1.1.1"


def test_a_key_allows_other_machines() -> None:
    assert config("--host", "0.0.0.0", "--key-file", "k").key_file == Path("k")


def test_urls_that_others_use() -> None:
    assert config().url("tcp", "tcp://127.0.0.1:5555") == "tcp://127.0.0.1:5555"
    six = config("--host", "::1")
    assert six.url("tcp", "tcp://[::1]:5555") == "tcp://[::1]:5555"
    assert six.bind_url == "tcp://[::1]:*"
    assert six.ipv6
    assert config("--router", "tcp://[fe80::1]:7400").ipv6
    assert not config().ipv6
    wide = config("--host", "0.0.0.0", "--insecure", "--advertise-host", "box")
    assert wide.url("http", "http://0.0.0.0:80") == "http://box:80"


# ---------------------------------------------------------------- waiting for routers


def test_a_router_that_listens_is_not_waited_for() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        port = router.bind_to_random_port("tcp://127.0.0.1")
        wait_for_routers([f"tcp://127.0.0.1:{port}"], None, 0)


def test_what_listens_but_is_no_router_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"no router at {url} \(no answer\)"):
            wait_for_routers([url], None, 0)


def test_a_router_with_another_key_is_one_clear_line() -> None:
    async def scenario() -> None:
        context = FleetContext(make_key())
        hub = Hub(NodeId("router", 1), "tcp://127.0.0.1:*", lambda _: None, context)
        for key, reason in ((make_key(), "does not take"), (None, "wants a fleet key")):
            with pytest.raises(ConfigError, match=f"does not let this node in: it {reason}"):
                await asyncio.to_thread(wait_for_routers, [hub.url], key, 0)
        hub.close()
        context.destroy(0)

    asyncio.run(scenario())


def test_no_router_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ConfigError, match=rf"no router at tcp://127.0.0.1:{port}.*refused"):
        wait_for_routers([f"tcp://127.0.0.1:{port}"], None, 0)


def test_a_host_that_is_no_name_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match="no router at"):
        wait_for_routers([f"tcp://{'x' * 70}:1"], None, 0)


# ---------------------------------------------------------------- the tokenizer's files


def test_the_tokenizer_is_read_as_it_lies_there(tiny_llama: Path) -> None:
    files = read_tokenizer(tiny_llama)
    assert json.loads(files.tokenizer_json)["model"]["type"] == "BPE"
    assert json.loads(files.tokenizer_config_json)["eos_token"] == "<|eos|>"
    assert files.chat_template == b""


def test_a_tokenizer_without_settings(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("hello")
    files = read_tokenizer(tmp_path)
    assert (files.tokenizer_config_json, files.chat_template) == (b"{}", b"hello")


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}"])
def test_settings_that_are_not_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(ConfigError, match="is not JSON"):
        read_tokenizer(tmp_path)


def test_files_that_no_message_can_carry(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_bytes(b"x" * ((1 << 20) + 1))
    with pytest.raises(ConfigError, match=r"chat_template\.jinja is larger than"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("mode", list(MODES))
def test_a_performance_mode_sets_what_is_not_given(mode: str) -> None:
    limits = MODES[mode]
    made = config("--performance-mode", mode)
    assert (made.max_num_batched_tokens, made.max_num_seqs, made.long_prefill_token_threshold) == (
        limits.max_num_batched_tokens,
        limits.max_num_seqs,
        limits.long_prefill_token_threshold,
    )
    own = config("--performance-mode", mode, "--max-num-seqs", "3")
    assert own.max_num_seqs == 3
    assert own.max_num_batched_tokens == limits.max_num_batched_tokens


def test_without_a_mode_the_limits_are_the_balanced_ones() -> None:
    assert config() == config("--performance-mode", "balanced")
    assert len(set(MODES.values())) == len(MODES)


def test_the_old_name_of_the_kv_pools_flag_still_works() -> None:
    assert config("--kv-memory", "3M") == config("--kv-cache-memory", "3M")
