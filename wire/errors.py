"""Errors that cross package borders.

BatonError
├── ConfigError            the operator asked for something impossible; the text says what to do
│   └── UnsupportedModelError   the model cannot be served here; names the architecture and why
├── WireError
│   ├── MalformedMessage   bytes from the network that no message type accepts
│   ├── VersionMismatch    the peer speaks another protocol version
│   └── OutboxFull         the peer does not read; nothing was queued
├── TransferError          KV bytes did not arrive as sealed; `cause` is the metric's label
└── CapacityError          no room for a request now; nothing was taken
"""

from __future__ import annotations


class BatonError(Exception):
    """Base of every error that Baton raises on purpose."""


class ConfigError(BatonError):
    """The operator asked for something impossible; the message says what to do."""


class UnsupportedModelError(ConfigError):
    """The model cannot be served; the message names the architecture and the reason."""


class WireError(BatonError):
    """Something went wrong between two processes."""


class MalformedMessage(WireError):
    """Bytes from the network that no message type accepts."""


class VersionMismatch(WireError):
    """The peer speaks another protocol version."""


class OutboxFull(WireError):
    """The peer does not read its messages; this one was not queued."""


class TransferError(BatonError):
    """KV bytes did not arrive as they were sealed."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


class CapacityError(BatonError):
    """There is no room for a request now; nothing was taken."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
