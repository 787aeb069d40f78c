"""The routes of Responses; what they ask for is chat."""

from __future__ import annotations

import logging
from collections.abc import Callable

from aiohttp import web

from router.api_chat import ChatBody
from router.errors import ApiError, bad_request, server_error
from router.metrics import RouterMetrics
from router.params import generation_params
from router.responses.body import ResponsesBody, parse_responses
from router.responses.format import ResponsesFormats
from router.responses.items import InputItem, Json, kept_items, told_items
from router.responses.store import (
    ChainTooLong,
    NotStored,
    ResponseStore,
    StoredResponse,
    StoreFailed,
)
from router.responses.translate import as_chat, in_our_words
from router.responses.truncate import fitted
from router.serving import Serving

log = logging.getLogger(__name__)

PREFIX = "/v1/responses"
MAX_LISTED = 100
_LISTED = 20


class ResponsePages:
    """Handlers.

    Args:
        owner: whose request this is; responses are kept apart by it.
    """

    def __init__(
        self,
        serving: Serving,
        store: ResponseStore,
        metrics: RouterMetrics,
        owner: Callable[[web.Request], str],
    ) -> None:
        self._serving = serving
        self._store = store
        self._metrics = metrics
        self._owner = owner

    def routes(self) -> list[web.RouteDef]:
        return [
            web.post(PREFIX, self.create),
            web.get(f"{PREFIX}/{{id}}", self.retrieve),
            web.delete(f"{PREFIX}/{{id}}", self.delete),
            web.get(f"{PREFIX}/{{id}}/input_items", self.input_items),
        ]

    async def create(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/responses"""
        timeline = self._serving.new_timeline()
        body = parse_responses(await self._serving.read_timed(request, timeline))
        owner = self._owner(request)
        earlier = await self._earlier(body, owner)
        try:
            chat = as_chat(body, earlier)
            if body.truncation == "auto":
                chat = await self._fitted(chat)
            formats = ResponsesFormats(body, lambda response: self._keep(response, body, owner))
            return await self._serving.answer_chat(request, chat, timeline, formats)
        except ApiError as error:
            raise in_our_words(error) from error

    async def retrieve(self, request: web.Request) -> web.Response:
        """GET /v1/responses/{id}"""
        _refuse_query(request, known=())
        return web.json_response((await self._stored(request)).response)

    async def delete(self, request: web.Request) -> web.Response:
        """DELETE /v1/responses/{id}"""
        id = request.match_info["id"]
        try:
            await self._store.delete(id, self._owner(request))
        except NotStored as error:
            raise _not_found(error) from error
        except StoreFailed as error:
            raise _unusable(error) from error
        return web.json_response({"id": id, "object": "response", "deleted": True})

    async def input_items(self, request: web.Request) -> web.Response:
        """GET /v1/responses/{id}/input_items: what this response's own request has brought."""
        _refuse_query(request, known=("after", "limit", "order"))
        items = (await self._stored(request)).input
        return web.json_response(_listed(items, request))

    # ------------------------------------------------------------ what is kept

    async def _stored(self, request: web.Request) -> StoredResponse:
        try:
            return await self._store.get(request.match_info["id"], self._owner(request))
        except NotStored as error:
            raise _not_found(error) from error
        except StoreFailed as error:
            raise _unusable(error) from error

    async def _earlier(self, body: ResponsesBody, owner: str) -> list[InputItem]:
        """The conversation that this request goes on from. Raises ApiError."""
        if body.previous_response_id is None:
            return []
        param = "previous_response_id"
        try:
            chain = await self._store.chain(body.previous_response_id, owner)
        except NotStored as error:
            text = f"Previous response with id '{error.id}' not found."
            raise bad_request(text, param, "previous_response_not_found") from error
        except ChainTooLong as error:
            raise bad_request("The conversation before this input is too long.", param) from error
        except StoreFailed as error:
            raise _unusable(error) from error
        return kept_items([item for one in chain for item in [*one.input, *one.response["output"]]])

    async def _keep(self, response: Json, body: ResponsesBody, owner: str) -> None:
        """The answer is worth more than its storing: a failure is logged and counted."""
        if body.store is False:
            return
        stored = StoredResponse(
            id=response["id"],
            owner=owner,
            previous=body.previous_response_id,
            response=response,
            input=told_items(body.input),
        )
        try:
            await self._store.put(stored)
        except StoreFailed as error:
            self._metrics.store_failures.inc()
            log.error("response %s is not stored: %s", stored.id, error)

    async def _fitted(self, chat: ChatBody) -> ChatBody:
        served = self._serving.served(chat.model)
        params = generation_params(chat, served.info, self._serving.limits)
        room = served.info.max_model_len - (chat.max_tokens or 1)
        return await fitted(chat, served.tokenizer, params.chat_options, room)


def _listed(items: list[Json], request: web.Request) -> Json:
    """A page of them. Raises ApiError."""
    query = request.query
    order = query.get("order", "desc")
    limit = query.get("limit", str(_LISTED))
    if order not in ("asc", "desc"):
        raise bad_request("Invalid value for `order`: `asc` or `desc`.", "order")
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:4]) <= MAX_LISTED):
        raise bad_request(f"Invalid value for `limit`: 1 to {MAX_LISTED}.", "limit")
    items = items if order == "asc" else items[::-1]
    if (after := query.get("after")) is not None:
        ids = [item["id"] for item in items]
        if after not in ids:
            raise bad_request("Invalid value for `after`: no such item.", "after")
        items = items[ids.index(after) + 1 :]
    page = items[: int(limit)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(page) < len(items),
    }


def _refuse_query(request: web.Request, known: tuple[str, ...]) -> None:
    for name in request.query:
        if name not in known:
            raise bad_request(
                f"Unrecognized request argument supplied: {name}", name, "unknown_parameter"
            )


def _not_found(error: NotStored) -> ApiError:
    return ApiError(404, f"Response with id '{error.id}' not found.", param="id")


def _unusable(error: StoreFailed) -> ApiError:
    log.error("the store of responses failed: %s", error)
    return server_error("Stored responses cannot be reached now.", "store_failed", 503)
