"""Tokens that tell the time when they were made, so that any reader can tell how long they took."""

from __future__ import annotations

import time

from tokenizers import Tokenizer, decoders, models

from wire.fleet_messages import TokenizerFiles
from wire.request_messages import Prefill
from wire.types import FinishReason

STAMP_S = 20e-6
NUM_STAMPS = 100_000  # they repeat after two seconds


def stamp(now: float) -> int:
    """The token for time `now` (`time.monotonic`, the same clock in all processes of a machine)."""
    return int(now / STAMP_S) % NUM_STAMPS


def stamp_age(text: str, now: float) -> float:
    """Seconds since the token with this text was made, if less than two."""
    return ((stamp(now) - int(text.rstrip(";"))) % NUM_STAMPS) * STAMP_S


def stamp_tokenizer() -> TokenizerFiles:
    """Token `i` is written as `00000;` to `99999;`."""
    vocab = {f"{number:05d};": number for number in range(NUM_STAMPS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return TokenizerFiles(tokenizer.to_str().encode(), b"{}")


def stamping(request: Prefill, index: int) -> tuple[int, FinishReason | None]:
    """A script: every token is the time, until `max_tokens`."""
    last = index + 1 >= request.sampling.max_tokens
    return stamp(time.monotonic()), FinishReason.LENGTH if last else None
