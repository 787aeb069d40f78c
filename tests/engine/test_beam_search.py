"""The search alone, against transformers' own on tiny models and against exhaustive search."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.beam_search import BeamSearch, Continuations
from wire.types import BeamParams, EarlyStopping, FinishReason

PAD = 1
EARLY = {
    EarlyStopping.WHEN_FULL: True,
    EarlyStopping.HEURISTIC: False,
    EarlyStopping.NEVER: "never",
}


def search_with_model(
    model: Any, prompt: list[int], params: BeamParams, end_tokens: list[int], **limits: int
) -> BeamSearch:
    search = BeamSearch(params, end_tokens=end_tokens, **limits)
    while not search.over:
        batch = torch.tensor([[*prompt, *beam.tokens] for beam in search.running])
        logprobs = model(batch).logits[:, -1].float().log_softmax(-1)
        best = logprobs.topk(search.num_continuations)
        search.advance(
            [
                list(zip(ids, values, strict=True))
                for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
        )
    return search


def check_against_transformers(
    model: Any, prompt: list[int], params: BeamParams, end_tokens: list[int], **limits: int
) -> None:
    with torch.inference_mode():
        theirs = model.generate(
            torch.tensor([prompt]),
            num_beams=params.width,
            num_return_sequences=params.width,
            length_penalty=params.length_penalty,
            early_stopping=EARLY[params.early_stopping],
            eos_token_id=end_tokens or None,
            pad_token_id=PAD,
            max_new_tokens=limits["max_tokens"],
            min_new_tokens=limits.get("min_tokens"),
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
        ours = search_with_model(model, prompt, params, end_tokens, **limits)
    assert len(ours.finished) == params.width
    for found, tokens, score in zip(
        ours.finished, theirs.sequences.tolist(), theirs.sequences_scores.tolist(), strict=True
    ):
        assert tokens[len(prompt) :][: len(found.tokens)] == list(found.tokens)
        assert all(token == PAD for token in tokens[len(prompt) + len(found.tokens) :])
        assert found.score == pytest.approx(score, abs=1e-4)
        assert (found.finish is FinishReason.STOP) == (found.tokens[-1] in end_tokens)


@pytest.fixture(scope="module")
def model(make_model: Callable[[str], Path]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(make_model("llama")).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("early", list(EarlyStopping))
@pytest.mark.parametrize("penalty", [1.0, 0.0, -1.0, 2.5])
@pytest.mark.parametrize("width", [2, 5])
def test_sequences_and_scores_are_those_of_transformers(
    model: Any, width: int, penalty: float, early: EarlyStopping
) -> None:
    """`end` has tokens that beams run into often, so that searches end early and late."""
    params = BeamParams(width, penalty, early)
    for prompt, end in (([5, 17, 31], [2]), ([40, 8], [7, 2, 61]), ([9] * 6, [])):
        check_against_transformers(model, prompt, params, end, max_tokens=9)


def test_one_beam_is_greedy(model: Any) -> None:
    with torch.inference_mode():
        theirs = model.generate(
            torch.tensor([[40, 8]]), do_sample=False, max_new_tokens=9, eos_token_id=7
        )
        ours = search_with_model(model, [40, 8], BeamParams(1), [7], max_tokens=9)
    assert list(ours.finished[0].tokens) == theirs[0, 2:].tolist()


def test_nothing_ends_before_its_minimum(model: Any) -> None:
    ends = list(range(3, 60, 2))  # most steps would end a beam
    for minimum in (0, 4):
        check_against_transformers(
            model, [5, 17, 31], BeamParams(3), ends, max_tokens=8, min_tokens=minimum
        )


def table(state: tuple[int, ...], vocab: int) -> Continuations:
    """Log-probabilities that follow from the tokens, best first."""
    generator = torch.Generator().manual_seed(hash(state) % (1 << 31))
    values = torch.randn(vocab, generator=generator).log_softmax(-1).tolist()
    return sorted(enumerate(values), key=lambda pair: -pair[1])


def test_with_as_many_beams_as_prefixes_it_is_exhaustive() -> None:
    vocab, length = 3, 3
    search = BeamSearch(BeamParams(vocab**length, 1.0), max_tokens=length)
    while not search.over:
        search.advance([table(beam.tokens, vocab) for beam in search.running])
    scores = {}
    for tokens in itertools.product(range(vocab), repeat=length):
        steps = (dict(table(tokens[:i], vocab))[tokens[i]] for i in range(length))
        scores[tokens] = sum(steps) / length
    best = sorted(scores, key=lambda tokens: -scores[tokens])
    assert [hypothesis.tokens for hypothesis in search.finished] == best


def test_what_is_not_among_the_continuations_could_not_have_mattered() -> None:
    """Fewer than all continuations, as few as are asked for, find the same."""
    for seed in range(30):
        found = []
        for number in (None, 17):
            search = BeamSearch(BeamParams(3, 0.7), max_tokens=6, end_tokens=[seed % 17, 4])
            while not search.over:
                search.advance(
                    [
                        table((seed, *beam.tokens), 17)[: number or search.num_continuations]
                        for beam in search.running
                    ]
                )
            found.append(search.finished)
        assert found[0] == found[1]


def test_one_token_is_a_search_too() -> None:
    search = BeamSearch(BeamParams(4), max_tokens=1, end_tokens=[3])
    row = table((), 9)
    assert search.advance([row]) == [0] * 4
    assert search.over
    assert [hypothesis.tokens[0] for hypothesis in search.finished] == [t for t, _ in row[:4]]
