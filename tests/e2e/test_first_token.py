"""Requests whose first token, prompt or cached prefix is a special case of handing over."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from baton.bundled_model import DEFAULT_MODEL
from tests.e2e.client import Client
from tests.e2e.conftest import MakeFleet
from tests.e2e.fleet import Fleet
from tests.e2e.test_logprobs_served import post

BLOCK_SIZE = 16
PROMPT = "def read_lines(path):\n    "


def complete(fleet: Fleet, **fields: Any) -> Any:
    """The choice, and the usage."""
    body = {"prompt": PROMPT, "temperature": 0, "return_token_ids": True, **fields}
    answer = post(fleet.url, "/v1/completions", **body)
    (choice,) = answer["choices"]
    return choice, answer["usage"]


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_first_tokens_prefixes_and_seeds(make_fleet: MakeFleet) -> None:
    fleet = make_fleet().start()
    usual, _ = complete(fleet, max_tokens=8)
    first = usual["token_ids"][0]

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEFAULT_MODEL / "tokenizer.json"))
    text = tokenizer.decode([first])
    assert text

    for ends in ({"stop_token_ids": [first]}, {"stop": text}):
        choice, usage = complete(fleet, max_tokens=8, logprobs=0, **ends)
        assert (choice["text"], choice["finish_reason"]) == ("", "stop")
        assert usage["completion_tokens"] == len(choice["logprobs"]["tokens"]) == 1
    one, usage = complete(fleet, max_tokens=1)
    assert one["token_ids"] == [first]
    assert (one["finish_reason"], usage["completion_tokens"]) == ("length", 1)
    short, _ = complete(fleet, prompt=[first], max_tokens=4, ignore_eos=True)
    assert len(short["token_ids"]) == 4
    asyncio.run(check_seeds(fleet))
    check_prefixes(fleet, tokenizer.encode(PROMPT * 20).ids)
    fleet.assert_balanced()


async def check_seeds(fleet: Fleet) -> None:
    """A seed's tokens depend neither on others in the batch nor on the number of choices."""
    ask: dict[str, Any] = {"max_tokens": 16, "ignore_eos": True, "return_token_ids": True}
    mine = {**ask, "prompt": PROMPT, "seed": 7}
    async with Client(fleet.url) as client:
        alone = await client.complete(**mine)
        others = [{**ask, "prompt": PROMPT * i, "seed": i} for i in range(1, 7)]
        among, *_ = await asyncio.gather(*(client.complete(**body) for body in [mine, *others]))
        several = (await client.complete(**mine, n=3)).chunks[0]["choices"]
    assert among.token_ids == alone.token_ids == several[0]["token_ids"]
    assert len({tuple(choice["token_ids"]) for choice in several}) == 3


def check_prefixes(fleet: Fleet, tokens: list[int]) -> None:
    """Whole blocks, known to both nodes, then to one of them only: the same answer each time."""
    prompt = tokens[: 4 * BLOCK_SIZE]
    ask: dict[str, Any] = {"prompt": prompt, "max_tokens": 12, "ignore_eos": True}
    ask["cache_salt"] = "nobody else's"
    fresh, usage = complete(fleet, **ask)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    both, usage = complete(fleet, **ask)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 4 * BLOCK_SIZE - 1
    replace(fleet, "decode")
    on_prefill, usage = complete(fleet, **ask)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 4 * BLOCK_SIZE - 1
    replace(fleet, "prefill")
    on_decode, usage = complete(fleet, **ask)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    for answer in (both, on_prefill, on_decode):
        assert answer["token_ids"] == fresh["token_ids"]


def replace(fleet: Fleet, role: str) -> None:
    """A node with an empty cache in place of the one that knows the prompt."""
    (old,) = [name for name in fleet.nodes if name.startswith(role)]
    fleet.kill(old)
    fleet.wait_for_nodes()
    fleet.start_node(role, f"{role}-new").wait_ready()
    fleet.wait_serving()
