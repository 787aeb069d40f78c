"""GET /openapi.json: an OpenAPI 3.1 description, made from the models that validate.

Requests are described by their own pydantic models, and by the tables of what is known and not
supported. Answers are written as dictionaries on the hot path, so their schemas stand here; a test
holds real answers against them.
"""

from __future__ import annotations

from typing import Any

from aiohttp import web
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from router.anthropic.body import NEUTRAL as NEUTRAL_MESSAGES
from router.anthropic.body import CountBody, MessagesBody
from router.api import NEUTRAL_COMPLETION, CompletionBody
from router.api_chat import NEUTRAL_CHAT, ChatBody
from router.api_embeddings import NEUTRAL_EMBEDDING, EmbeddingBody
from router.openapi_parts import (
    BLOCK,
    COUNT,
    EVENTS,
    FINISH,
    MAYBE_OBJECT,
    MAYBE_TEXT,
    OUTPUT_ITEM,
    TEXT,
    TOOL_CALL,
    Json,
    const,
    list_of,
    object_of,
)
from router.responses.body import NEUTRAL as NEUTRAL_RESPONSES
from router.responses.body import ResponsesBody
from router.responses.pages import MAX_LISTED
from router.tokenize import NEUTRAL_TOKENIZE, DetokenizeBody, TokenizeBody

_REF = "#/components/schemas/{model}"
_USER = [{"role": "user", "content": "Say hello."}]

# path, request model, its neutral parameters, answer, whether it streams, an example
_POSTS: tuple[tuple[str, type[BaseModel], Json, str, bool, Json], ...] = (
    (
        "/v1/completions",
        CompletionBody,
        NEUTRAL_COMPLETION,
        "Completion",
        True,
        {"prompt": "def f(", "max_tokens": 8},
    ),
    (
        "/v1/chat/completions",
        ChatBody,
        NEUTRAL_CHAT,
        "ChatCompletion",
        True,
        {"messages": _USER, "max_tokens": 8},
    ),
    (
        "/v1/responses",
        ResponsesBody,
        NEUTRAL_RESPONSES,
        "Response",
        True,
        {"input": "Say hello.", "max_output_tokens": 8},
    ),
    (
        "/v1/messages",
        MessagesBody,
        NEUTRAL_MESSAGES,
        "Message",
        True,
        {"max_tokens": 8, "messages": _USER},
    ),
    (
        "/v1/messages/count_tokens",
        CountBody,
        NEUTRAL_MESSAGES,
        "CountedTokens",
        False,
        {"messages": _USER},
    ),
    ("/v1/embeddings", EmbeddingBody, NEUTRAL_EMBEDDING, "Embeddings", False, {"input": "hello"}),
    ("/tokenize", TokenizeBody, NEUTRAL_TOKENIZE, "Tokenized", False, {"prompt": "hello"}),
    ("/detokenize", DetokenizeBody, {}, "Detokenized", False, {"tokens": [1, 2]}),
)
_GETS = (
    ("/v1/models", "The served model's names", "Models"),
    ("/v1/models/{model}", "One of them", "Model"),
    ("/version", "This server's version", "Version"),
    ("/load", "Requests that are being answered", "Load"),
    ("/health", "The process lives", "Health"),
)


def openapi_page(version: str) -> Any:
    """A handler; the description is made when it is asked for first."""
    made: list[Json] = []

    async def openapi(request: web.Request) -> web.Response:
        if not made:
            made.append(openapi_description(version))
        return web.json_response(made[0])

    return openapi


