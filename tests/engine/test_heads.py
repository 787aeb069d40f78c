"""Heads draft what their formats' formulas say, from whichever row on; and change no output."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import EngineConfig
from engine.drafting.control import Controller, Decoding
from engine.drafting.drafter import Ask
from engine.drafting.head_drafter import MOST_WAITING, HeadDrafter, Waiting
from engine.drafting.head_loader import load_head
from engine.drafting.speculation import Speculation
from engine.engine import Engine
from engine.kv_store import KVStore
from engine.loader import load_model
from engine.model_info import LoadedModel
from engine.plan import StepPlan, StepResult
from engine.request import Request
from engine.runner import ModelRunner
from engine.sampler import Sampler
from tests.engine.head_reference import Reference
from tests.engine.tiny_heads import add_mtp, save_eagle, save_eagle3, save_llama
from wire.types import SamplingParams

BLOCK_SIZE = 4
METHODS = ("eagle", "eagle3", "mtp")


class Watched(HeadDrafter):
    """Remembers what it drafted, and where its context began then."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[list[int], int, list[int]]] = []

    def propose(self, asks: Sequence[Ask]) -> list[Sequence[int]]:
        drafts = super().propose(asks)
        self.check_integrity()
        for ask, draft in zip(asks, drafts, strict=True):
            if draft:
                base = self._shadows[ask.request.request_id].base
                self.seen.append((list(ask.request.tokens), base, list(draft)))
        return drafts

    def of(self, request: Request) -> list[tuple[list[int], int, list[int]]]:
        """What it saw of a request."""
        prompt = request.tokens[: request.num_prompt_tokens]
        return [seen for seen in self.seen if seen[0][: len(prompt)] == prompt]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A target of Llama's form, with a layer that predicts, and heads for it."""
    at = tmp_path_factory.mktemp("heads")
    target = add_mtp(save_llama(at / "target"))
    return {
        "target": target,
        "eagle": save_eagle(at / "eagle"),
        "eagle3": save_eagle3(at / "eagle3", [0, 1]),
        "mtp": target,
    }


@pytest.fixture(scope="module")
def target(folders: dict[str, Path]) -> LoadedModel:
    return load_model(folders["target"])


def make_drafter(
    method: str, head: LoadedModel, num_blocks: int = 200, kind: type[Watched] = Watched
) -> Watched:
    runner = ModelRunner(head, KVStore(head.kv_layout(BLOCK_SIZE), num_blocks))
    sampler = Sampler(frozenset(head.eos_token_ids), head.ops)
    return kind(method, head.model, runner, sampler, num_blocks=num_blocks, block_size=BLOCK_SIZE)


class Resting(Controller):
    """Wants drafts when a test does."""

    rests = False

    def lengths(self, batch: Sequence[Decoding]) -> list[int]:
        lengths = super().lengths(batch)
        return [0 for _ in lengths] if self.rests else lengths


def make_engine(
    target: LoadedModel, drafter: HeadDrafter, controller: Controller | None = None, **config: Any
) -> Engine:
    controller = controller or Controller(4, adaptive=False)
    speculation = Speculation(drafter, controller, vocab_size=target.vocab_size, clock=float)
    sizes = {"num_blocks": 200, "max_model_len": 120, "max_num_batched_tokens": 64, **config}
    num_blocks = sizes["num_blocks"]
    return Engine(
        EngineConfig(block_size=BLOCK_SIZE, max_num_seqs=8, **sizes),
        ModelRunner(target, KVStore(target.kv_layout(BLOCK_SIZE), num_blocks), reader=speculation),
        epoch=1,
        model_fingerprint="m",
        eos_token_ids=frozenset(target.eos_token_ids),
        ops=target.ops,
        speculation=speculation,
    )


def make_request(name: str, length: int, max_tokens: int = 30, **sampling: Any) -> Request:
    tokens = [(7 * i + length) % 90 + 3 for i in range(length)]
    fields = {"temperature": 0.0, "ignore_eos": True, "seed": length, **sampling}
    return Request(name, tokens, length, SamplingParams(max_tokens=max_tokens, **fields), 120)


def run_all(engine: Engine) -> list[StepResult]:
    results = []
    while engine.has_work():
        result = engine.step()
        assert result is not None
        assert result.speculation is None or not result.speculation.failure
        engine.check_integrity()
        results.append(result)
    return results


