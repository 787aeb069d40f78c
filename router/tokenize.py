"""POST /tokenize and /detokenize, in vLLM's shapes: the prompt as a request would have it."""

from __future__ import annotations

from typing import Annotated, Any

from aiohttp import web
from pydantic import Field

from router.api import TokenId
from router.api_chat import ChatRendering, Messages, with_known_messages
from router.api_structured import Strict
from router.asked import Served
from router.chat_template import chat_options
from router.checks import check_rendering
from router.errors import bad_request
from router.params import check_tokens
from router.parsing import json_object, validate, without_neutral
from router.serving import Serving
from wire.types import MAX_REQUEST_TOKENS


class TokenizeBody(ChatRendering):
    """Text to tokenize, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Strict):
    """Tokens to write as text."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_REQUEST_TOKENS, fail_fast=True)]


NEUTRAL_TOKENIZE: dict[str, tuple[Any, ...]] = {"mm_processor_kwargs": ({},), "tools": ([],)}
_OF_CHAT = (
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
)


class TokenizePages:
    """Answers with the tokenizer alone; no node is asked."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def tokenize(self, request: web.Request) -> web.Response:
        """POST /tokenize"""
        body = parse_tokenize(await self._serving.read(request))
        served = self._serving.served(body.model)
        tokens = await self._tokens(body, served)
        names = [served.tokenizer.token_name(token) for token in tokens]
        return web.json_response(
            {
                "count": len(tokens),
                "max_model_len": served.info.max_model_len,
                "tokens": tokens,
                "token_strs": names if body.return_token_strs else None,
            }
        )

    async def _tokens(self, body: TokenizeBody, served: Served) -> list[int]:
        if body.messages is None:
            add = body.add_special_tokens is not False
            return (await served.tokenizer.encode(body.prompt or "", add)).ids
        check_rendering(body, self._serving.limits)
        return await served.tokenizer.encode_chat(body.messages, chat_options(body))

    async def detokenize(self, request: web.Request) -> web.Response:
        """POST /detokenize"""
        body = validate(DetokenizeBody, json_object(await self._serving.read(request)))
        served = self._serving.served(body.model)
        if body.tokens:
            check_tokens(body.tokens, served.info, "tokens")
        detokenizer = served.tokenizer.detokenizer((), skip_special_tokens=False)
        text = detokenizer.push(body.tokens) + detokenizer.flush()
        return web.json_response({"prompt": text})


def parse_tokenize(data: bytes) -> TokenizeBody:
    """Raises ApiError."""
    fields = without_neutral(json_object(data), NEUTRAL_TOKENIZE)
    body = validate(TokenizeBody, with_known_messages(fields))
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("Give either `prompt` or `messages`.", "prompt")
    if body.messages is None:
        for name in _OF_CHAT:
            if getattr(body, name) is not None:
                raise bad_request(f"`{name}` needs `messages`.", name)
    return body