def openapi_description(version: str) -> Json:
    """All routes that clients use."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Baton",
            "version": version,
            "description": "OpenAI's API, with parameters as vLLM names them.",
        },
        "paths": _paths(),
        "components": {
            "schemas": {**_request_schemas(), **_ANSWERS, **EVENTS},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _paths() -> Json:
    paths: Json = {
        path: {"post": _post(path, model, answer, streams, example)}
        for path, model, _, answer, streams, example in _POSTS
    }
    paths |= {path: {"get": _get(path, text, answer)} for path, text, answer in _GETS}
    paths["/ready"] = {"get": _get("/ready", "A request could be served now", "Ready")}
    paths["/ready"]["get"]["responses"]["503"] = _answer("Ready")
    paths |= _stored_response_paths()
    plain = {"description": "OK"}
    paths["/ping"] = {
        method: {"summary": "The process lives", "responses": {"200": plain}}
        for method in ("get", "post")
    }
    text = {"text/plain": {"schema": {"type": "string"}}}
    metrics = {"200": {"description": "Prometheus' text format", "content": text}}
    paths["/metrics"] = {"get": {"summary": "Metrics", "responses": metrics}}
    return paths


def _post(path: str, model: type[BaseModel], answer: str, streams: bool, example: Json) -> Json:
    ok = _answer(answer)
    error = "AnthropicError" if path.startswith("/v1/messages") else "Error"
    if streams:
        event = f"{answer}Event"
        ok["content"]["text/event-stream"] = {
            "schema": {"type": "string", "description": f"Server-sent events; data: {event}."},
            "x-event": _ref(event),
        }
    body = {"schema": _ref(model.__name__), "examples": {"short": {"value": example}}}
    return {
        "summary": (model.__doc__ or "").strip(),
        "requestBody": {"required": True, "content": {"application/json": body}},
        "responses": {"200": ok, "default": _answer(error)},
    }


def _get(path: str, summary: str, answer: str) -> Json:
    operation: Json = {
        "summary": summary,
        "responses": {"200": _answer(answer), "default": _answer("Error")},
    }
    for name in ("model", "id"):
        if f"{{{name}}}" in path:
            operation["parameters"] = [_parameter(name, "path", {"type": "string", "minLength": 1})]
    return operation


def _parameter(name: str, place: str, schema: Json) -> Json:
    return {"name": name, "in": place, "required": place == "path", "schema": schema}


def _stored_response_paths() -> Json:
    path = "/v1/responses/{id}"
    items = f"{path}/input_items"
    listed = _get(items, "The input that a response answered", "InputItems")
    listed["parameters"] += [
        _parameter("order", "query", {"enum": ["asc", "desc"]}),
        _parameter("limit", "query", {"type": "integer", "minimum": 1, "maximum": MAX_LISTED}),
        _parameter("after", "query", {"type": "string"}),
    ]
    return {
        path: {
            "get": _get(path, "A response that was kept", "Response"),
            "delete": _get(path, "Forget it", "DeletedResponse"),
        },
        items: {"get": listed},
    }


def _answer(name: str) -> Json:
    return {"description": name, "content": {"application/json": {"schema": _ref(name)}}}


def _ref(name: str) -> Json:
    return {"$ref": _REF.format(model=name)}


def _request_schemas() -> Json:
    """Parameters that are known and not supported take only what asks for nothing."""
    _, made = models_json_schema(
        [(model, "validation") for _, model, *_ in _POSTS], ref_template=_REF
    )
    schemas: Json = made["$defs"]
    for _, model, neutral, *_ in _POSTS:
        for name, values in neutral.items():
            allowed = {"description": "Not supported.", "enum": [*values, None]}
            schemas[model.__name__]["properties"].setdefault(name, allowed)
    return schemas


# ---------------------------------------------------------------- answers


_USAGE = object_of(
    {"prompt_tokens_details": MAYBE_OBJECT},
    prompt_tokens=COUNT,
    completion_tokens=COUNT,
    total_tokens=COUNT,
)
_MODEL = object_of(
    id=TEXT,
    object=const("model"),
    created=COUNT,
    owned_by=TEXT,
    max_model_len={"type": ["integer", "null"]},
)


def _generated(kind: str, **choice: Json) -> Json:
    described = object_of(index=COUNT, logprobs=MAYBE_OBJECT, finish_reason=FINISH, **choice)
    return object_of(
        id=TEXT,
        object=const(kind),
        created=COUNT,
        model=TEXT,
        choices={**list_of(described), "minItems": 1},
        usage=_USAGE,
    )


_ANSWERS: Json = {
    "Error": object_of(
        error=object_of(
            message={"type": "string", "minLength": 1, "maxLength": 500},
            type=TEXT,
            param=MAYBE_TEXT,
            code=MAYBE_TEXT,
        )
    ),
    "Completion": _generated("text_completion", text=TEXT),
    "ChatCompletion": _generated(
        "chat.completion",
        message=object_of(
            {"reasoning_content": TEXT, "tool_calls": {**list_of(TOOL_CALL), "minItems": 1}},
            role=const("assistant"),
            content=MAYBE_TEXT,
        ),
    ),
    "Response": object_of(
        {"incomplete_details": MAYBE_OBJECT, "instructions": MAYBE_TEXT},
        id=TEXT,
        object=const("response"),
        created_at=COUNT,
        status={"enum": ["completed", "incomplete"]},
        model=TEXT,
        output={**list_of(OUTPUT_ITEM), "minItems": 1},
        usage=object_of(
            input_tokens=COUNT,
            input_tokens_details=object_of(cached_tokens=COUNT),
            output_tokens=COUNT,
            output_tokens_details=object_of(reasoning_tokens=COUNT),
            total_tokens=COUNT,
        ),
        error={"type": "null"},
        previous_response_id=MAYBE_TEXT,
        store={"type": "boolean"},
        tools=list_of({"type": "object"}),
        text={"type": "object"},
    ),
    "DeletedResponse": object_of(id=TEXT, object=const("response"), deleted={"const": True}),
    "InputItems": object_of(
        object=const("list"),
        data=list_of(object_of(id=TEXT, type=TEXT)),
        first_id=MAYBE_TEXT,
        last_id=MAYBE_TEXT,
        has_more={"type": "boolean"},
    ),
    "AnthropicError": object_of(
        type=const("error"), error=object_of(type=TEXT, message={"type": "string", "minLength": 1})
    ),
    "Message": object_of(
        id=TEXT,
        type=const("message"),
        role=const("assistant"),
        model=TEXT,
        content=list_of(BLOCK),
        stop_reason={"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
        stop_sequence=MAYBE_TEXT,
        usage=object_of(input_tokens=COUNT, output_tokens=COUNT, cache_read_input_tokens=COUNT),
    ),
    "CountedTokens": object_of(input_tokens=COUNT),
    "Embeddings": object_of(
        object=const("list"),
        model=TEXT,
        data=list_of(
            object_of(
                object=const("embedding"),
                index=COUNT,
                embedding={"oneOf": [TEXT, list_of({"type": "number"})]},
            )
        ),
        usage=object_of(prompt_tokens=COUNT, total_tokens=COUNT),
    ),
    "Tokenized": object_of(
        count=COUNT,
        max_model_len=COUNT,
        tokens=list_of(COUNT),
        token_strs={"type": ["array", "null"], "items": TEXT},
    ),
    "Detokenized": object_of(prompt=TEXT),
    "Models": object_of(object=const("list"), data=list_of(_MODEL)),
    "Model": _MODEL,
    "Version": object_of(version=TEXT),
    "Load": object_of(server_load=COUNT),
    "Health": object_of(status=const("ok")),
    "Ready": object_of(
        ready={"type": "boolean"},
        prefill_nodes=COUNT,
        decode_nodes=COUNT,
        tokenizer={"type": "boolean"},
    ),
}
