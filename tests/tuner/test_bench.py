"""`baton bench` against a small server in this process."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from tests.tuner.conftest import FakeServer
from tuner.bench import add_arguments, run
from tuner.settings import settings_from
from wire.errors import ConfigError


def arguments(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(flags)


def bench(url: str, *flags: str) -> int:
    return run(arguments("--url", url, *flags))


def test_completions_report(server: FakeServer, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    flags = ("--num-requests", "6", "--concurrency", "3", "--warmup", "1", "--json", str(path))
    assert bench(server.url + "/v1/", "--input-len", "4:8", "--output-len", "5", *flags) == 0
    report = json.loads(path.read_text())
    assert report["num_completed"] == 6
    assert (report["prompt_tokens"], report["output_tokens"]) == (66, 30)
    assert report["ttft_ms"]["count"] == 6
    assert report["itl_ms"]["count"] == 24
    assert report["settings"]["target"]["model"] == "first"
    assert len(server.bodies) == 7
    for body in server.bodies:
        assert body["stream_options"] == {"include_usage": True}
        assert 4 <= len(body["prompt"]) <= 8
        assert all(isinstance(token, int) for token in body["prompt"])
        assert "ignore_eos" not in body


def test_chat_with_rate_key_and_header(server: FakeServer, capsys: Any) -> None:
    load = ("--rate", "500", "--num-requests", "5", "--arrival", "poisson", "--ignore-eos")
    access = ("--api-key", "secret", "--header", "X-Team: red", "--model", "second")
    assert bench(server.url, "--endpoint", "chat", *load, *access, "--json", "-") == 0
    out = capsys.readouterr().out
    assert json.loads(out)["num_completed"] == 5
    assert "secret" not in out
    assert "red" not in out
    body, headers = server.bodies[0], server.headers[0]
    assert body["model"] == "second"
    assert len(body["messages"][0]["content"].split()) == 128
    assert body["max_completion_tokens"] == 64
    assert body["ignore_eos"] is True
    assert headers["Authorization"] == "Bearer secret"
    assert headers["X-Team"] == "red"


@pytest.mark.parametrize(("fault", "kind"), [("busy", "http_503"), ("cut", "truncated")])
def test_failures_are_counted_and_nothing_completed_is_exit_1(
    server: FakeServer, capsys: Any, fault: str, kind: str
) -> None:
    server.fault = fault
    assert bench(server.url, "--num-requests", "3") == 1
    out = capsys.readouterr().out
    assert "0 of 3 completed" in out
    assert f"3 x {kind}" in out


def test_a_server_that_does_not_stream_is_told_so(server: FakeServer, capsys: Any) -> None:
    server.fault = "whole"
    assert bench(server.url, "--num-requests", "2") == 1
    assert "2 x bad_stream: the answer is one JSON object" in capsys.readouterr().out


def test_requests_that_wait_for_a_place_are_told(server: FakeServer, capsys: Any) -> None:
    server.pause_s = 0.1
    load = ("--rate", "500", "--num-requests", "3", "--concurrency", "1", "--output-len", "1")
    assert bench(server.url, *load) == 0
    assert "its limit of 1 in flight, was too slow" in capsys.readouterr().out


def test_unknown_model_is_one_line(server: FakeServer, capsys: Any) -> None:
    assert bench(server.url, "--model", "third") == 1
    lines = capsys.readouterr().err.splitlines()
    expected = f"baton bench: {server.url} does not serve 'third'; it serves first, second"
    assert lines == [expected]


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "nonsense", "ftp://127.0.0.1"])
def test_unusable_url_is_one_line(capsys: Any, url: str) -> None:
    assert bench(url) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert url in line


def test_nobody_listening_is_said_in_the_systems_words(capsys: Any) -> None:
    assert bench("http://127.0.0.1:1") == 1
    expected = "baton bench: cannot reach http://127.0.0.1:1: Connection refused\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("flag", ["--json", "--html"])
def test_an_unwritable_report_is_one_line_before_anything_is_sent(
    server: FakeServer, tmp_path: Path, capsys: Any, flag: str
) -> None:
    for path in (tmp_path / "absent" / "report", tmp_path):
        assert bench(server.url, "--num-requests", "1", flag, str(path)) == 1
        assert capsys.readouterr().err.startswith(f"baton bench: cannot write {path}: ")
    assert server.bodies == []


def test_ctrl_c_reports_what_was_measured(server: FakeServer, capsys: Any) -> None:
    server.interrupt_at = 3
    assert bench(server.url, "--num-requests", "9", "--concurrency", "1") == 130
    captured = capsys.readouterr()
    assert "interrupted" in captured.err
    assert "2 of 2 completed" in captured.out


@pytest.mark.parametrize(
    "flags",
    [("--endpoint", "chat", "--prompt-kind", "tokens"), ("--header", "nocolon")],
)
def test_contradicting_flags(flags: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError):
        settings_from(arguments(*flags))


@pytest.mark.parametrize(
    "flags",
    [
        ("--input-len", "5:2"),
        ("--concurrency", "0"),
        ("--rate", "0"),
        ("--duration", "inf"),
        ("--endpoint", "other"),
    ],
)
def test_bad_values_are_refused_by_name(flags: tuple[str, ...], capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        arguments(*flags)
    assert caught.value.code == 2
    assert flags[0] in capsys.readouterr().err
