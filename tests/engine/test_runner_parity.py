"""The paged, chunked, mixed and shared computation gives what plain transformers gives.

Every architecture goes through the same scenarios. The reference is one forward pass of
transformers over each finished request: logits at the sampled positions, and greedy tokens, agree.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.kv_store import KVStore
from engine.loader import load_model
from engine.model_info import LoadedModel
from engine.plan import ScheduledRequest, StepPlan
from engine.request import Request
from engine.runner import ModelRunner
from tests.engine.tiny_models import ARCHITECTURES
from wire.errors import UnsupportedModelError
from wire.types import SamplingParams

BLOCK_SIZE = 4
NUM_BLOCKS = 128
NEAR_TIE = 1e-4


# The frequencies that a served request gets, said so that transformers does not change them:
# dynamic scaling to 128 = 4 x 32 positions is another base, longrope always uses its long factors.
LONG = ARCHITECTURES["phi3_longrope"][1]["rope_parameters"]
FIXED_ROPE: dict[str, dict[str, Any]] = {
    "llama_dynamic": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10_000.0 * (4 * 128 / 32 - 3) ** (8 / 6),
        }
    },
    "phi3_longrope": {
        "rope_parameters": {**LONG, "rope_theta": 10_000.0, "short_factor": LONG["long_factor"]},
    },
}


class Driver:
    """Schedules by hand: scattered blocks, given chunks, greedy sampling."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.store = KVStore(loaded.kv_layout(BLOCK_SIZE), NUM_BLOCKS)
        self.store.blocks.fill_(float("nan"))  # an unwritten slot that is read shows at once
        self._runner = ModelRunner(loaded, self.store)
        self._free = list(range(NUM_BLOCKS))
        random.Random(5).shuffle(self._free)
        self.logits: dict[str, list[Tensor]] = {}

    def request(self, name: str, tokens: list[int], shared: Request | None = None) -> Request:
        """A request with room for 20 more tokens; it reuses full blocks of `shared`'s prefix."""
        request = Request(name, list(tokens), len(tokens), SamplingParams(), len(tokens) + 20)
        if shared is not None:
            equal = _common_prefix(shared.tokens[: shared.num_computed_tokens], tokens[:-1])
            request.block_table = shared.block_table[: equal // BLOCK_SIZE]
            request.num_computed_tokens = len(request.block_table) * BLOCK_SIZE
        missing = self.store.layout.num_blocks(request.max_num_tokens) - len(request.block_table)
        request.block_table += [self._free.pop() for _ in range(missing)]
        self.logits[name] = []
        return request

    def step(self, *work: tuple[Request, int]) -> None:
        """Compute the next so many tokens of each request; those that catch up get their argmax."""
        items = [ScheduledRequest(r, r.num_computed_tokens, count) for r, count in work]
        sampling = [item.request for item in items if item.samples]
        logits = self._runner.run(StepPlan(tuple(items)))
        assert logits.dtype == torch.float32
        assert logits.shape[0] == len(sampling)
        for item in items:
            item.request.num_computed_tokens = item.end
        for request, row in zip(sampling, logits, strict=True):
            self.logits[request.request_id].append(row)
            request.tokens.append(int(row.argmax()))

    def decode(self, *requests: Request, steps: int) -> None:
        for _ in range(steps):
            self.step(*((request, 1) for request in requests))


def _common_prefix(a: list[int], b: list[int]) -> int:
    differing = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))


def prompt(length: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, 97) for _ in range(length)]


def whole(driver: Driver) -> list[Request]:
    """One request alone, its prompt in one step."""
    a = driver.request("a", prompt(37, seed=1))
    driver.step((a, 37))
    driver.decode(a, steps=5)
    return [a]


def chunked(driver: Driver) -> list[Request]:
    """Odd chunks, some ending within a block."""
    a = driver.request("a", prompt(37, seed=2))
    for count in (1, 7, 3, 13, 2, 11):
        driver.step((a, count))
    driver.decode(a, steps=3)
    return [a]


def mixed(driver: Driver) -> list[Request]:
    """Chunks of a long prompt beside decoding requests that come and change places."""
    a, b = driver.request("a", prompt(9, seed=3)), driver.request("b", prompt(33, seed=4))
    c = driver.request("c", prompt(1, seed=5))
    driver.step((a, 9), (b, 5))
    driver.step((b, 11), (a, 1), (c, 1))
    driver.step((c, 1), (a, 1), (b, 17))
    driver.decode(b, c, a, steps=4)
    driver.decode(a, b, steps=2)
    return [a, b, c]


