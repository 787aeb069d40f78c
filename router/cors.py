"""Cross-origin requests: what a browser's page of another origin may do (none, by default)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PREFLIGHT_MAX_AGE_S = 600
_EXPOSED = (
    "x-request-id, retry-after, server-timing, "
    "x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
    "x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)


@dataclass(frozen=True, slots=True)
class Cors:
    """What vLLM's flags of the same names say. Without an allowed origin nothing is answered."""

    allowed_origins: tuple[str, ...] = ()
    allowed_methods: tuple[str, ...] = ("*",)
    allowed_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False

    def allows(self, origin: str | None) -> bool:
        return origin is not None and (
            "*" in self.allowed_origins or origin in self.allowed_origins
        )

    def headers(self, origin: str | None) -> dict[str, str]:
        """For any answer to a page of `origin`."""
        if not self.allowed_origins:
            return {}
        if origin is None or not self.allows(origin):
            return {"Vary": "Origin"}
        any_origin = "*" in self.allowed_origins and not self.allow_credentials
        found = {
            "Access-Control-Allow-Origin": "*" if any_origin else origin,
            "Access-Control-Expose-Headers": _EXPOSED,
        }
        if not any_origin:
            found["Vary"] = "Origin"
        if self.allow_credentials:
            found["Access-Control-Allow-Credentials"] = "true"
        return found

    def preflight(self, asked: Mapping[str, str]) -> dict[str, str]:
        """What may follow; with a star, what was asked for (credentials forbid a literal one)."""
        method = asked.get("Access-Control-Request-Method", "")
        headers = asked.get("Access-Control-Request-Headers", "")
        found = {
            "Access-Control-Allow-Methods": _granted(self.allowed_methods, method),
            "Access-Control-Allow-Headers": _granted(self.allowed_headers, headers),
            "Access-Control-Max-Age": str(PREFLIGHT_MAX_AGE_S),
        }
        return {name: value for name, value in found.items() if value}


def _granted(allowed: tuple[str, ...], asked: str) -> str:
    return asked if "*" in allowed else ", ".join(allowed)
