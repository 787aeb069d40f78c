"""When a request ends."""

from __future__ import annotations

from engine.request import Request
from wire.types import FinishReason, SamplingParams


def end_tokens(sampling: SamplingParams, eos_token_ids: frozenset[int]) -> frozenset[int]:
    """All tokens that end a request without a grammar."""
    stops = frozenset(sampling.stop_token_ids)
    return stops if sampling.ignore_eos else stops | eos_token_ids


def ends_request(token: int, sampling: SamplingParams, eos_token_ids: frozenset[int]) -> bool:
    """Whether sampling `token` stops the request."""
    if token in sampling.stop_token_ids:
        return True
    # Where a grammar is at its end nothing but an end token can follow.
    return token in eos_token_ids and (not sampling.ignore_eos or bool(sampling.grammar))


def finish_reason(request: Request, eos_token_ids: frozenset[int]) -> FinishReason | None:
    """Why `request` ends with its last token, or None where it goes on."""
    if ends_request(request.tokens[-1], request.sampling, eos_token_ids):
        return FinishReason.STOP
    if request.num_tokens >= request.token_limit:
        return FinishReason.LENGTH
    return None