def prefix_hit(driver: Driver) -> list[Request]:
    """Two requests continue the blocks of a third, one while the third still decodes."""
    tokens = prompt(26, seed=6)
    a = driver.request("a", tokens)
    driver.step((a, 26))
    b = driver.request("b", tokens[:23] + prompt(6, seed=7), shared=a)
    c = driver.request("c", tokens, shared=a)
    assert (b.num_computed_tokens, c.num_computed_tokens) == (20, 24)
    driver.step((b, 4), (a, 1), (c, 2))
    driver.step((b, 5), (c, 1), (a, 1))
    driver.decode(a, b, c, steps=3)
    return [a, b, c]


@pytest.fixture(scope="module")
def load(make_model: Callable[[str], Path]) -> Callable[[str], LoadedModel]:
    loaded: dict[str, LoadedModel] = {}

    def get(name: str) -> LoadedModel:
        if name not in loaded:
            loaded[name] = load_model(make_model(name), dtype="float32")
        return loaded[name]

    return get


@pytest.fixture(scope="module")
def reference(make_model: Callable[[str], Path]) -> Callable[[str], Any]:
    """transformers' own model, untouched by Baton, with its eager attention."""
    models: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in models:
            models[name] = AutoModelForCausalLM.from_pretrained(
                make_model(name),
                dtype=torch.float32,
                attn_implementation="eager",
                **FIXED_ROPE.get(name, {}),
            ).eval()
        return models[name]

    return get


@pytest.mark.parametrize("scenario", [whole, chunked, mixed, prefix_hit])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_and_logits_equal_transformers(
    name: str,
    scenario: Callable[[Driver], list[Request]],
    load: Callable[[str], LoadedModel],
    reference: Callable[[str], Any],
) -> None:
    driver = Driver(load(name))
    for request in scenario(driver):
        expected = _reference_logits(reference(name), request)
        ours = torch.stack(driver.logits[request.request_id])
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
        _assert_greedy(request, expected)


SCALED = ["llama_dynamic", "phi3_longrope", "llama_yarn"]


@pytest.mark.parametrize("name", SCALED)
def test_a_long_neighbour_changes_nothing(name: str, load: Callable[[str], LoadedModel]) -> None:
    """Its positions are beyond those for which rotary frequencies were trained."""

    def logits_of_a(*neighbours: int) -> Tensor:
        driver = Driver(load(name))
        a = driver.request("a", prompt(9, seed=8))
        others = [driver.request(str(n), prompt(n, seed=9)) for n in neighbours]
        driver.step((a, 9), *((other, other.num_tokens) for other in others))
        driver.decode(a, *others, steps=3)
        return torch.stack(driver.logits["a"])

    torch.testing.assert_close(logits_of_a(), logits_of_a(90, 5), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SCALED[:2])
def test_frequencies_that_follow_the_batch_do_not_pass_the_probe(
    name: str, make_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.loader.fix_frequencies", lambda model, length: 0)
    with pytest.raises(UnsupportedModelError, match="outside attention mixes tokens"):
        load_model(make_model(name), dtype="float32")


@pytest.mark.parametrize(("max_model_len", "length"), [(32, 20), (128, 40)])
def test_longrope_is_that_of_the_longest_context(
    max_model_len: int, length: int, make_model: Callable[[str], Path]
) -> None:
    """Short factors where no context can outgrow them, else long ones, as transformers does."""
    folder = make_model("phi3_longrope")
    driver = Driver(load_model(folder, dtype="float32", max_model_len=max_model_len))
    a = driver.request("a", prompt(length, seed=10))
    driver.step((a, length))
    driver.decode(a, steps=2)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    expected = _reference_logits(plain, a)
    torch.testing.assert_close(torch.stack(driver.logits["a"]), expected, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def _reference_logits(model: Any, request: Request) -> Tensor:
    """Logits [sampled, vocab] at the positions where a token was sampled."""
    logits: Tensor = model(torch.tensor([request.tokens])).logits[0]
    return logits[request.num_prompt_tokens - 1 : -1]


def _assert_greedy(request: Request, expected: Tensor) -> None:
    for token, row in zip(request.output_tokens, expected, strict=True):
        assert float(row.max() - row[token]) < NEAR_TIE
