"""Writes a trained model as an ordinary Hugging Face folder in 16 bit."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from .shapes import MAX_POSITIONS
from .tokenizer import EOS_TOKEN_IDS, write_tokenizer

# All weights lie far inside fp16's range, where it keeps three more bits than bf16.
DTYPE = torch.float16


def export(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config, weights, tokenizer and generation config; the card comes separately."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: weight.detach().to("cpu", DTYPE).contiguous()
        for name, weight in model.named_parameters()  # the tied head is not among them
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_diff_dict()
    config |= {"architectures": ["LlamaForCausalLM"], "dtype": "float16", "use_cache": True}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", generation_config())
    write_tokenizer(tokenizer, folder, MAX_POSITIONS)


def generation_config() -> dict[str, Any]:
    """Ends at the end of a file and at the end of a turn."""
    return {"eos_token_id": EOS_TOKEN_IDS, "pad_token_id": EOS_TOKEN_IDS[0]}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
