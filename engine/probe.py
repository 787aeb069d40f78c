"""Proves at load that a model can be served: all that it does between tokens is our attention.

Three questions, each answered by running the model on a few tokens:

1. Does every layer call the hook exactly once, with the step's metadata, with heads that a block
   can hold, and with nothing that the attention does not know? (The hook only looks.)
2. Is the mask that transformers would have built the one that we apply, also at far positions?
3. Are the logits of two requests, chunked, interleaved and far apart in position, those of each
   alone under transformers' own attention? What mixes tokens outside the hook (convolutions,
   recurrent states), or follows the batch (unknown rotary scalings), fails here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.attention import PAGED, AttentionBatch, AttentionCall, MissingBatch
from engine.kv_store import KVStore
from engine.numerics import dtype_name
from kernels.paged_attention import RequestRows
from wire.errors import UnsupportedModelError
from wire.layout import KVLayout

OBSERVED = "baton_observed"
"""Name of the attention that only looks; a mask is registered under it, which PAGED has none of."""

HARMLESS = {
    "attention_mask",
    "cache_position",
    "dropout",
    "is_causal",
    "past_key_values",
    "position_embeddings",
    "position_ids",
}
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.2}
BLOCK_SIZE = 4
NEAR_LEN, CUT, NEAR_BLOCKS = 7, 3, (2, 0)  # computed as [0, CUT) and [CUT, NEAR_LEN)
FAR_LEN, FAR_BLOCKS = 5, (3, 1)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What the probe learns: a KV block's shape, the vocabulary, how layers call attention."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    calls: tuple[AttentionCall, ...]  # by layer


@dataclass(frozen=True, slots=True)
class MaskRule:
    """Stands in for a mask during the probe: the rule from which transformers would build it."""

    visible: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # batch, head, query, key


@dataclass(slots=True)
class Observer:
    """Collects the calls of the hook in one forward pass; refuses what the attention cannot do."""

    architecture: str
    max_model_len: int
    layers: list[int] = field(default_factory=list)
    heads: set[tuple[int, int]] = field(default_factory=set)
    calls: dict[int, AttentionCall] = field(default_factory=dict)

    def refuse(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.architecture} cannot be served: {why}")

    def look(
        self,
        module: nn.Module,
        shapes: tuple[torch.Size, torch.Size, torch.Size],
        mask: object,
        call: AttentionCall,
        extra: dict[str, Any],
    ) -> None:
        query, key, value = shapes
        if key != value or query[-1] != key[-1]:
            raise self.refuse(f"key heads of size {key[-1]} and value heads of size {value[-1]}")
        given = (name for name, value in extra.items() if value is not None and value is not False)
        if strange := sorted(set(given) - HARMLESS):
            raise self.refuse(f"its attention needs {', '.join(strange)}, which is not supported")
        if extra.get("is_causal") is False or not getattr(module, "is_causal", True):
            raise self.refuse("its attention is not causal")
        if mask is not None and not self._is_causal_window(mask, call.window):
            raise self.refuse("its attention mask is neither causal nor a sliding window")
        self.layers.append(getattr(module, "layer_idx", -1))
        self.calls[self.layers[-1]] = call
        self.heads.add((key[1], key[3]))

    def _is_causal_window(self, mask: object, window: int | None) -> bool:
        """Compare the model's own rule with ours around every position where one could change."""
        if not isinstance(mask, MaskRule):
            return False
        positions = _telling_positions(self.max_model_len, window)
        zero = torch.zeros((), dtype=torch.int64)
        theirs = mask.visible(zero, zero, positions[:, None], positions[None, :])
        distance = positions[:, None] - positions[None, :]
        ours = (distance >= 0) & (distance < (window or self.max_model_len + 1))
        return bool((theirs == ours).all())

    def shape(self, num_layers: int, vocab_size: int) -> AttentionShape:
        if sorted(self.layers) != list(range(num_layers)):
            raise self.refuse(
                f"{len(set(self.layers))} of its {num_layers} layers use transformers' attention "
                f"interface ({len(self.layers)} calls); the others bypass it"
            )
        if len(self.heads) != 1:
            raise self.refuse(f"its layers differ in K/V heads and head size: {sorted(self.heads)}")
        ((num_kv_heads, head_dim),) = self.heads
        calls = tuple(self.calls[layer] for layer in range(num_layers))
        return AttentionShape(num_layers, num_kv_heads, head_dim, vocab_size, calls)


def _telling_positions(max_model_len: int, window: int | None) -> Tensor:
    """Positions at and beside every power of two and every multiple of the window that matters."""
    marks = {0, max_model_len - 1, *(1 << i for i in range(max_model_len.bit_length()))}
    if window is not None:
        marks |= {window, 2 * window}
    near = {mark + d for mark in marks for d in (-1, 0, 1)}
    return torch.tensor(sorted(p for p in near if 0 <= p < max_model_len))


