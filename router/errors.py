"""Errors that a client sees, in the shape of OpenAI's API.

    {"error": {"message": …, "type": …, "param": …, "code": …}}

Texts are bounded: an error never echoes a client's input back at length.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

MAX_MESSAGE_CHARS = 500


class ApiError(Exception):
    """A request that ends without a result: HTTP status and OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        more_headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = shorten(message)
        self.kind = kind
        self.param = None if param is None else shorten(param, 100)
        self.code = code
        self.retry_after_s = retry_after_s
        self.more_headers = dict(more_headers or {})

    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def body_bytes(self) -> bytes:
        return json.dumps(self.body()).encode()

    def headers(self) -> dict[str, str]:
        if self.retry_after_s is None:
            return self.more_headers
        return {**self.more_headers, "Retry-After": str(max(1, math.ceil(self.retry_after_s)))}


def shorten(text: str, limit: int = MAX_MESSAGE_CHARS) -> str:
    """`text`, cut to `limit` characters, with what JSON in UTF-8 cannot carry replaced."""
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return text.encode("utf-8", "replace").decode()


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the client asked for something that is not valid here."""
    return ApiError(400, message, param=param, code=code)


def context_too_long(max_model_len: int, num_prompt: int, num_output: int, param: str) -> ApiError:
    """400, in the words that clients of OpenAI and vLLM match."""
    if num_output:
        asked = (
            f"you requested {num_prompt + num_output} tokens "
            f"({num_prompt} in the prompt, {num_output} for the completion)"
        )
    else:
        asked = f"your prompt has {num_prompt} tokens, and at least one is needed for the output"
    return bad_request(
        f"This model's maximum context length is {max_model_len} tokens. However, {asked}. "
        "Please reduce the length of the prompt or the completion.",
        param=param,
        code="context_length_exceeded",
    )


def model_not_found(name: str) -> ApiError:
    """404 for a model that is not served here."""
    return ApiError(
        404,
        f"The model `{shorten(name, 100)}` does not exist.",
        param="model",
        code="model_not_found",
    )


def queue_full(retry_after_s: float) -> ApiError:
    """429: the router's own queue has no place left."""
    return ApiError(
        429,
        "Too many requests are waiting. Please retry later.",
        kind="rate_limit_error",
        code="queue_full",
        retry_after_s=retry_after_s,
    )


def unavailable(message: str, code: str, retry_after_s: float = 1.0) -> ApiError:
    """503: nothing can serve this now, later it may."""
    return ApiError(
        503, message, kind="service_unavailable", code=code, retry_after_s=retry_after_s
    )


def server_error(message: str, code: str, status: int = 500) -> ApiError:
    """5xx: the request was fine and could not be served."""
    return ApiError(status, message, kind="server_error", code=code)
