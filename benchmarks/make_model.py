#!/usr/bin/env python3
"""Writes a random-weight Llama with a tokenizer, to measure speed where the text does not matter.

examples:
  python benchmarks/make_model.py /tmp/m88                   # 88 M parameters, the default shape
  python benchmarks/make_model.py /tmp/m1b --hidden-size 2048 --layers 16 --heads 32 --kv-heads 8 \\
      --intermediate-size 8192 --dtype bfloat16

The tokenizer is the bundled one, cut or filled up to the vocabulary, so every id decodes to text.
The weights are scaled so that the logits spread as in a trained model: with the usual small
initialisation all tokens are near-ties, and a comparison of two runs would measure those.
"""

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

BUNDLED = Path(__file__).resolve().parents[1] / "baton" / "bundled" / "baton-7m"
LOGIT_STD = 3.0  # about as sharp as a trained model: the best token gets a few per cent


@dataclass(frozen=True)
class Shape:
    """The default is a model of 88 million parameters."""

    hidden_size: int = 768
    layers: int = 12
    heads: int = 12
    kv_heads: int = 4
    intermediate_size: int = 2048
    vocab_size: int = 16_000
    max_positions: int = 8192
    tied: bool = True

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads or self.heads % self.kv_heads:
            raise ValueError("hidden_size must divide by heads, and heads by kv_heads")


def make_model(
    path: str | Path, shape: Shape | None = None, dtype: str = "float32", seed: int = 0
) -> Path:
    """Write config, weights, tokenizer and chat template to the folder `path` and return it."""
    folder, shape = Path(path), shape or Shape()
    model = random_model(shape, seed).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    write_tokenizer(folder, shape)
    return folder


def random_model(shape: Shape, seed: int) -> Any:
    """Random weights whose logits have a standard deviation of LOGIT_STD."""
    torch.manual_seed(seed)
    eos = json.loads((BUNDLED / "generation_config.json").read_text())["eos_token_id"]
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=shape.tied,
        initializer_range=shape.hidden_size**-0.5,  # keeps the variance from layer to layer
        bos_token_id=None,
        eos_token_id=eos,
    )
    model = LlamaForCausalLM(config)
    # The last norm makes unit-variance features, so the head's own scale sets that of the logits.
    model.model.norm.weight.data.fill_(LOGIT_STD)
    return model


def write_tokenizer(folder: Path, shape: Shape) -> None:
    """The bundled tokenizer with exactly `vocab_size` entries."""
    tokenizer = json.loads((BUNDLED / "tokenizer.json").read_text())
    _resize(tokenizer, shape.vocab_size)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    config = json.loads((BUNDLED / "tokenizer_config.json").read_text())
    config["model_max_length"] = shape.max_positions
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def _resize(tokenizer: dict[str, Any], size: int) -> None:
    """Drop the last merges, or add entries that no text encodes to but that decode."""
    model = tokenizer["model"]
    vocab: dict[str, int] = model["vocab"]
    merges: list[list[str]] = model["merges"]
    surplus = max(len(vocab) - size, 0)
    if surplus > len(merges):
        raise ValueError(f"vocab_size must be at least {len(vocab) - len(merges)}, the bytes alone")
    if surplus:
        del merges[len(merges) - surplus :]
        model["vocab"] = vocab = {token: i for token, i in vocab.items() if i < size}
    for index in range(len(vocab), size):
        vocab[f"Ġw{index}"] = index


def main() -> None:
    """Write what the flags say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path)
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--untied", dest="tied", action="store_false")
    for field in dataclasses.fields(Shape):
        if field.name != "tied":
            flag = "--" + field.name.replace("_", "-")
            parser.add_argument(flag, type=int, default=field.default)
    args = parser.parse_args()
    names = [field.name for field in dataclasses.fields(Shape)]
    shape = Shape(**{name: getattr(args, name) for name in names})
    print(make_model(args.path, shape, args.dtype, args.seed))


if __name__ == "__main__":
    main()
