"""Units over UCX: tagged messages, received in place, between two processes that both consent.

    prefill                      decode
      │ [hello] ────────────────▶ │ door, tag 0: [magic | pass | the way back | greeting]
      │                           │ the pass is right: a worker for this lane, and a random key
      │ ◀──────────────── welcome │ [magic | pass | key | the lane's worker]
      │ [headers] ──────────────▶ │ lane, tag = key, 0: of one or several payloads
      │ [payload] ──────────────▶ │ lane, tag = key, 1: each found by a probe, then the sink is
      │ [payload] ──────────────▶ │ asked, then received into its block, or into nothing

A payload is a unit, or several that lie one behind the other in one block at both ends: its header
is the first one's, and says how many they are. A message costs both ends about 40 µs, whatever its
size.

The greeting is an envelope: it says who speaks to whom, and in which version of the protocol.

Nobody listens with a UCX listener, which would take every address of the host: the two exchange the
addresses of their workers, and a worker is reached only by the devices that it was given. The pass
is in the receiver's URL, which only its fleet knows. Without it no byte of a hello reaches UCX's
reader of addresses, which ends the process where they are malformed.

Each lane has a worker at either end. Its end is the only thing that a peer notices at once: the
closing of an endpoint is not told to the other side. The messages of one lane arrive in order.

No receive is ever posted ahead of its message. One that is posted cannot be revoked: its block is
let go of when it completes, and closing the endpoint forces that. (A send that is ended so keeps
its worker alive, in ucxx 0.52. Then the other side notices by `stall_s`.)

Payloads are host memory. CUDA memory needs a `BlockMemory` and a `Landing` that give out arrays
with `__cuda_array_interface__` instead of memoryviews, and a UCX built for it; nothing here reads
or copies the bytes.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Sequence
from contextlib import suppress

from kvtransfer.unit_header import UNIT, pack, unpack
from wire.codec import Envelope, decode, encode
from wire.errors import ConfigError, MalformedMessage
from wire.handoff_messages import RenewLeases, UnitHeader
from wire.types import NodeId

NAME = "ucx"
HELLO_TAG = 0  # on the receiver's worker
WELCOME_TAG = 0  # on the sender's own worker of the lane
MAGIC = b"baton/3\n"
PASS_BYTES = 16
KEY_BYTES = 8
MAX_HELLO_BYTES = 8192
MAX_HEADERS = 64  # in one message: not more than UCX carries in one piece
MAX_JOINED = 64  # units in one payload
JOINED_BYTES = 1 << 20  # units are joined up to this; beyond, a message's own cost is nothing
POSTED_BYTES = 4 << 20  # per lane, given to UCX at a time; bounds how long one turn takes
LAST_TURNS_S = 1.0  # how long `close` waits for UCX to let go of the pool's memory
_CHECK_BYTES = 8


def header_tag(key: int) -> int:
    """The tag of the headers of a lane."""
    return key << 1


def payload_tag(key: int) -> int:
    """The tag of the payloads of a lane."""
    return key << 1 | 1


def url_of(worker_address: bytes, password: bytes) -> str:
    """`ucx://…`: how UCX reaches the receiver's worker, and the pass."""
    body = password + worker_address
    return f"{NAME}://{base64.urlsafe_b64encode(_check(body) + body).decode()}"


def parse(url: str) -> tuple[bytes, bytes]:
    """The worker's address and the pass in a URL.

    Raises:
        ConfigError: it is no such URL, or not whole: UCX must never see such an address.
    """
    scheme, _, text = url.partition("://")
    with suppress(ValueError):
        data = base64.b64decode(text.encode("ascii"), b"-_", validate=True)
        check, body = data[:_CHECK_BYTES], data[_CHECK_BYTES:]
        if scheme == NAME and len(body) > PASS_BYTES and check == _check(body):
            return body[PASS_BYTES:], body[:PASS_BYTES]
    raise ConfigError(f"{url!r} is not the address of a ucx transport")


def pack_hello(me: NodeId, to: NodeId, password: bytes, way_back: bytes) -> bytes:
    """The first message of a lane."""
    greeting = encode(Envelope(me, to, RenewLeases(())))
    return MAGIC + password + len(way_back).to_bytes(2, "little") + way_back + greeting


def unpack_hello(data: bytes, password: bytes) -> tuple[Envelope, bytes]:
    """The greeting and the way back.

    Raises:
        MalformedMessage, VersionMismatch: it is no hello of somebody who has the pass.
    """
    begin = len(MAGIC) + len(password)
    if not hmac.compare_digest(data[:begin], MAGIC + password):
        raise MalformedMessage("a hello without the pass")
    end = begin + 2 + int.from_bytes(data[begin : begin + 2], "little")
    return decode(data[end:]), data[begin + 2 : end]


def pack_headers(payloads: Sequence[tuple[UnitHeader, int]]) -> bytes:
    """The headers of the payloads that come next, in this order: each one's first, and how many."""
    return b"".join(pack(header, num_units) for header, num_units in payloads)


def unpack_headers(data: bytes) -> list[tuple[UnitHeader, int]]:
    """What `pack_headers` made. Raises MalformedMessage."""
    count, rest = divmod(len(data), UNIT.size)
    if rest or not 0 < count <= MAX_HEADERS:
        raise MalformedMessage(f"{len(data)} bytes are no headers")
    payloads = [unpack(data, index * UNIT.size) for index in range(count)]
    if not all(0 < num_units <= MAX_JOINED for _, num_units in payloads):
        raise MalformedMessage("a payload of no units, or of too many")
    return payloads


def _check(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_CHECK_BYTES).digest()
