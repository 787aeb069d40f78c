"""`baton run-batch` with a fleet of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.fleet import ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


def test_a_fleet_starts_for_the_batch_and_ends_with_it(tmp_path: Path) -> None:
    urls = {"a": "/v1/completions", "b": "/v1/chat/completions"}
    bodies = {
        "a": {"prompt": "def f(", "max_tokens": 3},
        "b": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3},
    }
    lines = [
        json.dumps({"custom_id": name, "method": "POST", "url": url, "body": bodies[name]})
        for name, url in urls.items()
    ]
    (tmp_path / "in").write_text("\n".join(lines))
    argv = [sys.executable, "-m", "baton", "run-batch", "-i", "in", "-o", "out"]
    run = subprocess.run(
        [*argv, "--kv-memory", "64M", "--threads", "1"],
        cwd=tmp_path,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    print(run.stderr)
    assert run.returncode == 0
    assert run.stdout == ""
    results = [json.loads(text) for text in (tmp_path / "out").read_text().splitlines()]
    assert {r["response"]["body"]["usage"]["completion_tokens"] for r in results} == {3}
    assert sorted(r["custom_id"] for r in results) == sorted(urls)
