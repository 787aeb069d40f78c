"""Random-weight models load, decode every id and are not degenerate."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.make_model import LOGIT_STD, Shape, make_model

TINY = Shape(
    hidden_size=64,
    layers=2,
    heads=4,
    kv_heads=2,
    intermediate_size=96,
    vocab_size=5000,
    max_positions=256,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny", TINY)


def test_loads_with_the_shape_that_was_asked_for(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert model.config.num_key_value_heads == 2
    assert model.config.max_position_embeddings == 256
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.shape == (5000, 64)


def test_logits_spread_like_those_of_a_trained_model(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(100, 200)[None]).logits
    assert 0.5 * LOGIT_STD < logits.std().item() < 2 * LOGIT_STD
    assert len(set(logits[0].argmax(-1).tolist())) > 30


@pytest.mark.parametrize("vocab_size", [300, 5000])
def test_every_id_decodes_and_text_round_trips(tmp_path: Path, vocab_size: int) -> None:
    shape = Shape(64, 1, 2, 1, 96, vocab_size, 128)
    folder = make_model(tmp_path, shape)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == vocab_size
    assert all(tokenizer.decode([i], skip_special_tokens=False) for i in range(vocab_size))
    text = "def f(x):\n    return 'ünï – 漢字'\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_the_seed_decides_the_weights(folder: Path, tmp_path: Path) -> None:
    same = make_model(tmp_path / "same", TINY)
    other = make_model(tmp_path / "other", TINY, seed=1)
    name = "model.safetensors"
    assert (same / name).read_bytes() == (folder / name).read_bytes()
    assert (other / name).read_bytes() != (folder / name).read_bytes()


def test_dtype_and_untied_head(tmp_path: Path) -> None:
    shape = Shape(64, 1, 2, 1, 96, 400, 128, tied=False)
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path, shape, dtype="bfloat16"))
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_refuses_impossible_shapes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="heads"):
        Shape(hidden_size=100, heads=3)
    with pytest.raises(ValueError, match="vocab_size"):
        make_model(tmp_path, Shape(64, 1, 2, 1, 96, 100, 128))
