"""Where a request's time went, told by real processes: every source tells the same."""

from __future__ import annotations

import json
import time
import urllib.request
from decimal import Decimal
from typing import Any

import pytest

from baton.bundled_model import DEFAULT_MODEL
from tests.e2e.conftest import MakeFleet
from tests.e2e.fleet import Fleet

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

CHUNK = 64
NUM_PROMPT = 300
BODY = {
    "model": DEFAULT_MODEL.name,
    "prompt": [300] * NUM_PROMPT,
    "max_tokens": 4,
    "ignore_eos": True,
}


def ask(fleet: Fleet) -> tuple[str, str]:
    """The Server-Timing header of an answer, and the answer's id."""
    data, kind = json.dumps(BODY).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{fleet.url}/v1/completions", data, kind)
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.headers["Server-Timing"], json.loads(response.read())["id"]


def told(fleet: Fleet, id: str) -> Any:
    """The request, once the prefill node has told of its handoff."""
    for _ in range(600):
        with urllib.request.urlopen(f"{fleet.url}/debug/requests/{id}", timeout=10) as response:
            request = json.loads(response.read(), parse_float=Decimal)
        if request["choices"][0]["attempts"][-1]["transfer"] is not None:
            return request
        time.sleep(0.05)
    raise AssertionError("the prefill node did not tell of its handoff")


def test_header_page_and_metrics_of_real_nodes_agree(make_fleet: MakeFleet) -> None:
    fleet = make_fleet().start(flags=("--max-num-batched-tokens", str(CHUNK)))
    prefill, decode = fleet.nodes["prefill-0"], fleet.nodes["decode-0"]

    header, id = ask(fleet)
    (choice,) = told(fleet, id)["choices"]
    timing = [entry.split(";dur=") for entry in header.split(", ")]
    names = [name for name, _ in timing]
    before = timing[: names.index("ttft")]
    ttft = 1000 * choice["ttft_s"]
    assert sum(Decimal(dur) for _, dur in before) == ttft == Decimal(dict(timing)["ttft"])
    phases = {phase["phase"]: phase["seconds"] for phase in choice["phases"]}
    assert sum(phases.values()) == choice["total_s"]
    assert list(phases)[: len(before)] == [name for name, _ in before]
    assert {"prefill", "decode"} <= phases.keys()

    (attempt,) = choice["attempts"]
    assert attempt["prefill_timing"]["num_steps"] == -(-NUM_PROMPT // CHUNK)
    assert attempt["decode_messages"] == 3  # the first of four tokens is the prefill node's
    transfer, sent = attempt["transfer"], prefill.metrics()
    assert transfer["num_bytes"] == sent["baton_transfer_bytes_sent_total"]
    assert 0 < transfer["tail_bytes"] < transfer["num_bytes"]
    label = f'{{transport="{transfer["transport"]}"}}'
    for field, name in (
        ("num_bytes", "baton_transfer_bytes"),
        ("seconds", "baton_transfer_seconds"),
        ("tail_bytes", "baton_transfer_tail_bytes"),
        ("tail_s", "baton_transfer_tail_seconds"),
        ("commit_wait_s", "baton_transfer_commit_wait_seconds"),
    ):
        assert sent[f"{name}_sum{label}"] == float(transfer[field]), name
        assert sent[f"{name}_count{label}"] == 1
    steps = f'vllm:iteration_tokens_total_sum{{model_name="{DEFAULT_MODEL.name}"}}'
    assert sent[steps] == NUM_PROMPT
    assert decode.metrics()[steps] == 3
    assert decode.metrics()['baton_leases{state="receiving"}'] == 0
    fleet.assert_balanced()
