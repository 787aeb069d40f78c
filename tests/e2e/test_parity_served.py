"""Greedy output of the whole disaggregated path equals transformers, under everything at once.

100 prompts of 1 to 1,500 tokens are served concurrently while prefixes are hit, prompts are
computed in chunks, and requests are preempted for want of blocks. Each must really have happened.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.bundled_model import DEFAULT_MODEL
from tests.e2e.client import Answer, Client
from tests.e2e.conftest import MakeFleet

NUM_PROMPTS = 100
NUM_OUTPUT = 24
NEAR_TIE = 1e-4
NUM_LAYERS, NUM_KV_NUMBERS = 8, 2 * 64  # of the bundled model


def make_prompts(model: Path) -> list[list[int]]:
    """Token prompts of 1 to 1,500 tokens of real text; a third begin with a common prefix."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    source = Path(random.__file__).read_text() + Path(asyncio.__file__).read_text()
    text: list[int] = tokenizer.encode(source, add_special_tokens=False).ids
    choose = random.Random(7)
    common = text[:200]
    prompts = []
    for index in range(NUM_PROMPTS):
        length = [1, 2, 15, 16, 17, 1500][index] if index < 6 else choose.randint(1, 700)
        start = choose.randrange(len(text) - 1500)
        body = text[start : start + length]
        prompts.append((common + body)[:1500] if index >= 6 and index % 3 == 0 else body)
    return prompts


async def serve_all(url: str, prompts: list[list[int]]) -> list[Answer]:
    async with Client(url) as client:
        return await asyncio.gather(
            *(
                client.complete(
                    model=DEFAULT_MODEL.name,
                    prompt=prompt,
                    max_tokens=NUM_OUTPUT,
                    temperature=0,
                    ignore_eos=True,
                    return_token_ids=True,
                )
                for prompt in prompts
            )
        )


class Reference:
    """Plain transformers in fp32."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)  # the nodes still hold the other cores
        self.model: Any = AutoModelForCausalLM.from_pretrained(DEFAULT_MODEL, dtype=torch.float32)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(DEFAULT_MODEL)

    @torch.inference_mode()
    def generate(self, prompt: list[int]) -> tuple[list[int], list[float]]:
        """Greedy output tokens, and at each the gap between the two best logits."""
        result = self.model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NUM_OUTPUT,
            min_new_tokens=NUM_OUTPUT,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        best = [logits.topk(2).values[0] for logits in result.logits]
        tokens: list[int] = result.sequences[0, len(prompt) :].tolist()
        return tokens, [float(pair[0] - pair[1]) for pair in best]

    def text(self, tokens: list[int]) -> str:
        decoded: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return decoded


def check_answers(prompts: list[list[int]], answers: list[Answer]) -> None:
    """Every answer is transformers' own, up to near-ties."""
    reference = Reference()
    near_ties = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.status == 200
        assert answer.error is None
        assert answer.finish_reason == "length"
        assert answer.usage["completion_tokens"] == len(answer.token_ids) == NUM_OUTPUT
        tokens, gaps = reference.generate(prompt)
        differing = [i for i in range(NUM_OUTPUT) if tokens[i] != answer.token_ids[i]]
        if differing:
            first = differing[0]
            assert gaps[first] < NEAR_TIE, (prompt[:20], first, tokens, answer.token_ids)
            near_ties += 1
        else:
            assert answer.text == reference.text(tokens)
    print(f"{near_ties} of {len(prompts)} prompts differ at a near-tie")


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_100_prompts_served_at_once_equal_transformers(make_fleet: MakeFleet) -> None:
    fleet = make_fleet()
    # A small pool that promises more than it has: preemption must occur.
    fleet.start_router()
    fleet.start_node("prefill", "prefill-0", "--max-num-batched-tokens", "256")
    fleet.start_node(
        "decode", "decode-0", "--kv-memory", "24M", "--kv-overcommit", "4", "--max-num-seqs", "32"
    )
    for node in fleet.nodes.values():
        node.wait_ready()
    fleet.wait_serving()
    prompts = make_prompts(DEFAULT_MODEL)
    answers = asyncio.run(serve_all(fleet.url, prompts))

    check_answers(prompts, answers)
    fleet.assert_balanced()
    prefill = fleet.nodes["prefill-0"].metrics()
    decode = fleet.nodes["decode-0"].metrics()
    label = f'{{model_name="{DEFAULT_MODEL.name}"}}'
    assert prefill[f"vllm:prefix_cache_hits_total{label}"] > 0, "no prefix was hit"
    assert prefill["baton_unfinished_chunks_total"] > 0, "no prompt was computed in chunks"
    assert decode[f"vllm:num_preemptions_total{label}"] > 0, "nothing was preempted"
    assert decode['baton_handoffs_total{outcome="committed"}'] >= NUM_PROMPTS


