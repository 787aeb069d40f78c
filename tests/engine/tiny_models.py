"""Tiny random models of many architectures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD_DIM = {"head_dim": 8}
LAYER_TYPES = ["sliding_attention", "full_attention"]
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0]}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama_tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama_dynamic": (
        "LlamaConfig",
        {"max_position_embeddings": 32, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
    ),
    "llama_yarn": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", HEAD_DIM),
    "mistral": ("MistralConfig", {"sliding_window": 6}),
    "gemma2": (
        "Gemma2Config",
        {
            **HEAD_DIM,
            "sliding_window": 6,
            "layer_types": LAYER_TYPES,
            "attn_logit_softcapping": 2.0,
            "query_pre_attn_scalar": 16,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {**HEAD_DIM, "sliding_window": 6, "layer_types": LAYER_TYPES, "query_pre_attn_scalar": 16},
    ),
    "phi3": ("Phi3Config", {}),
    "phi3_longrope": (
        "Phi3Config",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    ),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1}),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3MoeConfig", {**HEAD_DIM, **EXPERTS, "num_experts": 4}),
    "gpt_oss": (
        "GptOssConfig",
        {
            **HEAD_DIM,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 6,
            "layer_types": LAYER_TYPES,
        },
    ),
}

BYPASS = "attention interface"
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "falcon": ("FalconConfig", {}, BYPASS),
    "gptj": ("GPTJConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, BYPASS),
    "gpt_neo": (
        "GPTNeoConfig",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
        BYPASS,
    ),
    "bloom": ("BloomConfig", {"n_layer": 2, "n_head": 4}, BYPASS),
    "mpt": ("MptConfig", {"d_model": 32, "n_layers": 2, "n_heads": 4}, BYPASS),
    "mamba": ("MambaConfig", {}, BYPASS),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention"]}, "1 of its 2 layers"),
    "stablelm": ("StableLmConfig", {}, "does not hand keyword arguments down"),
    "deepseek": (
        "DeepseekV3Config",
        {
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 2,
            "num_key_value_heads": 4,
        },
        "key heads of size 16 and value heads of size 8",
    ),
    "llama4_chunks": (
        "Llama4TextConfig",
        {
            **HEAD_DIM,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "attention_chunk_size": 16,
        },
        "neither causal nor a sliding window",
    ),
    "gemma3_bidirectional": (
        "Gemma3TextConfig",
        {**HEAD_DIM, "use_bidirectional_attention": True},
        "not causal",
    ),
    "falcon_h1": (
        "FalconH1Config",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
        "outside attention mixes tokens",
    ),
    "bert": ("BertConfig", {}, "not causal"),
    "t5": ("T5Config", {"d_model": 32, "num_layers": 2, "d_ff": 48}, "encoder-decoder"),
}


def save_random_model(config_class: str, changes: dict[str, Any], folder: Path) -> Path:
    """Write a model of random weights: config.json and model.safetensors."""
    import transformers

    make_config = getattr(transformers, config_class)
    known = {name: value for name, value in SMALL.items() if hasattr(make_config(), name)}
    config = make_config(**{**known, **changes})
    torch.manual_seed(17)
    kind = "Seq2SeqLM" if config.is_encoder_decoder else "CausalLM"
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config)
    _enliven(model)
    model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["architectures"]
    return folder


def _enliven(model: torch.nn.Module) -> None:
    """Random biases and norms too, so that forgetting one would show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
