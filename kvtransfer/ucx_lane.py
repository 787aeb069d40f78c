"""Units over UCX: tagged messages, received in place, between two processes that both consent.

    prefill                      decode
      │ connect ────────────────▶ │ an endpoint and a random key for it: a lane
      │ ◀──────────────── welcome │ [magic | key]
      │ [header] ───────────────▶ │ tag = key, 0
      │ [payload] ──────────────▶ │ tag = key, 1: found by a probe, then the sink is asked,
      │                           │ then received into its block, or into nothing

The key is the receiver's, random per lane, and says which endpoint a message came over; messages
of one lane arrive in order. No receive is ever posted ahead of its message. One that is posted
cannot be revoked: its block is let go of when it completes, and closing the endpoint forces that.

Payloads are host memory. CUDA memory needs a `BlockMemory` and a `Landing` that give out arrays
with `__cuda_array_interface__` instead of memoryviews, and a UCX built for it; nothing here reads
or copies the bytes.
"""

from __future__ import annotations

import ipaddress
from contextlib import suppress

from wire.errors import ConfigError

NAME = "ucx"
WELCOME_TAG = 0  # on the sender's own worker of the lane
MAGIC = b"baton/1\n"
WELCOME_BYTES = 16
POSTED_BYTES = 4 << 20  # per lane, given to UCX at a time; bounds how long one turn takes
LAST_TURNS_S = 1.0  # how long `close` waits for UCX to let go of the pool's memory


def header_tag(key: int) -> int:
    """The tag of the headers of a lane."""
    return key << 1


def payload_tag(key: int) -> int:
    """The tag of the payloads of a lane."""
    return key << 1 | 1


def url_of(host: str, port: int) -> str:
    """`ucx://host:port`. Raises ValueError: the host is not numeric."""
    address = ipaddress.ip_address(host)
    return f"ucx://[{host}]:{port}" if address.version == 6 else f"ucx://{host}:{port}"


def parse(url: str) -> tuple[str, int]:
    """Host and port of `ucx://host:port`; the host is numeric, because looking it up would block.

    Raises:
        ConfigError: it is no such address.
    """
    scheme, _, rest = url.partition("://")
    host, _, port = rest.rpartition(":")
    with suppress(ValueError):
        if scheme == NAME and 0 < int(port) <= 0xFFFF:
            return str(ipaddress.ip_address(host.strip("[]"))), int(port)
    raise ConfigError(f"{url!r} is not ucx://<numeric address>:<port>")
