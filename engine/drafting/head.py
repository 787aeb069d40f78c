"""Heads that continue what a model was thinking: EAGLE, EAGLE-3 and multi-token prediction.

A row takes the target's state at position i and the token behind it, and gives the token after
that; going on, it takes its own state for the one that the target has not computed yet.

    target     h0  h1  h2  h3            (of tokens 0 to 3; token 4 was sampled from h3)
    token      t1  t2  t3  t4  d5  d6
    state      h0  h1  h2  h3  s4  s5    s: the head's own
    gives      t2  t3  t4  d5  d6  d7

    eagle      fc([embed, h]) → layers without the first norm → the target's vocabulary
    eagle3     fc([h of three layers]); a layer that attends over [norm(embed), norm(h)] → norm
               → a vocabulary of its own, part of the target's
    mtp        eh_proj([enorm(embed), hnorm(h)]) → a layer of the target's kind → norm
               → the target's vocabulary

Li et al. 2024 (EAGLE), 2025 (EAGLE-3); DeepSeek-V3's report, section 2.2. The layers themselves are
transformers'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from engine.attention import AttentionBatch
from engine.fused_decoder import FusedDecoder

Rows = Callable[[Tensor], Tensor]


class Lent:
    """A module of the target's, which stays the target's: a head only calls it."""

    def __init__(self, module: Rows) -> None:
        self._module = module

    def __call__(self, x: Tensor) -> Tensor:
        return self._module(x)


def lent_embedding(model: Any) -> Lent:
    """Of a transformers model, or of what stands in for one: ids [T] → [T, H]."""
    return Lent(
        model.embedding if isinstance(model, FusedDecoder) else model.get_input_embeddings()
    )


def lent_vocabulary(model: Any) -> Lent:
    """[T, H] → logits [T, V]."""
    return Lent(model.head if isinstance(model, FusedDecoder) else model.get_output_embeddings())


class EagleEntry(nn.Module):
    """How an EAGLE head takes in a token and a state."""

    def __init__(self, fc: nn.Linear) -> None:
        super().__init__()
        self.fc = fc
        self.state_size = fc.in_features // 2

    def combined(self, states: Tensor) -> Tensor:
        """The target's states [T, state_size] in the form of the head's own [T, H]."""
        return states

    def forward(self, embeds: Tensor, states: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """[T, H] each → what the layers take, and what they are told besides."""
        return self.fc(torch.cat((embeds, states), -1)), {}


class MtpEntry(nn.Module):
    """How a head for multi-token prediction does; see EagleEntry."""

    def __init__(self, enorm: nn.Module, hnorm: nn.Module, eh_proj: nn.Linear) -> None:
        super().__init__()
        self.enorm, self.hnorm, self.eh_proj = enorm, hnorm, eh_proj
        self.state_size = eh_proj.in_features // 2

    def combined(self, states: Tensor) -> Tensor:
        return states

    def forward(self, embeds: Tensor, states: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        return self.eh_proj(torch.cat((self.enorm(embeds), self.hnorm(states)), -1)), {}


class Eagle3Entry(nn.Module):
    """How an EAGLE-3 head does: its layer is given both; see EagleEntry."""

    def __init__(self, fc: nn.Linear) -> None:
        super().__init__()
        self.fc = fc
        self.state_size = fc.in_features

    def combined(self, states: Tensor) -> Tensor:
        combined: Tensor = self.fc(states)
        return combined

    def forward(self, embeds: Tensor, states: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        return states, {"token_states": embeds.unsqueeze(0)}


class Eagle3Layer(nn.Module):
    """A layer whose attention takes the token beside the state, [T, 2 H].

    Args:
        layer: transformers' layer of Llama, whose q, k and v take twice the width.
        keeps_normed: what is added to is the state after its norm.
    """

    def __init__(self, layer: Any, hidden_norm: nn.Module, *, keeps_normed: bool) -> None:
        super().__init__()
        self.layer = layer
        self.hidden_norm = hidden_norm
        self._keeps_normed = keeps_normed

    def forward(self, hidden_states: Tensor, *, token_states: Tensor, **kwargs: Any) -> Tensor:
        """[1, T, H] → [1, T, H]."""
        layer, normed = self.layer, self.hidden_norm(hidden_states)
        residual = normed if self._keeps_normed else hidden_states
        both = torch.cat((layer.input_layernorm(token_states), normed), -1)
        attended, _ = layer.self_attn(hidden_states=both, **kwargs)
        residual = residual + attended
        output: Tensor = residual + layer.mlp(layer.post_attention_layernorm(residual))
        return output


class LlamaLayers(nn.Module):
    """Layers of Llama's kind with the call of the decoder that they are from.

    That one's own takes 0.12 ms more, an eighth of a small head's pass, for what nobody needs here.
    """

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self.rotary, self.layers = decoder.rotary_emb, decoder.layers
        self.config = decoder.config

    def forward(self, *, inputs_embeds: Tensor, position_ids: Tensor, **told: Any) -> Any:
        x = inputs_embeds
        turn = self.rotary(x, position_ids)
        for layer in self.layers:
            x = layer(x, attention_mask=None, position_embeddings=turn, **told)
        return SimpleNamespace(last_hidden_state=x)


class PartialVocabulary(nn.Module):
    """Logits of a head's own vocabulary, at the ids that the target has for them."""

    def __init__(self, head: nn.Linear, target_ids: Tensor, vocab_size: int) -> None:
        super().__init__()
        self.head = head
        self.register_buffer("target_ids", target_ids)
        self._vocab_size = vocab_size

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] → [T, V], minus infinity where the head has no such token."""
        logits = x.new_full((len(x), self._vocab_size), -torch.inf)
        ids: Any = self.target_ids
        logits[:, ids] = self.head(x)
        return logits


class DraftHead(nn.Module):
    """A head with the call of a causal language model, and states besides tokens.

    Args:
        body: a decoder of the head's layers, with nothing before or behind them.
        norm: before the vocabulary.
        chains_normed: a row's state, for the row behind it, is the one after `norm`.
        layers: of the target, whose inputs it reads; none: what the target's head is given.
    """

    def __init__(
        self,
        entry: EagleEntry | MtpEntry | Eagle3Entry,
        body: Any,
        norm: nn.Module,
        embed: Lent | nn.Embedding,
        vocabulary: Lent | PartialVocabulary,
        *,
        chains_normed: bool = False,
        layers: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.entry, self.body, self.norm = entry, body, norm
        self.embed, self.vocabulary = embed, vocabulary
        self.layers = layers
        self.width: int = body.config.hidden_size
        self._chains_normed = chains_normed

    def forward(
        self,
        input_ids: Tensor,  # [1, T]
        position_ids: Tensor,  # [1, T]
        attention_batch: AttentionBatch,
        logits_to_keep: Tensor,
        states: Tensor,  # [T, H]: the target's, combined, or the head's own
        use_cache: bool = False,
    ) -> Any:
        """An object whose `logits` are [1, rows, vocabulary], and `states` [rows, H]."""
        assert not use_cache, "keys and values go into the blocks of the batch"
        x, told = self.entry(self.embed(input_ids.squeeze(0)), states)
        output = self.body(
            inputs_embeds=x.unsqueeze(0),
            position_ids=position_ids,
            use_cache=False,
            attention_batch=attention_batch,
            **told,
        )
        last = output.last_hidden_state.squeeze(0)[logits_to_keep]
        normed = self.norm(last)
        return SimpleNamespace(
            logits=self.vocabulary(normed).unsqueeze(0),
            states=normed if self._chains_normed else last,
        )
