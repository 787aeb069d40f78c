"""Blocks leave while the prompt is still being computed, and the first token is computed once."""

from __future__ import annotations

import asyncio

import pytest

from baton.bundled_model import DEFAULT_MODEL
from tests.e2e.client import Client
from tests.e2e.conftest import MakeFleet

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


def test_blocks_arrive_before_the_prompt_is_computed(make_fleet: MakeFleet) -> None:
    fleet = make_fleet().start(flags=("--max-num-batched-tokens", "64"))
    prefill, decode = fleet.nodes["prefill-0"], fleet.nodes["decode-0"]

    async def watch() -> list[float]:
        """Bytes received at moments before the first token was sampled."""
        received = []
        async with Client(fleet.url) as client:
            body = {"model": DEFAULT_MODEL.name, "prompt": [300] * 1500, "max_tokens": 4}
            request = asyncio.ensure_future(client.complete(**body, ignore_eos=True))
            while not request.done():
                before = (await asyncio.to_thread(decode.metrics))[RECEIVED]
                if (await asyncio.to_thread(prefill.metrics))[SAMPLED] == 0:
                    received.append(before)
            assert (await request).status == 200
        return received

    received = asyncio.run(watch())
    total = decode.metrics()[RECEIVED]
    assert total > 0
    assert max(received) > total / 2, "most bytes waited for the end of the prompt"
    # Four tokens: one on the prefill node, three on the decode node, none twice.
    assert prefill.metrics()[SAMPLED] == 1
    assert decode.metrics()[SAMPLED] == 3
    fleet.assert_balanced()


RECEIVED = "baton_transfer_bytes_received_total"
SAMPLED = "baton_sampled_tokens_total"
