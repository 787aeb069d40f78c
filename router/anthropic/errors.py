"""Errors in Anthropic's shape: `{"type": "error", "error": {"type": …, "message": …}}`."""

from __future__ import annotations

import json
from typing import Any

from router.errors import ApiError

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def error_object(error: ApiError) -> dict[str, Any]:
    kind = _TYPES.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def error_bytes(error: ApiError, request_id: str) -> bytes:
    return json.dumps({**error_object(error), "request_id": request_id}).encode()
