"""Routes, and the shape of every error that leaves the router."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from importlib import metadata
from typing import Any

from aiohttp import web

from router.access import Access, request_id
from router.admin import AdminPages
from router.anthropic.errors import error_bytes
from router.anthropic.pages import PREFIX, AnthropicPages
from router.console.pages import ConsolePages
from router.control import Control
from router.debug_pages import DebugPages
from router.embeddings import EmbeddingPages
from router.errors import ApiError, model_not_found, server_error
from router.fleet_page import FleetPage
from router.judge import Judge
from router.metrics import RouterMetrics
from router.openapi import openapi_page
from router.responses.pages import ResponsePages
from router.responses.store import ResponseStore
from router.serving import Serving
from router.tokenize import TokenizePages
from router.worker_sites import WorkerSites
from wire.types import Role

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_HTTP_ERRORS = {
    404: "There is no such route.",
    405: "The route does not take this method.",
    413: "The body is too large.",
}


def make_app(
    serving: Serving,
    control: Control,
    judge: Judge,
    metrics: RouterMetrics,
    access: Access,
    max_body_bytes: int,
    store: ResponseStore,
    debug: DebugPages | None = None,
    worker: WorkerSites | None = None,
    console: bool = True,
) -> web.Application:
    """The router's HTTP application; with `debug`, its debug routes too.

    One of several workers tells with `worker` what all of them have done.
    """
    pages = _Pages(serving, control, metrics)
    tokens = TokenizePages(serving)
    embeddings = EmbeddingPages(serving)
    app = web.Application(
        client_max_size=max_body_bytes, middlewares=[_errors(metrics), access.middleware()]
    )
    access.install(app)
    routes: list[web.RouteDef] = [
        web.post("/v1/completions", serving.completions),
        web.post("/v1/chat/completions", serving.chat),
        web.post("/v1/embeddings", embeddings.embeddings),
        *ResponsePages(serving, store, metrics, access.owner).routes(),
        *AnthropicPages(serving).routes(),
        web.post("/tokenize", tokens.tokenize),
        web.post("/detokenize", tokens.detokenize),
        web.get("/v1/models", pages.models),
        web.get("/v1/models/{name:.+}", pages.model),
        web.get("/openapi.json", openapi_page(_version())),
        web.get("/health", pages.health),
        web.get("/ready", pages.ready),
        web.get("/version", pages.version),
        web.get("/ping", pages.ping),
        web.post("/ping", pages.ping),
        *(_own_routes(pages, debug) if worker is None else worker.routes(debug is not None)),
        *([] if debug is None else FleetPage(control, judge).routes()),
        *([] if debug is None else AdminPages(serving, control).routes()),
        *(ConsolePages().routes() if console else []),
    ]
    for route in routes:
        route.kwargs["expect_handler"] = _expect
    app.add_routes(routes)
    return app


def make_private_app(
    serving: Serving, control: Control, metrics: RouterMetrics, debug: DebugPages | None
) -> web.Application:
    """What one worker has to tell about itself alone."""
    app = web.Application(middlewares=[_plain_errors])
    app.add_routes(_own_routes(_Pages(serving, control, metrics), debug))
    return app


def _own_routes(pages: _Pages, debug: DebugPages | None) -> list[web.RouteDef]:
    return [
        web.get("/metrics", pages.metrics),
        web.get("/load", pages.load),
        *([] if debug is None else debug.routes()),
    ]


class _Pages:
    """Everything that is not generation."""

    def __init__(self, serving: Serving, control: Control, metrics: RouterMetrics) -> None:
        self._serving = serving
        self._control = control
        self._metrics = metrics

    async def health(self, request: web.Request) -> web.Response:
        """The process lives."""
        return web.json_response({"status": "ok"})

    async def ping(self, request: web.Request) -> web.Response:
        """The same, as SageMaker and vLLM's users ask it."""
        return web.Response()

    async def version(self, request: web.Request) -> web.Response:
        return web.json_response({"version": _version()})

    async def load(self, request: web.Request) -> web.Response:
        """Requests that are being answered, in vLLM's shape."""
        return web.json_response({"server_load": self._serving.num_requests})

    async def ready(self, request: web.Request) -> web.Response:
        """A request could be served now."""
        ready = self._control.ready and not self._serving.closing
        body = {
            "ready": ready,
            "prefill_nodes": self._control.fleet.num_serving(Role.PREFILL),
            "decode_nodes": self._control.fleet.num_serving(Role.DECODE),
            "mixed_nodes": self._control.fleet.num_serving(Role.MIXED),
            "tokenizer": self._control.tokenizer is not None,
        }
        return web.json_response(body, status=200 if ready else 503)

    async def models(self, request: web.Request) -> web.Response:
        data = [self._describe(name) for name in self._serving.model_names]
        return web.json_response({"object": "list", "data": data})

    async def model(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in self._serving.model_names:
            raise model_not_found(name)
        return web.json_response(self._describe(name))

    def _describe(self, name: str) -> dict[str, Any]:
        model = self._control.fleet.model
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "baton",
            "max_model_len": None if model is None else model.max_model_len,
        }

    async def metrics(self, request: web.Request) -> web.Response:
        self._measure()
        return web.Response(
            body=self._metrics.exposition(),
            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"},
        )

    def _measure(self) -> None:
        """Bring gauges up to date."""
        requests, fleet = self._control.requests, self._control.fleet
        if fleet.model is not None:
            model = self._metrics.for_model(fleet.model.name)
            model.waiting.set(requests.num_waiting)
            model.running.set(len(requests) - requests.num_waiting)
            model.kv_usage.set(fleet.kv_usage)
        for role in Role:
            known = [node for node in fleet if node.info.role is role]
            serving = sum(node.serves for node in known)
            self._metrics.nodes.labels(role.value, "serving").set(serving)
            self._metrics.nodes.labels(role.value, "not_serving").set(len(known) - serving)
        self._metrics.open_pairs.set(fleet.breaker.num_open)
        self._metrics.malformed.set(self._control.num_malformed)
        self._metrics.refused.set(self._control.num_refused)


