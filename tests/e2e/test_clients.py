"""Clients that others wrote, each in its own environment, against a router and nodes as processes.

`make test` installs them (`tests/clients/README.md`). What is not there is skipped and says so.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import MakeFleet
from tests.e2e.fleet import Fleet

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
OLD = ROOT / ".venv-clients" / "bin" / "python"
JS = ROOT / "tests" / "clients" / "js"

# What runs each program; each has a key of its own, so that their limits do not meet.
PROGRAMS = {
    "openai-3": [sys.executable, "-m", "tests.clients.openai_python"],
    "openai-2": [str(OLD), "-m", "tests.clients.openai_python"],
    "openai-3-structured": [sys.executable, "-m", "tests.clients.openai_structured_python"],
    "openai-2-structured": [str(OLD), "-m", "tests.clients.openai_structured_python"],
    "anthropic": [sys.executable, "-m", "tests.clients.anthropic_python"],
    "openai-node": ["node", str(JS / "openai_node.js")],
    "ai-sdk": ["node", str(JS / "ai_sdk.js")],
    "langchain": [str(OLD), "-m", "tests.clients.langchain_python"],
    "litellm": [str(OLD), "-m", "tests.clients.litellm_python"],
    "instructor": [str(OLD), "-m", "tests.clients.instructor_python"],
}


@pytest.fixture(scope="module")
def addresses(make_shared_fleet: MakeFleet) -> tuple[Fleet, str]:
    """A fleet whose nodes also serve a second router, which wants keys; and that one's address."""
    fleet = make_shared_fleet()
    keys = [flag for name in PROGRAMS for flag in ("--api-key", f"key-{name}")]
    guarded = fleet.start_router(*keys, "--requests-per-minute", "1")
    fleet.start(flags=("--router", guarded.fields["control"]))
    return fleet, guarded.url


def why_not(name: str) -> str | None:
    """Why a client cannot run here."""
    command = PROGRAMS[name][0]
    if command == "node":
        if shutil.which(command) is None:
            return "node is not installed"
        return None if (JS / "node_modules").is_dir() else _MISSING
    return None if Path(command).exists() else _MISSING


_MISSING = "this client is not installed; `make clients` does that where there is a network"


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_case_of(name: str, addresses: tuple[Fleet, str]) -> None:
    fleet, guarded = addresses
    if (reason := why_not(name)) is not None:
        pytest.skip(reason)
    servers = {
        "open": fleet.url,
        "guarded": guarded,
        "key": f"key-{name}",
        "model": fleet.model.name,
        "max_model_len": json.loads((fleet.model / "config.json").read_text())[
            "max_position_embeddings"
        ],
    }
    done = subprocess.run(
        [*PROGRAMS[name], json.dumps(servers)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    assert cases
    failed = [f"{case['case']}: {case['error']}" for case in cases if case["error"] is not None]
    assert not failed, "\n".join([*failed, done.stderr])
    fleet.assert_balanced()