def num_drafted(results: Sequence[StepResult]) -> tuple[int, int]:
    """Draft tokens, and how many of them were right."""
    drafts = [d for r in results if r.speculation for d in r.speculation.drafts]
    return sum(d for d, _ in drafts), sum(a for _, a in drafts)


def check_against_formulas(
    drafter: Watched, request: Request, method: str, folders: dict[str, Path]
) -> list[int]:
    """Of a greedy request; where the head's context began, by draft."""
    reference = Reference(method, folders["target"], folders[method], drafter.layers)
    seen = drafter.of(request)
    for tokens, base, draft in seen:
        assert draft == reference.draft(tokens, base, len(draft))
    return [base for _, base, _ in seen]


@pytest.mark.parametrize("method", METHODS)
def test_drafts_are_what_the_formulas_say(
    folders: dict[str, Path], target: LoadedModel, method: str
) -> None:
    """Within a batch, with chunks of prompts, and after other tokens than were drafted."""
    drafter = make_drafter(method, load_head(method, folders[method], target))
    engine = make_engine(target, drafter, long_prefill_token_threshold=7)
    requests = [make_request(f"r{n}", n, temperature=float(n != 25)) for n in (3, 10, 25)]
    for request in requests:
        engine.add(request)
    drafted, _ = num_drafted(run_all(engine))
    assert drafted > 100
    bases = check_against_formulas(drafter, requests[-1], method, folders)
    assert len(bases) > 15
    assert set(bases) == {0}


def test_a_head_starts_where_the_node_starts(folders: dict[str, Path], target: LoadedModel) -> None:
    """Blocks that were computed for somebody else, or elsewhere, come without states."""
    drafter = make_drafter("eagle", load_head("eagle", folders["eagle"], target))
    engine = make_engine(target, drafter)
    first, second = make_request("a", 22, 3), make_request("b", 22, 20)
    engine.add(first)
    run_all(engine)
    drafter.seen.clear()
    engine.add(second)
    run_all(engine)
    assert second.num_cached_tokens == 20
    bases = check_against_formulas(drafter, second, "eagle", folders)
    assert bases
    assert set(bases) == {20}


def test_what_nobody_wanted_a_draft_of_is_forgotten(
    folders: dict[str, Path], target: LoadedModel
) -> None:
    """All but the last rows; and drafts go on from these."""
    drafter = make_drafter("mtp", load_head("mtp", folders["mtp"], target))
    controller = Resting(4, adaptive=False)
    controller.rests = True
    engine = make_engine(target, drafter, controller)
    request = make_request("r", 5, 110)
    engine.add(request)
    while request.num_tokens < 100:
        engine.step()
    assert not drafter.seen
    controller.rests = False
    run_all(engine)
    bases = check_against_formulas(drafter, request, "mtp", folders)
    assert bases
    assert set(bases) == {99 - MOST_WAITING}


def test_states_that_wait() -> None:
    rows, waiting = torch.arange(10.0)[:, None], Waiting()
    waiting.add(rows[:4])
    waiting.add(rows[4:6])
    waiting.keep(5)
    waiting.keep(9)
    assert waiting.num_rows == 5
    assert torch.cat(waiting.take(2)).flatten().tolist() == [0, 1]
    waiting.add(rows[5:7])
    waiting.keep(4)
    assert torch.cat(waiting.take(4)).flatten().tolist() == [2, 3, 4, 5]
    assert waiting.num_rows == 0


# ------------------------------------------------------------ a head that is always right

TURN = torch.eye(32).roll(7, 0)
"""As a vocabulary: behind token i comes i + 7 (modulo 32), if states are one-hot."""
NONE = torch.zeros(32, 32)
SCALE = 32**0.5 / 4  # of a one-hot state after a norm, over that of an embedding