async def _expect(request: web.Request) -> None:
    """What is expected beside `100-continue` is passed over.

    aiohttp's own answer has not the shape of our errors, and breaks where the header is no text.
    """
    if request.headers["Expect"].lower() == "100-continue" and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


def _version() -> str:
    try:
        return metadata.version("baton-serve")
    except metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"


def _errors(metrics: RouterMetrics) -> Any:
    """Middleware: every error in its dialect's shape, every answer counted."""

    @web.middleware
    async def errors(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            response = await handler(request)
        except asyncio.CancelledError:
            metrics.disconnects.inc()
            raise
        except ApiError as error:
            response = _error_response(error, request)
        except web.HTTPException as error:
            response = _http_error_response(error, request)
        except (ConnectionError, asyncio.IncompleteReadError):
            metrics.disconnects.inc()
            return _to_nobody(request)
        except Exception:
            log.exception("%s %s %s failed", request.method, request.path, request_id(request))
            internal = server_error("Internal error.", "internal_error")
            response = _error_response(internal, request)
        metrics.answered(_route(request), request.method, response.status)
        return response

    return errors


@web.middleware
async def _plain_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors in OpenAI's shape, which nobody counts."""
    try:
        return await handler(request)
    except ApiError as error:
        return _error_response(error, request)


def _to_nobody(request: web.Request) -> web.Response:
    """For a client that has left: an exception would be a traceback in the log for each of them."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=499)


def _error_response(error: ApiError, request: web.Request) -> web.Response:
    anthropic = request.path.startswith(PREFIX)
    return web.Response(
        status=error.status,
        body=error_bytes(error, request_id(request)) if anthropic else error.body_bytes(),
        content_type="application/json",
        headers=error.headers(),
    )


def _http_error_response(error: web.HTTPException, request: web.Request) -> web.Response:
    message = _HTTP_ERRORS.get(error.status, error.reason)
    response = _error_response(ApiError(error.status, message), request)
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


def _route(request: web.Request) -> str:
    resource = request.match_info.route.resource
    return "unknown" if resource is None else resource.canonical
