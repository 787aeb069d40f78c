"""The two shapes that ship: a target of 7 million parameters and a draft of 0.9 million."""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from .tokenizer import EOS_TOKEN_IDS, VOCAB_SIZE

# Two K/V heads let two ranks share the target; 64 wide heads fit attention kernels, and their score
# matrices cost half as much in training as those of 32 wide heads.
TARGET: dict[str, int] = {
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 704,
}
DRAFT: dict[str, int] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 320,
}
MAX_POSITIONS = 2048


def make_config(shape: dict[str, int]) -> Any:
    """A Llama configuration with tied embeddings."""
    return LlamaConfig(
        **shape,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        bos_token_id=None,
        eos_token_id=EOS_TOKEN_IDS,
        pad_token_id=None,  # a padding id would keep that token's embedding from learning
    )


def make_model(shape: dict[str, int], seed: int = 0) -> Any:
    """A freshly initialised model; what is added to the residual stream starts small (GPT-2)."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(make_config(shape))
    shrink = (2 * shape["num_hidden_layers"]) ** -0.5
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.data.mul_(shrink)
    return model


def count_parameters(model: nn.Module) -> int:
    """Tied weights count once."""
    return sum(p.numel() for p in model.parameters())