def observing_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    *,
    attention_batch: Observer | None = None,
    sliding_window: int | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **extra: Any,
) -> tuple[Tensor, None]:
    """Shows the call to the observer; the output has only the right shape."""
    if attention_batch is None:
        raise MissingBatch
    shapes = (query.shape, key.shape, value.shape)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = AttentionCall(scale, sliding_window, softcap, s_aux is not None)
    attention_batch.look(module, shapes, attention_mask, call, extra)
    return query.transpose(1, 2).contiguous(), None


def mask_rule(*, mask_function: Any, **_: Any) -> MaskRule:
    """transformers' mask interface: keep the rule, build nothing."""
    return MaskRule(mask_function)


def probe(model: Any, architecture: str, num_layers: int, max_model_len: int) -> AttentionShape:
    """Raises UnsupportedModelError where the model cannot be served, and says why."""
    observer = Observer(architecture, max_model_len)
    try:
        shape = _observe(model, observer, num_layers)
        difference = _difference(model, shape, max_model_len)
    except MissingBatch as error:
        raise observer.refuse("it does not hand keyword arguments down to its attention") from error
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever a foreign model does with what it is given
        raise observer.refuse(
            f"its forward pass fails with our attention ({error!r:.200})"
        ) from error
    finally:
        model.set_attn_implementation(PAGED)
    if not difference < TOLERANCE[model.dtype]:
        raise observer.refuse(
            f"its output differs by {difference:.1%} from transformers' own attention "
            f"when requests share a batch; something outside attention mixes tokens"
        )
    return shape


@torch.inference_mode()
def _observe(model: Any, observer: Observer, num_layers: int) -> AttentionShape:
    model.set_attn_implementation(OBSERVED)
    if model.config.get_text_config(decoder=True)._attn_implementation != OBSERVED:
        raise observer.refuse("it bypasses transformers' attention interface")
    logits = _forward(model, [1, 2, 3], [0, 1, 2], observer)
    return observer.shape(num_layers, logits.shape[-1])


@torch.inference_mode()
def _difference(model: Any, shape: AttentionShape, max_model_len: int) -> float:
    """Relative difference between two requests in one paged batch and each alone.

    The neighbour stands at the last positions that can occur, with a context of its own few tokens.
    """
    near = [(7 * i + 3) % shape.vocab_size for i in range(NEAR_LEN)]
    far = [(11 * i + 5) % shape.vocab_size for i in range(FAR_LEN)]
    far_positions = list(range(max_model_len - FAR_LEN, max_model_len))

    model.set_attn_implementation("eager")
    alone = [_forward(model, near, list(range(NEAR_LEN)), None)[-1]]
    alone.append(_forward(model, far, far_positions, None)[-1])

    model.set_attn_implementation(PAGED)
    store = _store(model, shape)
    head, tail = near[:CUT], near[CUT:]
    first = (_rows(0, CUT, CUT, NEAR_BLOCKS), _rows(CUT, FAR_LEN, FAR_LEN, FAR_BLOCKS))
    positions = [*range(CUT), *far_positions]
    far_logits = _forward(model, [*head, *far], positions, _batch(store, first))[-1]
    second = (_rows(0, len(tail), NEAR_LEN, NEAR_BLOCKS),)
    near_logits = _forward(model, tail, list(range(CUT, NEAR_LEN)), _batch(store, second))[-1]

    theirs, ours = torch.stack(alone).double(), torch.stack([near_logits, far_logits]).double()
    return float((theirs - ours).norm() / theirs.norm())


def _forward(model: Any, tokens: list[int], positions: list[int], batch: object | None) -> Tensor:
    """Logits [T, vocab] of one row of tokens."""
    metadata = {} if batch is None else {"attention_batch": batch}
    ids, places = (torch.tensor([x], device=model.device) for x in (tokens, positions))
    output = model(input_ids=ids, position_ids=places, use_cache=False, **metadata)
    return output.logits[0]  # type: ignore[no-any-return]


def _store(model: Any, shape: AttentionShape) -> KVStore:
    layout = KVLayout(
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        block_size=BLOCK_SIZE,
        dtype=dtype_name(model.dtype),
    )
    return KVStore(layout, len(NEAR_BLOCKS) + len(FAR_BLOCKS), model.device)


def _rows(first_row: int, num_rows: int, context_len: int, blocks: tuple[int, ...]) -> RequestRows:
    return RequestRows(first_row, num_rows, context_len, torch.tensor(blocks))


def _batch(store: KVStore, requests: tuple[RequestRows, ...]) -> AttentionBatch:
    device = store.blocks.device
    moved = tuple(replace(r, block_table=r.block_table.to(device)) for r in requests)
    positions = [torch.arange(r.first_position, r.context_len, device=device) for r in moved]
    places = zip(moved, positions, strict=True)
    blocks = torch.cat([r.block_table[p // BLOCK_SIZE] for r, p in places])
    return AttentionBatch(store, moved, (blocks, torch.cat(positions) % BLOCK_SIZE))
