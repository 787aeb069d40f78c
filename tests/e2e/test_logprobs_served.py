"""Logprobs over HTTP from real nodes equal transformers': of prompts, and of output handed over."""

from __future__ import annotations

import asyncio
import json
import random
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from baton.bundled_model import DEFAULT_MODEL
from tests.e2e.client import Answer, Client
from tests.e2e.conftest import MakeFleet
from tests.e2e.test_faults import num_moved, until_busy

TOLERANCE = 1e-4


def post(url: str, path: str, **body: Any) -> Any:
    request = urllib.request.Request(url + path, json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())


class Reference:
    """Plain transformers in fp32."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        self.model: Any = AutoModelForCausalLM.from_pretrained(DEFAULT_MODEL, dtype=torch.float32)

    @torch.inference_mode()
    def logprobs(self, tokens: list[int]) -> Tensor:
        """[T, V]; row i is of what follows token i."""
        logits: Tensor = self.model(torch.tensor([tokens])).logits[0]
        return logits.double().log_softmax(-1)


def check(logprobs: dict[str, Any], tokens: list[int], expected: Tensor, first: int) -> None:
    """Those of `tokens[first:]`, which stand at the front of what an answer says."""
    told, tops = logprobs["token_logprobs"], logprobs["top_logprobs"]
    for place, token in enumerate(tokens[first:], start=first):
        if place == 0:
            assert told[0] is tops[0] is None
            continue
        row, said, top = expected[place - 1], told[place - first], tops[place - first]
        assert said == pytest.approx(float(row[token]), abs=TOLERANCE)
        assert max(top.values()) == pytest.approx(float(row.max()), abs=TOLERANCE)
        # lm-eval's test of whether the token is the greedy one compares these two exactly.
        if float(row.max() - row[token]) > TOLERANCE:
            assert said < max(top.values())
        elif int(row.argmax()) == token:
            assert said in top.values()


def make_prompts() -> list[list[int]]:
    """Real text, longer than a step, a block and less; the last two share a prefix."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEFAULT_MODEL / "tokenizer.json"))
    text: list[int] = tokenizer.encode(
        Path(random.__file__).read_text(), add_special_tokens=False
    ).ids
    return [text[:1], text[5:12], text[:600], text[:300] + text[700:900]]


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_loglikelihoods_equal_transformers(make_fleet: MakeFleet) -> None:
    """As evaluation harnesses ask: token prompts, echo, no output or one token."""
    fleet = make_fleet().start(flags=("--max-num-batched-tokens", "128"))
    reference = Reference()
    for prompt in [*make_prompts(), make_prompts()[-1]]:
        expected = reference.logprobs(prompt)
        for max_tokens in (0, 1):
            body = post(
                fleet.url,
                "/v1/completions",
                prompt=prompt,
                echo=True,
                max_tokens=max_tokens,
                logprobs=1,
                temperature=0,
            )
            (choice,) = body["choices"]
            assert len(choice["logprobs"]["tokens"]) == len(prompt) + max_tokens
            assert body["usage"]["completion_tokens"] == max_tokens
            check(choice["logprobs"], prompt, expected, 0)
    fleet.assert_balanced()


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_logprobs_of_output_equal_transformers(make_fleet: MakeFleet) -> None:
    """The first token's come from the prefill node, the others' from the decode node."""
    fleet = make_fleet().start()
    reference = Reference()
    for prompt in make_prompts():
        body = post(
            fleet.url,
            "/v1/completions",
            prompt=prompt,
            max_tokens=12,
            logprobs=3,
            temperature=0.8,
            seed=5,
            ignore_eos=True,
            prompt_logprobs=0,
            return_token_ids=True,
        )
        (choice,) = body["choices"]
        tokens = [*prompt, *choice["token_ids"]]
        expected = reference.logprobs(tokens)
        check(choice["logprobs"], tokens, expected, len(prompt))
        for place, told in enumerate(choice["prompt_logprobs"][1:], start=1):
            token = prompt[place]
            row = expected[place - 1]
            assert told[str(token)]["logprob"] == pytest.approx(float(row[token]), abs=TOLERANCE)
    decode = fleet.nodes["decode-0"].metrics()
    assert decode['baton_handoffs_total{outcome="committed"}'] >= len(make_prompts())
    fleet.assert_balanced()


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_logprobs_survive_a_killed_decode_node(make_fleet: MakeFleet) -> None:
    """Two attempts tell about the same tokens: each logprob arrives once, and is right."""
    fleet = make_fleet().start(prefill=1, decode=2)
    prompts = [prompt[:200] for prompt in make_prompts()]

    async def ask() -> list[Answer]:
        async with Client(fleet.url) as client:
            streams = [
                asyncio.ensure_future(
                    client.stream(
                        prompt=prompts[index % len(prompts)],
                        max_tokens=80,
                        temperature=0.8,
                        seed=index,
                        ignore_eos=True,
                        logprobs=2,
                        echo=index % 2 == 0,
                        return_token_ids=True,
                    )
                )
                for index in range(8)
            ]
            await until_busy(fleet, "decode-0", 40)
            fleet.kill("decode-0")
            return await asyncio.gather(*streams)

    answers = asyncio.run(ask())
    assert num_moved(fleet) > 0, "the node died too late to disturb anybody"
    reference = Reference()
    for index, answer in enumerate(answers):
        prompt = prompts[index % len(prompts)]
        choices = [chunk["choices"][0] for chunk in answer.chunks if chunk["choices"]]
        output = [token for choice in choices for token in choice.get("token_ids", [])]
        assert len(output) == 80
        told: dict[str, list[Any]] = {"token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for choice in choices:
            for key, values in told.items():
                values += (choice["logprobs"] or {}).get(key, [])
        tokens = [*prompt, *output]
        first = 0 if index % 2 == 0 else len(prompt)
        assert len(told["token_logprobs"]) == len(tokens) - first
        assert told["text_offset"] == sorted(told["text_offset"])
        check(told, tokens, reference.logprobs(tokens), first)
    fleet.assert_balanced()
