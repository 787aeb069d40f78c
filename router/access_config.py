"""The router's flags about who may use it, and how much."""

from __future__ import annotations

import argparse
import json
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from router.cors import Cors
from router.rate_limit import RateLimits
from wire.errors import ConfigError


@dataclass(frozen=True, slots=True)
class AccessConfig:
    """API keys, limits per key, TLS and CORS; nothing of it by default."""

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    api_key_file: Path | None = None
    limits: RateLimits = field(default_factory=RateLimits)
    cors: Cors = field(default_factory=Cors)
    ssl_certfile: Path | None = None
    ssl_keyfile: Path | None = None

    def __post_init__(self) -> None:
        limits = self.limits
        for name, value in (
            ("--requests-per-minute", limits.requests_per_minute),
            ("--tokens-per-minute", limits.tokens_per_minute),
            ("--max-concurrency-per-key", limits.max_concurrency),
        ):
            if value < 0:
                raise ConfigError(f"{name} must not be negative")
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ConfigError("--ssl-keyfile needs --ssl-certfile")

    @property
    def has_keys(self) -> bool:
        return bool(self.api_keys) or self.api_key_file is not None

    def ssl_context(self) -> ssl.SSLContext | None:
        """None without a certificate. Raises ConfigError if it cannot be used."""
        if self.ssl_certfile is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.ssl_certfile, self.ssl_keyfile, password=_no_password)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cannot use the certificate {self.ssl_certfile} with the key "
                f"{self.ssl_keyfile or self.ssl_certfile}: {error}"
            ) from error
        return context


def _no_password() -> str:
    raise ValueError("the key has a password; store it without")


def add_access_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("access")
    group.add_argument(
        "--api-key",
        action="append",
        metavar="KEY",
        help="clients must send this key (or another one: repeatable); covers every route but "
        "/health, /ready, /ping and /metrics. Other users of this machine see command lines: "
        "prefer --api-key-file",
    )
    group.add_argument(
        "--api-key-file",
        type=Path,
        metavar="PATH",
        help="file of API keys, one per line; lines that begin with # are comments",
    )
    for flag, text in (
        ("--requests-per-minute", "requests that each API key may begin per minute"),
        ("--tokens-per-minute", "tokens, prompt and output, that each API key may use per minute"),
        ("--max-concurrency-per-key", "requests of each API key at the same time"),
    ):
        group.add_argument(
            flag,
            type=int,
            default=0,
            metavar="N",
            help=f"{text}; beyond it 429 (0: no limit)",
        )
    group.add_argument("--ssl-certfile", type=Path, metavar="PATH", help="serve HTTPS with this")
    group.add_argument(
        "--ssl-keyfile", type=Path, metavar="PATH", help="its private key (in the same file)"
    )
    for flag, what, default in (
        ("--allowed-origins", "origins whose pages may use the API", "[]"),
        ("--allowed-methods", "methods that they may use", '["*"]'),
        ("--allowed-headers", "headers that they may send", '["*"]'),
    ):
        group.add_argument(
            flag,
            default=default,
            metavar="JSON",
            help=f"CORS: {what}, as a JSON list (default: {default})",
        )
    group.add_argument(
        "--allow-credentials", action="store_true", help="CORS: let them send cookies too"
    )


def access_from_args(args: argparse.Namespace) -> AccessConfig:
    """Raises ConfigError."""
    return AccessConfig(
        api_keys=tuple(args.api_key or ()),
        api_key_file=args.api_key_file,
        limits=RateLimits(
            args.requests_per_minute, args.tokens_per_minute, args.max_concurrency_per_key
        ),
        cors=Cors(
            _json_list("--allowed-origins", args.allowed_origins),
            _json_list("--allowed-methods", args.allowed_methods),
            _json_list("--allowed-headers", args.allowed_headers),
            args.allow_credentials,
        ),
        ssl_certfile=args.ssl_certfile,
        ssl_keyfile=args.ssl_keyfile,
    )


def _json_list(flag: str, text: str) -> tuple[str, ...]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise ConfigError(f"{flag} must be a JSON list of texts like '[\"https://example.org\"]'")
    if not all(item.isascii() and item.isprintable() for item in found):
        raise ConfigError(f"{flag} must be printable ASCII")
    return tuple(found)
