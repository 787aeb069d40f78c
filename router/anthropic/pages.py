"""The routes of Anthropic's API; what they ask for is chat."""

from __future__ import annotations

from aiohttp import web

from router.anthropic.body import parse_count, parse_messages
from router.anthropic.format import MessagesFormat
from router.anthropic.translate import as_chat
from router.params import generation_params
from router.serving import Serving

PREFIX = "/v1/messages"


class AnthropicPages:
    """Handlers."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post(PREFIX, self.messages),
            web.post(f"{PREFIX}/count_tokens", self.count_tokens),
        ]

    async def messages(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/messages"""
        timeline = self._serving.new_timeline()
        body = as_chat(parse_messages(await self._serving.read_timed(request, timeline)))
        return await self._serving.answer_chat(request, body, timeline, MessagesFormat)

    async def count_tokens(self, request: web.Request) -> web.Response:
        """POST /v1/messages/count_tokens"""
        body = as_chat(parse_count(await self._serving.read(request)))
        served = self._serving.served(body.model)
        params = generation_params(body, served.info, self._serving.limits)
        tokens = await served.tokenizer.encode_chat(body.messages, params.chat_options)
        return web.json_response({"input_tokens": len(tokens)})
