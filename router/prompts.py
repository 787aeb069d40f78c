"""From what a body says to a prompt's tokens, and its text where that comes back."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from router.api_chat import ChatBody
from router.echo import Echo, echo_of
from router.errors import bad_request, context_too_long
from router.params import GenerationParams, check_tokens
from router.tokenizer import Encoded, Tokenizer
from wire.fleet_messages import ModelInfo

INLINE_TOKENS = 2_000
"""Up to so many tokens are written out at once; more of them in a thread, beside the streams."""


@dataclass(frozen=True, slots=True)
class ReadyPrompt:
    """One prompt of a request that was found valid."""

    tokens: list[int]
    echo: Echo | None = None


async def completion_prompt(
    prompt: str | list[int], params: GenerationParams, tokenizer: Tokenizer, info: ModelInfo
) -> ReadyPrompt:
    """One prompt of a completion. Raises ApiError."""
    if isinstance(prompt, str):
        add_special_tokens = params.body.add_special_tokens is not False
        encoded = await tokenizer.encode(prompt, add_special_tokens)
    else:
        encoded = Encoded(prompt, [])
    if not encoded.ids:
        raise bad_request("The prompt is empty.", "prompt")
    encoded = _truncated(encoded, params, info)
    limit = info.max_model_len
    if len(encoded.ids) >= limit:  # before work is spent on the others
        raise context_too_long(limit, len(encoded.ids), 0, "prompt")
    check_tokens(encoded.ids, info)
    echo = await _echo(encoded, tokenizer) if params.echo else None
    return ReadyPrompt(encoded.ids, echo)


async def chat_prompt(
    body: ChatBody, params: GenerationParams, tokenizer: Tokenizer, info: ModelInfo
) -> ReadyPrompt:
    """The prompt of a conversation. Raises ApiError."""
    tokens = await tokenizer.encode_chat(body.messages, params.chat_options)
    if not tokens:
        raise bad_request("The chat template gives an empty prompt.", "messages")
    return ReadyPrompt(_truncated(Encoded(tokens, []), params, info).ids)


async def _echo(encoded: Encoded, tokenizer: Tokenizer) -> Echo:
    if len(encoded.ids) <= INLINE_TOKENS:
        return echo_of(encoded.ids, encoded.added, tokenizer)
    return await asyncio.to_thread(echo_of, encoded.ids, encoded.added, tokenizer)


def _truncated(encoded: Encoded, params: GenerationParams, info: ModelInfo) -> Encoded:
    """The last `truncate_prompt_tokens` tokens; -1 means as many as leave room for an answer."""
    limit = params.body.truncate_prompt_tokens
    if limit is None:
        return encoded
    if limit < 0:
        room = params.max_tokens or params.default_max_tokens or 1
        limit = max(1, info.max_model_len - room)
    return Encoded(encoded.ids[-limit:], encoded.added[-limit:])
