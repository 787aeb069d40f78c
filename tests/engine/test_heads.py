"""Heads draft what their formats' formulas say, from whichever row on; and change no output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.drafting.head_drafter import MOST_WAITING, Waiting
from engine.drafting.head_loader import load_head
from engine.engine import Engine
from engine.grammar import Grammars
from engine.loader import load_model
from engine.model_info import LoadedModel
from engine.request import Request
from tests.engine.head_engines import (
    Resting,
    Watched,
    make_drafter,
    make_engine,
    make_request,
    num_drafted,
    run_all,
)
from tests.engine.head_reference import Reference
from tests.engine.test_grammar import LONG, tokenizer_json
from tests.engine.test_speculation import mixed_requests, needs_equal_bits
from tests.engine.tiny_heads import add_mtp, save_eagle, save_eagle3, save_llama
from wire.types import Pooling, SamplingParams

METHODS = ("eagle", "eagle3", "mtp")


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


def transcripts(engine: Engine) -> tuple[dict[str, object], int]:
    """Of greedy and sampled requests with all that changes logits; right draft tokens."""
    grammar = SamplingParams(max_tokens=26, temperature=0.6, seed=9, grammar=LONG)
    requests = [*mixed_requests(), Request("grammar", list(range(3, 20)), 17, grammar, 100)]
    for request in requests:
        engine.add(request)
    results = run_all(engine)
    told: dict[str, list[bytes]] = {request.request_id: [] for request in requests}
    for progress in [progress for result in results for progress in result.progress]:
        told[progress.request_id] += progress.logprobs.tokens if progress.logprobs else ()
    found = {r.request_id: (r.output_tokens, r.finish_reason, told[r.request_id]) for r in requests}
    return dict(found), num_drafted(results)[1]


@needs_equal_bits
@pytest.mark.parametrize("method", METHODS)
def test_output_is_what_it_is_without_to_the_bit(
    folders: dict[str, Path], target: LoadedModel, method: str
) -> None:
    """Also with chunks, preemptions, and a step's numbers in one buffer as on a GPU."""
    head = load_head(method, folders[method], target)
    grammars = Grammars(tokenizer_json(), target.vocab_size, [1])
    plain, _ = transcripts(make_engine(target, None, grammars=grammars))
    kinds: list[dict[str, Any]] = [
        {"long_prefill_token_threshold": 3},
        {"num_blocks": 40, "kv_overcommit": 4.0},
        {"packed": True},
    ]
    for kind in kinds:
        drafter = make_drafter(method, head, packed=kind.get("packed"))
        drafted, accepted = transcripts(make_engine(target, drafter, grammars=grammars, **kind))
        assert drafted == plain
        assert accepted > 0
        drafter.propose([])
        assert drafter.num_blocks_held == 0


@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_embeddings_beside_requests_that_are_drafted(
    folders: dict[str, Path], target: LoadedModel, method: str
) -> None:
    """One forward pass shows its states to both, each those that it wants."""
    wanted: list[bytes | None] = []
    drafter = make_drafter(method, load_head(method, folders[method], target))
    for engine in (make_engine(target, None), make_engine(target, drafter)):
        engine.add(make_request("drafted", 9))
        for _ in range(4):
            engine.step()
        for name, pooling in (("last", Pooling.LAST), ("mean", Pooling.MEAN)):
            tokens, sampling = list(range(3, 12)), SamplingParams(max_tokens=1)
            engine.add(Request(name, tokens, 9, sampling, 10, prefill_only=True, pooling=pooling))
        done = [progress for result in run_all(engine) for progress in result.progress]
        wanted += [progress.embedding for progress in done if progress.embedding]
    assert len(wanted) == 4
    for alone, beside in zip(wanted[:2], wanted[2:], strict=True):
        assert alone is not None
        assert beside is not None
        numbers = [
            torch.frombuffer(bytearray(found), dtype=torch.float32) for found in (alone, beside)
        ]
        torch.testing.assert_close(*numbers)
    reference = Reference(method, folders["target"], folders[method], drafter.layers)
    for tokens, base, draft in drafter.seen:
        assert draft == reference.draft(tokens, base, len(draft))


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
