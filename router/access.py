"""What stands between the network and the routes: request ids, CORS, API keys, rate limits."""

from __future__ import annotations

import hashlib
import string
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from router.access_config import AccessConfig
from router.api_keys import load_api_keys, presented_key
from router.console.pages import is_console
from router.errors import ApiError
from router.place import Place
from router.rate_limit import Denial, KeyLimiter, RateLimits
from router.shared_limits import SharedAccounts, SharedLimiter

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

# What probes and scrapers ask, who have no key. They tell nothing about requests.
OPEN_PATHS = frozenset({"/health", "/ready", "/ping", "/metrics"})
_MAX_REQUEST_ID = 128
_ID_CHARS = frozenset(string.ascii_letters + string.digits + "-_.:/+=@")
_ID = web.RequestKey("request_id", str)
_LIMITER = web.RequestKey("limiter", KeyLimiter)


class Access:
    """Middleware and the headers that belong to it. Raises ConfigError for keys it cannot read.

    Without API keys all clients together are one, to whom the limits apply. They hold for all
    workers together, where `place` says that there are several.
    """

    def __init__(
        self,
        config: AccessConfig,
        clock: Callable[[], float] = time.monotonic,
        place: Place | None = None,
    ) -> None:
        self._config = config
        self._clock = clock
        self._keys = load_api_keys(config.api_keys, config.api_key_file)
        self._limiters = _limiters(config.limits, max(1, len(self._keys)), place)

    def install(self, app: web.Application) -> None:
        app.on_response_prepare.append(self._add_headers)

    def middleware(self) -> Any:
        @web.middleware
        async def access(request: web.Request, handler: Handler) -> web.StreamResponse:
            if self._is_preflight(request):
                return self._preflight(request)
            limiter = self._limiters[self._who(request)]
            if not self._is_limited(request):
                return await handler(request)
            request[_LIMITER] = limiter
            if (denial := limiter.enter(self._clock())) is not None:
                raise _rate_limited(denial)
            try:
                return await handler(request)
            finally:
                limiter.leave()

        return access

    def charge(self, request: web.Request, num_tokens: int) -> None:
        """The request has used so many tokens."""
        if _LIMITER in request:
            request[_LIMITER].charge(num_tokens, self._clock())

    def owner(self, request: web.Request) -> str:
        """Whose a stored response is: the key's hash, which does not hang on the keys' order."""
        key = presented_key(request.headers) if len(self._keys) else None
        return "" if key is None else hashlib.sha256(key.encode()).hexdigest()

    def _who(self, request: web.Request) -> int:
        """The number of the client's key. Raises ApiError."""
        if not len(self._keys) or request.path in OPEN_PATHS or is_console(request.path):
            return 0
        key = presented_key(request.headers)
        if key is None:
            raise _unauthorized(
                "No API key was given. Send it in the header `Authorization: Bearer KEY`."
            )
        number = self._keys.find(key)
        if number is None:
            raise _unauthorized("Incorrect API key provided.")
        return number

    def _is_limited(self, request: web.Request) -> bool:
        """What only looks is free."""
        works = request.method == "POST" and request.path not in OPEN_PATHS
        return works and self._config.limits.any

    def _is_preflight(self, request: web.Request) -> bool:
        return (
            request.method == "OPTIONS"
            and bool(self._config.cors.allowed_origins)
            and "Origin" in request.headers
            and "Access-Control-Request-Method" in request.headers
        )

    def _preflight(self, request: web.Request) -> web.Response:
        """Browsers send no key with it; `_add_headers` says which origin may."""
        if not self._config.cors.allows(request.headers["Origin"]):
            raise ApiError(400, "This origin is not allowed.")
        return web.Response(status=204, headers=self._config.cors.preflight(request.headers))

    async def _add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        for name in ("x-request-id", "request-id"):  # OpenAI's clients look for one, Anthropic's
            response.headers[name] = request_id(request)
        response.headers.update(self._config.cors.headers(request.headers.get("Origin")))
        if _LIMITER in request:
            response.headers.update(request[_LIMITER].headers(self._clock()))


def _limiters(limits: RateLimits, number: int, place: Place | None) -> list[KeyLimiter]:
    if place is None or not limits.any:
        return [KeyLimiter(limits) for _ in range(number)]
    accounts = SharedAccounts(place, number)
    return [SharedLimiter(limits, accounts, key) for key in range(number)]


def request_id(request: web.Request) -> str:
    """The client's `x-request-id` if it is short and plain, else a new one: for answers and logs.

    It is no identity: within the fleet a request has an id that no client can choose.
    """
    if _ID not in request:
        given = request.headers.get("x-request-id", "")
        good = 0 < len(given) <= _MAX_REQUEST_ID and _ID_CHARS.issuperset(given)
        request[_ID] = given if good else uuid.uuid4().hex
    return request[_ID]


def _unauthorized(message: str) -> ApiError:
    return ApiError(
        401, message, code="invalid_api_key", more_headers={"WWW-Authenticate": "Bearer"}
    )


def _rate_limited(denial: Denial) -> ApiError:
    return ApiError(
        429,
        f"Rate limit reached: this API key may use {denial.what}. Please retry later.",
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        retry_after_s=denial.retry_after_s,
    )
