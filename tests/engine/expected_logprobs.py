"""What logprobs must say, one token at a time and without what the engine uses for it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from wire.logprobs import TokenLogprobs, unpack


def check_row(row: bytes, logits: Tensor, token: int, num_top: int, atol: float = 1e-5) -> None:
    """`row` tells `token`, its rank and the best `num_top` of `logits` [V]."""
    told = unpack(row)
    logprobs = logits.double().log_softmax(-1)
    assert math.isclose(told.logprob, logprobs[token], abs_tol=atol)
    assert told.rank == 1 + int((logits > logits[token]).sum())
    check_top(told, logprobs, num_top, atol)


def check_top(told: TokenLogprobs, logprobs: Tensor, num_top: int, atol: float) -> None:
    num_top = min(num_top, len(logprobs))
    assert len(told.top) == num_top
    values = [logprob for _, logprob in told.top]
    torch.testing.assert_close(
        torch.tensor(values, dtype=torch.float64), logprobs.topk(num_top).values, atol=atol, rtol=0
    )
    for token, logprob in told.top:
        assert math.isclose(logprob, logprobs[token], abs_tol=atol)
    assert len({token for token, _ in told.top}) == num_top
    if 0 < told.rank <= num_top:
        assert told.logprob in values  # exactly: clients compare them


def check_prompt_rows(
    rows: Sequence[bytes], logits: Sequence[Tensor] | Tensor, tokens: Sequence[int], num_top: int
) -> None:
    """One row for each token but the first; `logits[i]` follow token i."""
    assert len(rows) == len(tokens) - 1
    for row, before, token in zip(rows, logits, tokens[1:], strict=False):
        check_row(row, before, token, num_top, atol=1e-4)
