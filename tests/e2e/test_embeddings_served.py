"""Embeddings of a real fleet equal transformers' hidden states, also when a node has died."""

from __future__ import annotations

import json
import math
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from baton.bundled_model import DEFAULT_MODEL
from tests.e2e.conftest import MakeFleet

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


def post(url: str, path: str, **body: Any) -> Any:
    data = json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def test_embeddings_beside_generation(make_fleet: MakeFleet) -> None:
    fleet = make_fleet()
    fleet.start(2, 1, ("--max-num-batched-tokens", "64", "--dtype", "float32"))
    prompts = [[(7 * i + j) % 900 + 10 for j in range(10 + 30 * i)] for i in range(6)]
    generate = {"prompt": prompts[3], "max_tokens": 30, "temperature": 0}
    alone = post(fleet.url, "/v1/completions", **generate)["choices"][0]["text"]
    with ThreadPoolExecutor(4) as pool:
        texts = [pool.submit(post, fleet.url, "/v1/completions", **generate) for _ in range(3)]
        asked = pool.submit(post, fleet.url, "/v1/embeddings", input=prompts)
        assert {text.result()["choices"][0]["text"] for text in texts} == {alone}
        vectors = [item["embedding"] for item in asked.result()["data"]]
    model: Any = AutoModelForCausalLM.from_pretrained(DEFAULT_MODEL, dtype=torch.float32).eval()
    for tokens, vector in zip(prompts, vectors, strict=True):
        with torch.inference_mode():
            state = model.base_model(torch.tensor([tokens])).last_hidden_state[0, -1]
        expected = torch.nn.functional.normalize(state, dim=0)
        torch.testing.assert_close(torch.tensor(vector), expected, atol=1e-4, rtol=1e-3)
        assert math.isclose(sum(x * x for x in vector), 1, rel_tol=1e-4)
    fleet.kill("prefill-0")
    again = post(fleet.url, "/v1/embeddings", input=prompts)
    for item, vector in zip(again["data"], vectors, strict=True):
        torch.testing.assert_close(torch.tensor(item["embedding"]), torch.tensor(vector))
    fleet.assert_balanced()