@pytest.mark.e2e
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("prefill", "decode"), [(16, 32), (32, 16)])
def test_nodes_with_blocks_of_different_sizes_equal_transformers(
    prefill: int, decode: int, make_fleet: MakeFleet
) -> None:
    fleet = make_fleet()
    fleet.start_router()
    flags = ("--max-num-batched-tokens", "128", "--dtype", "float32")
    fleet.start_node("prefill", "prefill-0", "--block-size", str(prefill), *flags)
    fleet.start_node("decode", "decode-0", "--block-size", str(decode), *flags)
    for node in fleet.nodes.values():
        node.wait_ready()
    fleet.wait_serving()
    prompts = make_prompts(DEFAULT_MODEL)[:30]
    answers = asyncio.run(serve_all(fleet.url, prompts))
    check_answers(prompts, answers)
    fleet.assert_balanced()
    metrics = fleet.nodes["decode-0"].metrics()
    label = f'{{model_name="{DEFAULT_MODEL.name}"}}'
    assert metrics[f"vllm:prefix_cache_hits_total{label}"] > 0, "no unit began behind the start"
    assert metrics['baton_handoffs_total{outcome="committed"}'] >= len(prompts)


@pytest.mark.e2e
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("prefill", "decode"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_nodes_that_store_different_types_exchange_the_narrower_one(
    prefill: str, decode: str, make_fleet: MakeFleet
) -> None:
    fleet = make_fleet()
    fleet.start_router()
    fleet.start_node("prefill", "prefill-0", "--dtype", prefill)
    fleet.start_node("decode", "decode-0", "--dtype", decode)
    for node in fleet.nodes.values():
        node.wait_ready()
    fleet.wait_serving()
    prompt = make_prompts(DEFAULT_MODEL)[6][:64]
    (answer,) = asyncio.run(serve_all(fleet.url, [prompt]))
    assert answer.status == 200
    tokens, gaps = Reference().generate(prompt)
    agreeing = next((i for i in range(NUM_OUTPUT) if tokens[i] != answer.token_ids[i]), NUM_OUTPUT)
    assert agreeing >= 4 or min(gaps[: agreeing + 1]) < 0.1, (tokens, answer.token_ids)
    fleet.assert_balanced()
    received = fleet.nodes["decode-0"].metrics()["baton_transfer_bytes_received_total"]
    assert received == 64 * NUM_LAYERS * 2 * NUM_KV_NUMBERS * 2, "two bytes per number"


@pytest.mark.e2e
@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_numbers_may_travel_in_eight_bits(dtype: str, make_fleet: MakeFleet) -> None:
    fleet = make_fleet()
    fleet.start_router()
    fleet.start_node("prefill", "prefill-0", "--dtype", "float32")
    fleet.start_node("decode", "decode-0", "--dtype", "float32", "--transfer-dtype", dtype)
    for node in fleet.nodes.values():
        node.wait_ready()
    fleet.wait_serving()
    prompt = make_prompts(DEFAULT_MODEL)[6][:64]
    (answer,) = asyncio.run(serve_all(fleet.url, [prompt]))
    assert answer.status == 200
    tokens, gaps = Reference().generate(prompt)
    agreeing = next((i for i in range(NUM_OUTPUT) if tokens[i] != answer.token_ids[i]), NUM_OUTPUT)
    assert agreeing >= 4 or min(gaps[: agreeing + 1]) < 0.5, (tokens, answer.token_ids)
    fleet.assert_balanced()
    received = fleet.nodes["decode-0"].metrics()["baton_transfer_bytes_received_total"]
    num_vectors = 64 * NUM_LAYERS * 2 * NUM_KV_NUMBERS // 64
    assert received == num_vectors * (64 + 4), "a byte per number, and a scale"