def make_plain(folder: Path, **parts: Tensor) -> Path:
    """Layers that change nothing, norms without weights, and these parts, by a part of a name."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if "o_proj" in name or "down_proj" in name:
            tensors[name] = torch.zeros_like(tensor)
        elif "norm" in name:
            tensors[name] = torch.ones_like(tensor)
        for part, value in parts.items():
            if part in name and tensor.dim() == 2:
                tensors[name] = value.clone()
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def turning(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LoadedModel]:
    folder = tmp_path_factory.mktemp("turning") / "target"
    save_llama(folder, vocab_size=32)
    add_mtp(folder)
    make_plain(folder, embed_tokens=4 * torch.eye(32), lm_head=TURN)
    return folder, load_model(folder)


def knowing_head(method: str, by_state: bool, folder: Path, target: Path) -> Path:
    """A head that takes the next token from the state, or from the token beside it."""
    entry = torch.cat((NONE, TURN) if by_state else (SCALE * torch.eye(32), NONE), -1)
    if method == "eagle":
        save_eagle(folder, bias=False)
        return make_plain(with_vocabulary(folder), fc=entry)
    if method == "eagle3":
        save_eagle3(folder, [0, 1])
        return make_plain(with_vocabulary(folder), fc=torch.cat((TURN, NONE), -1), lm_head=TURN)
    shutil.copytree(target, folder)
    return make_plain(folder, eh_proj=entry)


def with_vocabulary(folder: Path) -> Path:
    """Of 32 tokens, all of them."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"vocab_size": 32, "draft_vocab_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    if "d2t" in tensors:
        tensors |= {"d2t": torch.zeros(32, dtype=torch.int64), "lm_head.weight": NONE}
    save_file(tensors, folder / "model.safetensors")
    return folder


class Shifted(Watched):
    """Is shown every state one row late."""

    late: Tensor

    def saw(self, plan: StepPlan, states: Tensor) -> None:
        before = getattr(self, "late", states[:1])
        self.late = states[-1:]
        super().saw(plan, torch.cat((before, states[:-1])))


@pytest.mark.parametrize(
    ("method", "by_state", "temperature"),
    [
        ("eagle", True, 0.0),
        ("eagle3", True, 0.0),
        ("mtp", True, 0.0),
        ("eagle", False, 0.0),
        ("eagle", False, 1.0),
        ("mtp", False, 1.0),
    ],
)
def test_a_head_that_knows_the_target_is_always_right(
    turning: tuple[Path, LoadedModel],
    tmp_path: Path,
    method: str,
    *,
    by_state: bool,
    temperature: float,
) -> None:
    """Every state is of the row that the formulas say, and every token is drawn with its noise."""
    folder, target = turning
    most = 1 if method == "eagle3" else 4  # its layer, which does nothing here, would have to turn
    head = load_head(method, knowing_head(method, by_state, tmp_path / "head", folder), target)
    for kind, right in ((Watched, True), (Shifted, not by_state)):
        drafter = make_drafter(method, head, kind=kind)
        engine = make_engine(target, drafter, Controller(most, adaptive=False))
        tokens = [(3 + 7 * i) % 32 for i in range(6)]
        sampling = SamplingParams(max_tokens=40, temperature=temperature, seed=1, ignore_eos=True)
        engine.add(Request("r", tokens, 6, sampling, 60))
        drafted, accepted = num_drafted(run_all(engine))
        assert drafted >= 19
        assert accepted == drafted if right else accepted < drafted / 4


# ------------------------------------------------------------ what goes wrong


def test_a_head_that_breaks_is_switched_off(folders: dict[str, Path], target: LoadedModel) -> None:
    """In the middle of a step too, which does not depend on it."""
    plain = make_request("r", 9)
    engine = make_engine(
        target, make_drafter("eagle", load_head("eagle", folders["eagle"], target))
    )
    engine.add(plain)
    run_all(engine)

    drafter = make_drafter("eagle", load_head("eagle", folders["eagle"], target))
    engine = make_engine(target, drafter)
    request = make_request("r", 9)
    engine.add(request)
    engine.step()
    engine.step()
    drafter._release = drafter._pool = None  # type: ignore[assignment]
    results = []
    while engine.has_work():
        results.append(engine.step())
    failures = [
        r.speculation.failure for r in results if r and r.speculation and r.speculation.failure
    ]
    assert len(failures) == 1
    assert failures[0].startswith("the eagle drafter is switched off")
    assert request.tokens == plain.tokens


def test_blocks_come_back_and_too_few_are_no_error(
    folders: dict[str, Path], target: LoadedModel
) -> None:
    drafter = make_drafter("mtp", load_head("mtp", folders["mtp"], target), num_blocks=9)
    engine = make_engine(target, drafter)
    for number in range(5):
        engine.add(make_request(f"r{number}", 9 + number))
    drafted, _ = num_drafted(run_all(engine))
    assert drafted > 0
    drafter.propose([])
    assert drafter.num_blocks_held == 0
    drafter.check_integrity()
