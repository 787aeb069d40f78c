"""What a head of Llama's layers drafts, computed densely and anew for every token.

No blocks, no cache, no batch: from the states that transformers tells, by the formulas of papers
and formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

HEADS, KV_HEADS, HEAD_DIM, EPS = 4, 2, 8, 1e-6
LAYER = "layer."


class Reference:
    """A target, and one head on it."""

    def __init__(self, method: str, target: Path, head: Path, layers: tuple[int, ...] = ()) -> None:
        from transformers import AutoModelForCausalLM

        self._target = AutoModelForCausalLM.from_pretrained(target).eval()
        self._method = method
        self._layers = layers
        self._head = _named(method, load_file(head / "model.safetensors"))

    @torch.inference_mode()
    def draft(self, tokens: list[int], base: int, num_tokens: int) -> list[int]:
        """What may follow `tokens`, greedily; the head's context begins at the row `base`."""
        states = self._states(tokens[:-1])[base:]
        known, drafted = tokens[base + 1 :], list[int]()
        for _ in range(num_tokens):
            out, logits = self._run(states, torch.tensor([*known, *drafted]))
            drafted.append(int(logits[-1].argmax()))
            states = torch.cat((states, out[-1:]))
        return drafted

    def _states(self, tokens: list[int]) -> Tensor:
        """What the head reads of each row, in the head's width."""
        told = self._target(torch.tensor([tokens]), output_hidden_states=True).hidden_states
        if self._method != "eagle3":
            final: Tensor = told[-1][0]
            return final
        return torch.cat([told[i][0] for i in self._layers], -1) @ self._head["fc.weight"].T

    def _run(self, states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The head's own state and logits of every row."""
        w, embed = self._head, self._target.get_input_embeddings()(ids)
        vocabulary = self._target.get_output_embeddings()
        if self._method == "eagle":
            x = F.linear(torch.cat((embed, states), -1), w["fc.weight"], w.get("fc.bias"))
            x = _layer(w, x, x)
            return x, vocabulary(x)
        if self._method == "mtp":
            both = torch.cat((_norm(embed, w["enorm"]), _norm(states, w["hnorm"])), -1)
            x = both @ w["eh_proj.weight"].T
            x = _norm(_layer(w, x, _norm(x, w["layer.input_layernorm"])), w["shared_head.norm"])
            return x, vocabulary(x)
        normed = _norm(states, w["layer.hidden_norm"])
        x = _layer(w, states, torch.cat((_norm(embed, w["layer.input_layernorm"]), normed), -1))
        logits = torch.full((len(x), vocabulary.out_features), -torch.inf)
        own = _norm(x, w["norm"]) @ w["lm_head.weight"].T
        for number, offset in enumerate(w["d2t"].tolist()):
            logits[:, number + offset] = own[:, number]
        return x, logits


def _named(method: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head's tensors, its layer's below `layer.`; norms without their `.weight`."""
    prefix = {"eagle": "layers.0.", "eagle3": "midlayer.", "mtp": "model.layers.2."}[method]
    own = ("enorm", "hnorm", "eh_proj", "shared_head")
    named = {}
    for full, tensor in tensors.items():
        name = full.removeprefix(prefix)
        if full.startswith(prefix) and not name.startswith(own):
            name = LAYER + name
        named[name.removesuffix(".weight") if tensor.dim() == 1 else name] = tensor
    named |= {name: tensors[name] for name in ("fc.bias", "d2t") if name in tensors}
    return named


def _norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def _layer(w: dict[str, Any], residual: Tensor, x: Tensor) -> Tensor:
    """Attention on `x` and an MLP, each added."""
    length = len(x)
    q, k, v = (
        (x @ w[f"layer.self_attn.{name}_proj.weight"].T).view(length, -1, HEAD_DIM).transpose(0, 1)
        for name in "qkv"
    )
    q, k = _turned(q), _turned(k)
    k, v = (y.repeat_interleave(HEADS // KV_HEADS, 0) for y in (k, v))
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    together = attended.transpose(0, 1).reshape(length, HEADS * HEAD_DIM)
    residual = residual + together @ w["layer.self_attn.o_proj.weight"].T
    x = _norm(residual, w["layer.post_attention_layernorm"])
    gate, up = (x @ w[f"layer.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    down: Tensor = residual + (F.silu(gate) * up) @ w["layer.mlp.down_proj.weight"].T
    return down


def _turned(x: Tensor) -> Tensor:
    """Rotary embedding, at the positions 0, 1, ..."""
    half = HEAD_DIM // 2
    frequencies = 10000.0 ** (-torch.arange(half) / half)
    angles = torch.arange(x.shape[1])[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
