"""Messages to bytes and back: msgpack, with version, tag, sender and receiver in front.

    [version, tag, sender, its incarnation, receiver | nil, its incarnation, {field: value}]

Decoding trusts nothing: msgpack's own limits bound the work, the tag table picks the type, and the
type's annotations check every field.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import msgpack
from pydantic import TypeAdapter, ValidationError

from wire.errors import MalformedMessage, VersionMismatch
from wire.messages import PROTOCOL_VERSION, TAGS, Message
from wire.types import NodeId

MAX_MESSAGE_BYTES = 128 << 20
_MAX_ITEMS = 1 << 20  # of one array, as in the annotations; msgpack allocates before it reads
_MAX_ENTRIES = 8192  # of one map; the largest is a logit_bias
_TAG_OF = {message: tag for tag, message in TAGS.items()}
_ADAPTERS: dict[type[Any], TypeAdapter[Any]] = {
    kind: TypeAdapter(kind) for kind in (NodeId, *TAGS.values())
}


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message with the life of the node that sent it and of the one it is meant for."""

    sender: NodeId
    receiver: NodeId | None  # None: whoever listens there (only a first message)
    message: Message


def encode(envelope: Envelope) -> bytes:
    """Bytes of one message."""
    receiver = envelope.receiver
    head = [
        PROTOCOL_VERSION,
        _TAG_OF[type(envelope.message)],
        envelope.sender.name,
        envelope.sender.incarnation,
        receiver.name if receiver else None,
        receiver.incarnation if receiver else 0,
        envelope.message,
    ]
    return cast(bytes, msgpack.packb(head, default=_as_dict))


def decode(data: bytes | memoryview) -> Envelope:
    """The message in `data`.

    Raises:
        MalformedMessage: not a message of this protocol; the text says where it differs.
        VersionMismatch: a message of another version of it.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise MalformedMessage(f"{len(data)} bytes, more than {MAX_MESSAGE_BYTES}")
    try:
        parts = msgpack.unpackb(
            data,
            strict_map_key=False,  # logit_bias has integer keys
            max_array_len=_MAX_ITEMS,
            max_map_len=_MAX_ENTRIES,
            max_ext_len=0,
        )
    except (ValueError, TypeError, MemoryError, msgpack.UnpackException) as error:
        raise MalformedMessage(f"not msgpack: {error}") from error
    if not isinstance(parts, list) or len(parts) != 7:
        raise MalformedMessage("not an envelope of seven parts")
    version, tag, sender_name, sender_life, receiver_name, receiver_life, body = parts
    if type(version) is not int or type(tag) is not int or not isinstance(body, dict):
        raise MalformedMessage("version, tag or body of another type")
    if version != PROTOCOL_VERSION:
        raise VersionMismatch(f"peer speaks version {version}, this node {PROTOCOL_VERSION}")
    kind = TAGS.get(tag)
    if kind is None:
        raise MalformedMessage(f"unknown tag {tag}")
    try:
        sender = _validate(NodeId, {"name": sender_name, "incarnation": sender_life})
        receiver = (
            None
            if receiver_name is None
            else _validate(NodeId, {"name": receiver_name, "incarnation": receiver_life})
        )
        return Envelope(sender, receiver, _validate(kind, body))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:200]  # has the peer's own words
        raise MalformedMessage(f"{kind.__name__}.{where}: {first['msg']}") from error


def _validate(kind: type[Any], body: dict[str, Any]) -> Any:
    return _ADAPTERS[kind].validate_python(body)


def _as_dict(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}
