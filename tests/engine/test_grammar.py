"""Output keeps to its grammar, token by token, and is the same however often it is interrupted."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from llguidance import LLMatcher
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engine.config import EngineConfig
from engine.drafting.speculation import Speculation
from engine.engine import Engine
from engine.grammar import MAX_COMPILED, Constrained, GrammarError, Grammars
from engine.request import Request
from engine.sampler import Sampler
from engine.stops import finish_reason
from tests.engine.drafters import Mischief, Oracle, always
from tests.engine.hash_runner import VOCAB_SIZE, HashRunner, chain, logits_after
from wire.grammar import NOT_SATISFIABLE
from wire.logprobs import unpack
from wire.types import FinishReason, SamplingParams

END = 1
EOS = frozenset([END])
ALPHABET = '{}[]":,abcdtruefls0123'  # one token each
BLOCK_SIZE = 4
MAX_MODEL_LEN = 120
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"enum": ["ab", "cd", "ccc"]},
        "b": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5},
        "c": {"type": "integer", "minimum": 10, "maximum": 3210},
    },
    "required": ["a", "b", "c"],
    "additionalProperties": False,
}
COMPACT: Any = {"whitespace_flexible": False}
LONG = LLMatcher.grammar_from_regex("[abc]{60,80}")
JSON = LLMatcher.grammar_from_json_schema(SCHEMA, overrides=COMPACT)


def tokenizer_json() -> str:
    letters = "".join(dict.fromkeys(ALPHABET))
    vocab = {"</s>": END, **{letter: END + 1 + place for place, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.BPE(vocab={"a?": 0, **vocab}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return tokenizer.to_str()


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(tokenizer_json(), VOCAB_SIZE, [END])


def text_of(tokens: Sequence[int]) -> str:
    return str(Tokenizer.from_str(tokenizer_json()).decode(list(tokens)))


def make_request(name: str, tokens: list[int], **sampling: Any) -> Request:
    sampling = {"grammar": JSON, "max_tokens": 90, **sampling}
    return Request(name, list(tokens), len(tokens), SamplingParams(**sampling), MAX_MODEL_LEN)


def alone(request: Request, grammars: Grammars) -> list[int]:
    """Its output, computed one token at a time by nobody else."""
    request = replace(request, tokens=list(request.tokens), block_table=[], block_hashes=[])
    sampler = Sampler(EOS)
    while request.finish_reason is None:
        logits = logits_after(chain(request.tokens)[-1]).unsqueeze(0)
        masks = grammars.begin([0], [Constrained.of(request)]) if request.sampling.grammar else None
        request.tokens += sampler.sample(logits, [request], masks)
        request.finish_reason = finish_reason(request, EOS)
    return request.output_tokens


def make_engine(
    grammars: Grammars | None,
    num_blocks: int = 200,
    budget: int = 16,
    speculation: Speculation | None = None,
) -> Engine:
    config = EngineConfig(
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=6,
        max_num_batched_tokens=budget,
        kv_overcommit=4.0,
        enable_prefix_caching=True,
    )
    return Engine(
        config,
        HashRunner(num_blocks, BLOCK_SIZE),
        epoch=5,
        model_fingerprint="m",
        eos_token_ids=EOS,
        grammars=grammars,
        speculation=speculation,
    )


def run_all(engine: Engine) -> tuple[dict[str, list[int]], dict[str, FinishReason | None], int]:
    outputs: dict[str, list[int]] = {}
    reasons: dict[str, FinishReason | None] = {}
    num_preempted = 0
    while engine.has_work():
        result = engine.step()
        assert result is not None
        num_preempted += result.num_preempted
        for progress in result.progress:
            outputs.setdefault(progress.request_id, []).extend(progress.new_tokens)
            reasons[progress.request_id] = progress.finish_reason
    return outputs, reasons, num_preempted


def check_valid(tokens: Sequence[int]) -> None:
    value = json.loads(text_of(tokens[:-1]))
    assert tokens[-1] == END
    assert value["a"] in ("ab", "cd", "ccc")
    assert 2 <= len(value["b"]) <= 5
    assert 10 <= value["c"] <= 3210
    assert set(value) == {"a", "b", "c"}


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_output_is_valid_and_ends(grammars: Grammars, temperature: float) -> None:
    engine = make_engine(grammars)
    for seed in range(6):
        engine.add(make_request(f"r{seed}", [seed + 2, 3], seed=seed, temperature=temperature))
    outputs, reasons, _ = run_all(engine)
    for name, tokens in outputs.items():
        assert reasons[name] is FinishReason.STOP
        check_valid(tokens)


def test_without_a_grammar_it_is_not_valid(grammars: Grammars) -> None:
    """The control: this model says nothing of the kind by itself."""
    with pytest.raises(ValueError, match=r"Expecting|Extra"):
        json.loads(text_of(alone(make_request("r", [2, 3], grammar=""), grammars)))


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_batches_chunks_preemptions_drafts_and_failed_steps_change_nothing(
    grammars: Grammars, seed: int, drafts: bool
) -> None:
    rng = random.Random(seed)
    drafter = Oracle(
        lambda r: [*r.tokens[: r.num_prompt_tokens], *expected[r.request_id]],
        rng.choice([0.3, 0.8]),
        vocab_size=VOCAB_SIZE,
    )
    speculation = always(drafter, 4, VOCAB_SIZE) if drafts else None
    budget = rng.choice([3, 16])
    engine = make_engine(grammars, num_blocks=34, budget=budget, speculation=speculation)
    runner: Any = engine._runner
    requests = []
    for number in range(6):
        prompt = [rng.randrange(2, VOCAB_SIZE) for _ in range(rng.randrange(1, 20))]
        grammar = LONG if number < 3 else rng.choice([JSON, JSON, ""])
        requests.append(make_request(f"r{number}", prompt, seed=number, grammar=grammar))
        engine.add(requests[-1])
    expected = {request.request_id: alone(request, grammars) for request in requests}

    def now_and_then() -> None:
        if rng.random() < 0.2:
            raise RuntimeError("on purpose")

    runner.during_run = now_and_then
    outputs: dict[str, list[int]] = {}
    num_preempted = num_failed = 0
    while engine.has_work():
        try:
            result = engine.step()
        except RuntimeError:
            num_failed += 1
            continue
        assert result is not None
        num_preempted += result.num_preempted
        for progress in result.progress:
            outputs.setdefault(progress.request_id, []).extend(progress.new_tokens)
    assert outputs == expected
    assert num_failed > 0
    assert num_preempted > 0 or drafts  # which end requests in fewer steps
    assert drafter.num_accepted > 0 or not drafts


def test_another_attempt_goes_on_where_the_first_ended(grammars: Grammars) -> None:
    request = make_request("r", [5, 6, 7], seed=3)
    expected = alone(request, grammars)
    for cut in (1, 5, len(expected) - 1):
        again = make_request("r", [5, 6, 7], seed=3)
        again.tokens += expected[:cut]
        engine = make_engine(grammars)
        engine.add(again)
        assert run_all(engine)[0]["r"] == expected[cut:]


def test_logprobs_are_of_the_raw_logits(grammars: Grammars) -> None:
    engine = make_engine(grammars)
    engine.add(make_request("r", [5, 6], max_tokens=1, logprobs=VOCAB_SIZE))
    result = engine.step()
    assert result is not None
    (progress,) = result.progress
    assert progress.logprobs is not None
    (row,) = progress.logprobs.tokens
    told = unpack(row)
    raw = logits_after(chain([5, 6])[-1]).log_softmax(-1)
    assert told.logprob == pytest.approx(float(raw[progress.new_tokens[0]]), abs=1e-5)
    assert len(told.top) == VOCAB_SIZE
    assert min(logprob for _, logprob in told.top) > -100


def test_the_end_wins_over_min_tokens_and_ignore_eos(grammars: Grammars) -> None:
    grammar = LLMatcher.grammar_from_regex("ab")
    for options in ({"min_tokens": 10}, {"ignore_eos": True}, {"logit_bias": {END: -100.0}}):
        tokens = alone(make_request("r", [4], grammar=grammar, **options), grammars)
        assert text_of(tokens[:-1]) == "ab"
        assert tokens[-1] == END


def test_min_tokens_hold_while_something_else_may_follow(grammars: Grammars) -> None:
    grammar = LLMatcher.grammar_from_regex("[ab]*")
    tokens = alone(make_request("r", [4], grammar=grammar, min_tokens=30), grammars)
    assert len(tokens) > 30
    assert set(text_of(tokens[:-1])) <= {"a", "b"}


def test_tokens_that_contradict_the_grammar_end_their_request_alone(grammars: Grammars) -> None:
    engine = make_engine(grammars)
    bad = make_request("bad", [5, 6])
    bad.tokens += [9, 9, 9]
    engine.add(bad)
    engine.add(make_request("good", [5, 6]))
    with pytest.raises(GrammarError) as caught:
        engine.step()
    assert caught.value.request_ids == ("bad",)
    engine.abort("bad")
    outputs, _, _ = run_all(engine)
    check_valid(outputs["good"])


@pytest.mark.parametrize(
    ("grammar", "mistake"),
    [
        ('{"grammars":[{"json_schema":{"type":"foo"}}]}', "Invalid type: foo"),
        (LLMatcher.grammar_from_regex("("), "regex"),
        ("start: a\na: b\nb: a", NOT_SATISFIABLE),
        ("gibberish", "Expected"),
        ("{", "EOF"),
        ("start: " + "(" * 20_000, "nested"),
        (LLMatcher.grammar_from_regex("((.{1,500}){1,500}x){1,500}"), ""),
    ],
)
def test_mistakes(grammars: Grammars, grammar: str, mistake: str) -> None:
    told = grammars.mistake(grammar)
    assert mistake in (told or "")
    assert bool(mistake) == bool(told)
    assert len(told or "") <= 300


def test_few_grammars_are_kept(grammars: Grammars) -> None:
    for number in range(MAX_COMPILED + 10):
        assert grammars.mistake(LLMatcher.grammar_from_regex(f"a{{1,{number + 2}}}")) is None
    assert len(grammars._compiled) == MAX_COMPILED


def test_an_engine_without_a_tokenizer_says_so() -> None:
    engine = make_engine(None)
    assert engine.grammar_mistake("") is None
    assert "tokenizer" in (engine.grammar_mistake(JSON) or "")


def test_a_vocabulary_smaller_than_the_tokenizers() -> None:
    few = Grammars(tokenizer_json(), 20, [END])
    request = make_request("r", [4], grammar=LLMatcher.grammar_from_regex("[abc]{3}"))
    masks = few.begin([0], [Constrained.of(request)])
    logits = torch.zeros(1, 20)
    masks.apply(logits)
    assert int((logits == 0).sum()) == 3


# ------------------------------------------------------------ drafts that know the grammar


def test_what_must_follow_is_drafted_whoever_drafts(grammars: Grammars) -> None:
    """Property names and brackets; what the drafter itself says is never right here."""
    wrong = Mischief([[0] * 4])  # no text of this grammar
    engine = make_engine(grammars, speculation=always(wrong, 4, VOCAB_SIZE))
    request = make_request("r", [5, 6, 7], seed=3)
    expected = alone(request, grammars)
    engine.add(request)
    accepted, drafted = 0, 0
    while engine.has_work():
        result = engine.step()
        assert result is not None
        assert result.speculation is not None
        accepted += sum(right for _, right in result.speculation.drafts)
        drafted += sum(tokens for tokens, _ in result.speculation.drafts)
    assert request.output_tokens == expected
    assert accepted >= len('{"a":"","b":[,],"c":') - 4
    assert accepted >= drafted - 4, "what is forbidden is computed for nothing"
    assert wrong.num_right == 0, "the drafter is not told that others' tokens were its own"


def test_a_draft_ends_before_what_is_forbidden(grammars: Grammars) -> None:
    token = {letter: END + 1 + place for place, letter in enumerate(dict.fromkeys(ALPHABET))}
    request = make_request("r", [5, 6, 7], grammar=LONG)
    draft = tuple(token[letter] for letter in "abd")
    assert grammars.guided(request, draft, 3) == draft[:2]
    assert grammars.guided(request, (), 3) == ()
    request.tokens += [token["2"]]  # by somebody who did not know the grammar
    assert grammars.guided(request, draft, 3) == ()
    json = make_request("j", [5, 6, 7])
    assert text_of(grammars.guided(json, (token["2"],), 3)) == '{"a'
