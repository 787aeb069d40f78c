"""Decode nodes that draft, each in its own way: the same answers as without, whoever dies."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from baton.bundled_model import BUNDLED, DEFAULT_MODEL
from tests.e2e.client import Answer, Client
from tests.e2e.conftest import MakeFleet
from tests.e2e.fleet import Fleet
from tests.e2e.test_faults import num_moved, until_busy
from tests.e2e.test_mixed import served
from tests.engine.tiny_heads import save_eagle_for_bundled

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

CONFIGS = {
    "decode-0": {"model": str(BUNDLED / "baton-draft"), "num_speculative_tokens": 4},
    "decode-1": {"method": "ngram", "num_speculative_tokens": 6, "prompt_lookup_min": 1},
}
PROMPT = "def first(items):\n    return items[0]\n\n\ndef second(items):\n    return items[1]\n\n\n"
ASKED: list[dict[str, Any]] = [
    {"temperature": 0, "max_tokens": 60},
    {"temperature": 0.8, "seed": 3, "max_tokens": 60, "ignore_eos": True},
    {"temperature": 0, "max_tokens": 60, "stop": ["return items["], "ignore_eos": True},
    {"temperature": 0.5, "seed": 4, "max_tokens": 40, "logprobs": 2, "ignore_eos": True},
    {"temperature": 0.3, "seed": 5, "max_tokens": 37, "frequency_penalty": 0.2},
    {"temperature": 0, "max_tokens": 50, "structured_outputs": {"regex": "(ab|cd){10,20}"}},
]


async def ask_all(fleet: Fleet, *, drafts: bool, kill: str = "") -> list[Answer]:
    """All questions at once; the kill comes in the middle."""
    before = fleet.nodes[kill].metrics()["baton_sampled_tokens_total"] if kill else 0
    async with Client(fleet.url) as client:
        streams = [
            asyncio.ensure_future(
                client.stream(
                    model=DEFAULT_MODEL.name,
                    prompt=PROMPT * (1 + 2 * number),
                    speculative_decoding=drafts,
                    return_token_ids=True,
                    **asked,
                )
            )
            for number, asked in enumerate(ASKED)
        ]
        if kill:
            await until_busy(fleet, kill, before + 20)
            fleet.kill(kill)
        return await asyncio.gather(*streams)


def told(answer: Answer) -> object:
    assert answer.status == 200
    assert answer.error is None
    return answer.text, answer.token_ids, answer.finish_reason, answer.usage["completion_tokens"]


def test_drafts_change_no_answer(make_fleet: MakeFleet, tmp_path: Path) -> None:
    fleet = make_fleet()
    fleet.start_router()
    fleet.start_node("prefill", "prefill-0")
    head = {"method": "eagle", "model": str(save_eagle_for_bundled(tmp_path / "head"))}
    for name, config in {**CONFIGS, "decode-2": head}.items():
        fleet.start_node("decode", name, "--speculative-config", json.dumps(config))
    for node in fleet.nodes.values():
        node.wait_ready()
    fleet.wait_for_nodes()

    told_by = {node["name"]: node["speculation"] for node in served(fleet, "/debug/fleet")["nodes"]}
    assert told_by == {
        "prefill-0": "",
        "decode-0": "draft_model baton-draft, up to 4 tokens",
        "decode-1": "ngram, up to 6 tokens",
        "decode-2": "eagle head, up to 5 tokens",
    }
    plain = [told(answer) for answer in asyncio.run(ask_all(fleet, drafts=False))]
    assert set(num_drafted(fleet).values()) == {0}
    for _ in range(2):
        assert [told(answer) for answer in asyncio.run(ask_all(fleet, drafts=True))] == plain
    assert all(num_drafted(fleet).values()), "a node drafted nothing"

    answers = asyncio.run(ask_all(fleet, drafts=True, kill="decode-0"))
    assert [told(answer) for answer in answers] == plain
    assert num_moved(fleet) > 0, "the node died too late to disturb anybody"
    fleet.assert_balanced()


def num_drafted(fleet: Fleet) -> dict[str, float]:
    """Draft tokens that each decode node has computed."""
    decode = [name for name in fleet.nodes if name.startswith("decode")]
    metrics = {name: fleet.nodes[name].metrics() for name in decode}
    total = f'vllm:spec_decode_num_draft_tokens_total{{model_name="{DEFAULT_MODEL.name}"}}'
    return {name: found[total] for name, found in metrics.items()}
