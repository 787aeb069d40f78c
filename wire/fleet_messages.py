"""Messages about nodes: who registers, lives, drains, switches its role and ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from wire.layout import KVLayout
from wire.types import (
    U64,
    Count,
    Digest,
    Flag,
    Name,
    NodeId,
    NodeLoad,
    Port,
    Role,
    Seconds,
    Text,
    TokenIds,
    TransportAddress,
)

MAX_WORKERS = 64  # routers on one HTTP port


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the router must know of the model that a node serves."""

    name: Name
    fingerprint: Name  # of config and weights; nodes of one fleet must agree
    numerics: Text  # equal strings compute bit-equal results
    max_model_len: Count
    vocab_size: Count
    eos_token_ids: TokenIds


@dataclass(frozen=True, slots=True)
class Register:
    """node → router: first message of an incarnation."""

    role: Role
    model: ModelInfo
    layout: KVLayout
    num_blocks: Count
    peer_url: Name  # where other nodes reach this one
    transports: Annotated[tuple[TransportAddress, ...], Field(max_length=16, fail_fast=True)]
    http_url: Name
    speculation: Text = ""  # who drafts and how much, for people: no node is refused for it
    num_seats: Count = 0  # requests that a step decodes at most; 0: not told


@dataclass(frozen=True, slots=True)
class Welcome:
    """router → node: registered; send heartbeats at this interval.

    `control_ports`: of all routers that share an HTTP port with this one, itself included, on the
    host where the node found it; the node connects to each. Empty: it is alone.
    """

    heartbeat_s: Seconds
    control_ports: Annotated[tuple[Port, ...], Field(max_length=MAX_WORKERS)] = ()


@dataclass(frozen=True, slots=True)
class Unwelcome:
    """router → node: not registered, and why; the node ends with this text."""

    reason: Text


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """node → router, at the agreed interval and off the step loop."""

    load: NodeLoad


@dataclass(frozen=True, slots=True)
class RouterHeartbeat:
    """router → node: without it a node drops this router's requests."""


@dataclass(frozen=True, slots=True)
class Draining:
    """node → router: finish what is here, send nothing new."""


@dataclass(frozen=True, slots=True)
class Goodbye:
    """node → router: this incarnation ends now."""


@dataclass(frozen=True, slots=True)
class Gone:
    """Answer to a message that was meant for another incarnation of the receiver."""

    meant_for: NodeId


@dataclass(frozen=True, slots=True)
class FetchTokenizer:
    """router → node: send me the model's tokenizer."""


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """node → router: the tokenizer's files as they lie in the model's folder."""

    tokenizer_json: Annotated[bytes, Field(strict=True, max_length=64 << 20)]
    tokenizer_config_json: Annotated[bytes, Field(strict=True, max_length=8 << 20)]
    chat_template: Annotated[bytes, Field(strict=True, max_length=1 << 20)] = b""


@dataclass(frozen=True, slots=True)
class CacheEvents:
    """node → router: prefix blocks that became findable or were evicted.

    `number` grows by one per message; a gap makes the router ask for a snapshot.
    """

    number: U64
    added: Annotated[tuple[Digest, ...], Field(max_length=1 << 20, fail_fast=True)] = ()
    removed: Annotated[tuple[Digest, ...], Field(max_length=1 << 20, fail_fast=True)] = ()
    snapshot: Flag = False  # `added` is the whole content


@dataclass(frozen=True, slots=True)
class FetchCacheSnapshot:
    """router → node: events were lost; send the whole content."""


@dataclass(frozen=True, slots=True)
class SwitchRole:
    """router → node: serve as `role` from now on; what runs may finish for `drain_s` seconds.

    The node drains, and registers with the other role as a new incarnation.
    """

    role: Role
    drain_s: Seconds


@dataclass(frozen=True, slots=True)
class SwitchRefused:
    """node → router: this node stays what it is."""

    reason: Text
