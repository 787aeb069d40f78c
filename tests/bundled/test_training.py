"""The recipe: what is held out stays out, and an interrupted run goes on as if never stopped."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from scripts.bundled_model import checkpoint
from scripts.bundled_model.checkpoint import Progress
from scripts.bundled_model.corpus import everyday_chats, load_corpus, read_sources
from scripts.bundled_model.data import Mixture, consecutive_windows
from scripts.bundled_model.measure import agreement, held_out_loss
from scripts.bundled_model.shapes import make_model
from scripts.bundled_model.train import Clock, Recipe, make_optimizers, next_token_loss

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
}
MODULE = '''\
"""Module number {0} of them."""

def function{0}(x):
    """Return x plus {0}."""
    x += {0}
    return x
'''
RECIPE = Recipe(minutes=10, decay_minutes=4, precision="fp32", compile=False)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of 200 small modules; each names itself, so that it can be found again."""
    root = tmp_path_factory.mktemp("library")
    for number in range(200):
        (root / f"module{number}.py").write_text(MODULE.format(number))
    (root / "test").mkdir()
    (root / "test" / "test_it.py").write_text("assert True\n")
    (root / "test" / "bad_syntax.py").write_text("def broken(:\n")
    (root / "latin.py").write_bytes(b"# \xe9\n")
    return root


def test_held_out_files_enter_no_stream(library: Path) -> None:
    corpus = load_corpus(library)
    held_out = {m for text in corpus.held_out for m in re.findall(r"function\d+", text)}
    assert held_out
    assert len(corpus.library) + len(corpus.held_out) == 200
    trained = "".join(corpus.library) + "".join(m["content"] for c in corpus.chats for m in c)
    assert not held_out & set(re.findall(r"function\d+", trained))


def test_tests_are_apart_and_unreadable_files_are_skipped(library: Path) -> None:
    assert load_corpus(library).tests == ["assert True\n"]
    names = {source.name for source in read_sources(library)}
    assert not names & {"test/bad_syntax.py", "latin.py"}


def test_corpus_is_the_same_every_time(library: Path) -> None:
    assert load_corpus(library) == load_corpus(library)


def test_everyday_answers_contain_valid_code() -> None:
    answers = {chat[-1]["content"] for chat in everyday_chats()}
    blocks = [code for a in answers for code in re.findall(r"```python\n(.*?)\n```", a, re.DOTALL)]
    assert len(blocks) > 15
    for code in blocks:
        ast.parse(code)


def test_everyday_questions_are_asked_once() -> None:
    questions = [chat[-2]["content"] for chat in everyday_chats()]
    assert len(questions) == len(set(questions))


def test_a_batch_is_a_function_of_the_step() -> None:
    streams = {"a": np.arange(1000, dtype=np.uint16), "b": np.arange(2000, 4000, dtype=np.uint16)}
    mixture = Mixture(streams, {"a": 0.5, "b": 0.5})
    assert torch.equal(mixture.batch(3, 8, 16), mixture.batch(3, 8, 16))
    assert not torch.equal(mixture.batch(3, 8, 16), mixture.batch(4, 8, 16))
    batch = mixture.batch(0, 64, 16)
    assert batch.shape == (64, 17)
    assert 8 < int((batch[:, 0] >= 2000).sum()) < 56
    assert torch.equal(batch[:, 1:] - batch[:, :-1], torch.ones(64, 16, dtype=torch.int64))


def test_consecutive_windows_share_their_bounds() -> None:
    rows = consecutive_windows(np.arange(34, dtype=np.uint16), 16)
    assert rows.shape == (2, 17)
    assert rows[0, -1] == rows[1, 0]


def test_learning_rate_warms_up_stays_and_decays() -> None:
    clock = Clock(RECIPE)
    assert clock.lr_factor(0) == pytest.approx(0.01)
    assert clock.lr_factor(5000) == 1.0
    clock.started -= 8 * 60
    assert clock.decaying
    assert clock.lr_factor(5000) == pytest.approx(0.51, abs=0.01)
    clock.started -= 2 * 60
    assert clock.over
    assert clock.lr_factor(5000) == pytest.approx(0.02, abs=0.01)


def test_without_a_decay_the_run_stays_stable_to_its_end() -> None:
    clock = Clock(Recipe(minutes=1, decay_minutes=0))
    clock.started -= 61
    assert clock.over
    assert not clock.decaying


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, optimizer: str) -> None:
    recipe = Recipe(minutes=1, decay_minutes=0, precision="fp32", optimizer=optimizer)
    batches = torch.randint(0, 4096, (4, 2, 9))

    straight = make_model(TINY)
    optimizers = make_optimizers(straight, recipe)
    learn(straight, optimizers, recipe, batches)

    first = make_model(TINY)
    optimizers = make_optimizers(first, recipe)
    learn(first, optimizers, recipe, batches[:2])
    checkpoint.save(tmp_path, first, optimizers, Progress(2, 16, 1.5))

    second = make_model(TINY, seed=1)
    optimizers = make_optimizers(second, recipe)
    assert checkpoint.load(tmp_path, second, optimizers) == Progress(2, 16, 1.5)
    learn(second, optimizers, recipe, batches[2:])
    for expected, weight in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(expected, weight)


def learn(
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    recipe: Recipe,
    batches: torch.Tensor,
) -> None:
    loss_of = next_token_loss(model, recipe)
    for batch in batches:
        loss_of(batch).backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_a_model_agrees_with_itself() -> None:
    model = make_model(TINY).eval()
    stream = np.random.default_rng(0).integers(0, 4096, 1025).astype(np.uint16)
    assert agreement(model, model, stream) == pytest.approx((1.0, 1.0), abs=1e-4)
    assert held_out_loss(model, stream) == pytest.approx(np.log(4096), abs=0.2)
