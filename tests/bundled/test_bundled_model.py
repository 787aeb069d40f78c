"""The bundled folders are what a Hugging Face user expects, and the model has learned Python."""

import ast
import json
import math
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from scripts.bundled_model.tokenizer import render_chat

BUNDLED = Path(__file__).resolve().parents[2] / "baton" / "bundled"
TARGET = BUNDLED / "baton-7m"
DRAFT = BUNDLED / "baton-draft"
BOTH = pytest.mark.parametrize("folder", [TARGET, DRAFT], ids=lambda folder: folder.name)

# Written for this test, so in no training file.
UNSEEN = '''\
class Inventory:
    """Keep count of the items in a store."""

    def __init__(self, name, items=None):
        self.name = name
        self.items = dict(items or {})

    def add(self, item, count=1):
        if count < 0:
            raise ValueError("count must not be negative")
        self.items[item] = self.items.get(item, 0) + count

    def __len__(self):
        return len(self.items)
'''


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def target() -> Any:
    return load(TARGET)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(TARGET / "tokenizer.json"))


# -- folders ---------------------------------------------------------------------------------------


def test_both_together_stay_small() -> None:
    assert sum(path.stat().st_size for path in BUNDLED.rglob("*") if path.is_file()) <= 25_000_000


@BOTH
def test_folder_holds_the_usual_files(folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@BOTH
def test_weights_are_finite_and_16_bit(folder: Path) -> None:
    with safe_open(folder / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118 - not a mapping
            tensor = weights.get_tensor(name)
            assert tensor.dtype == torch.float16
            assert tensor.isfinite().all()


@BOTH
def test_no_weight_is_missing_or_left_over(folder: Path) -> None:
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


def test_shapes_suit_two_ranks_and_long_contexts() -> None:
    config = json.loads((TARGET / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["num_key_value_heads"] % 2 == 0
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["max_position_embeddings"] >= 2048


def test_draft_shares_the_tokenizer_byte_for_byte() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (DRAFT / name).read_bytes() == (TARGET / name).read_bytes()


@BOTH
def test_card_states_loss_and_limits(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    for expected in ("held-out loss", "bits per byte", "## Limits", "train_bundled_model.py"):
        assert expected in card


# -- tokenizer -------------------------------------------------------------------------------------


@given(st.text(max_size=200))
def test_any_text_round_trips(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(TARGET / "tokenizer.json"))
    text = text.encode(errors="ignore").decode()
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_auto_tokenizer_agrees_with_the_plain_one(tokenizer: Tokenizer) -> None:
    auto = AutoTokenizer.from_pretrained(TARGET)
    assert auto(UNSEEN)["input_ids"] == tokenizer.encode(UNSEEN).ids
    assert auto.decode(auto(UNSEEN)["input_ids"]) == UNSEEN
    assert len(auto) == tokenizer.get_vocab_size()


def test_generation_ends_at_the_end_of_text_and_of_turn(tokenizer: Tokenizer) -> None:
    eos = GenerationConfig.from_pretrained(TARGET).eos_token_id
    assert [tokenizer.id_to_token(i) for i in eos] == ["<|endoftext|>", "<|im_end|>"]


def test_chat_template_renders_with_plain_jinja() -> None:
    config = json.loads((TARGET / "tokenizer_config.json").read_text())
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]
    rendered = jinja2.Template(config["chat_template"]).render(
        messages=messages, add_generation_prompt=True
    )
    assert rendered == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    auto = AutoTokenizer.from_pretrained(TARGET)
    assert rendered == auto.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def test_turn_markers_are_single_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(render_chat([{"role": "user", "content": "Hello"}])).ids
    assert ids[0] == tokenizer.token_to_id("<|im_start|>")
    assert tokenizer.token_to_id("<|im_end|>") in ids


# -- what it learned -------------------------------------------------------------------------------


@torch.no_grad()
def loss_of(model: Any, ids: list[int]) -> float:
    tokens = torch.tensor([ids])
    return float(model(input_ids=tokens, labels=tokens).loss)


def greedy(model: Any, tokenizer: Tokenizer, prompt: str, count: int) -> str:
    tokens = torch.tensor([tokenizer.encode(prompt).ids])
    output = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=count
    )
    text: str = tokenizer.decode(output[0, tokens.shape[1] :].tolist())
    return text


def test_unseen_code_is_far_from_random(target: Any, tokenizer: Tokenizer) -> None:
    """An untrained model needs ln 4096 = 8.3 nats per token; unigram statistics about 6."""
    untrained = math.log(tokenizer.get_vocab_size())
    assert loss_of(target, tokenizer.encode(UNSEEN).ids) < 0.4 * untrained


def test_draft_knows_less_but_much(target: Any, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(UNSEEN).ids
    assert loss_of(target, ids) < loss_of(load(DRAFT), ids) < 0.6 * math.log(4096)


def test_completion_of_a_function_parses(target: Any, tokenizer: Tokenizer) -> None:
    prompt = "def fibonacci(n):\n"
    text = prompt + greedy(target, tokenizer, prompt, 64)
    assert any(parses(text, lines) for lines in range(2, text.count("\n") + 1))


def parses(text: str, lines: int) -> bool:
    """Whether the first lines make a function with a body."""
    try:
        tree = ast.parse("\n".join(text.split("\n")[:lines]))
    except SyntaxError:
        return False
    return bool(tree.body) and isinstance(tree.body[0], ast.FunctionDef)


def test_answers_a_greeting_and_ends_the_turn(target: Any, tokenizer: Tokenizer) -> None:
    auto = AutoTokenizer.from_pretrained(TARGET)
    chat = [{"role": "user", "content": "Hello!"}]
    prompt = auto.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    answer = greedy(target, tokenizer, prompt, 120)
    assert "language model" in answer
    assert len(tokenizer.encode(answer).ids) < 100


def test_loss_does_not_rise_with_long_contexts(target: Any, tokenizer: Tokenizer) -> None:
    text = Path(ast.__file__).read_text()
    ids = torch.tensor([tokenizer.encode(text).ids[:2048]])
    with torch.no_grad():
        logits = target(input_ids=ids[:, :-1]).logits[0]
    losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
    assert losses[1024:].mean() < losses[:512].mean() + 0.5
