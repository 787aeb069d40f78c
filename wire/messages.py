"""Every message that two processes exchange, with its tag.

    router  ── Reserve, Rebind ──▶ decode        router  ── Prefill(grant) ──▶ prefill
    decode  ── Granted ──────────▶ router        prefill ── units, Commit ───▶ decode
    router  ── Generate ─────────▶ decode        prefill, decode ── Tokens ──▶ router

`docs/protocol.md` tells the story; `TAGS` at the end is the table. A tag is never used twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypeAlias

from pydantic import Field

from wire.geometry import WHOLE_BLOCKS, Geometry
from wire.layout import KVLayout
from wire.logprobs import Logprobs
from wire.types import (
    MAX_BEAM_WIDTH,
    U64,
    AttemptId,
    BlockHandle,
    Count,
    Digest,
    FinishReason,
    Flag,
    Hypothesis,
    Name,
    NodeId,
    NodeLoad,
    Pooling,
    Port,
    Role,
    SamplingParams,
    Seconds,
    Secret,
    Text,
    TokenIds,
    TransportAddress,
)

PROTOCOL_VERSION = 2
MAX_WORKERS = 64  # routers on one HTTP port

# ---------------------------------------------------------------- registration and health


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


# ---------------------------------------------------------------- a request's life


@dataclass(frozen=True, slots=True)
class Reserve:
    """router → decode node: hold blocks for this attempt.

    `tokens` is the prompt followed by what earlier attempts have already produced;
    `num_prompt_tokens` stays the client's own prompt length.
    """

    id: AttemptId
    tokens: TokenIds
    num_prompt_tokens: Count
    sampling: SamplingParams
    prefill: NodeId  # the only node that may fill the blocks
    cache_salt: Text = ""
    deadline_s: Seconds = 600.0
    prefill_layout: KVLayout | None = None  # None: the same as the decode node's


@dataclass(frozen=True, slots=True)
class Rebind:
    """router → decode node: another prefill node shall fill what this lease holds; new grant.

    The attempt that has the lease ends here, whatever the answer: refused, it is gone.
    """

    id: AttemptId
    lease: U64  # of a lower attempt of the same request
    prefill: NodeId  # the only node that may fill the blocks from now on
    output_tokens: TokenIds  # all that the client has; they follow the prompt that was reserved
    deadline_s: Seconds = 600.0
    prefill_layout: KVLayout | None = None  # None: the same as the decode node's


@dataclass(frozen=True, slots=True)
class Grant:
    """What a decode node promises: these blocks are yours to fill until the lease ends."""

    lease: U64
    capability: Secret  # proves to the decode node that a sender belongs to this lease
    digest_key: Secret
    decode: NodeId
    peer_url: Name
    transports: Annotated[tuple[TransportAddress, ...], Field(max_length=16, fail_fast=True)]
    layout: KVLayout
    handles: Annotated[tuple[BlockHandle, ...], Field(max_length=1 << 20, fail_fast=True)]
    num_cached_tokens: Count  # the decode node already has the KV of these first tokens
    ttl_s: Seconds
    geometry: Geometry = WHOLE_BLOCKS


@dataclass(frozen=True, slots=True)
class Granted:
    """decode node → router."""

    id: AttemptId
    grant: Grant


@dataclass(frozen=True, slots=True)
class Refused:
    """decode or mixed node → router: nothing was taken.

    `cause`: capacity, draining, superseded, too_long, invalid; of a rebind also gone: there is no
    such lease.
    """

    id: AttemptId
    cause: Name
    message: Text
    retry_after_s: Seconds = 1.0


@dataclass(frozen=True, slots=True)
class Prefill:
    """router → prefill node. Without a grant the request must end with its first token.

    With `pooling` no token is wanted: the answer is an Embedding, and there is no grant.
    """

    id: AttemptId
    tokens: TokenIds
    num_prompt_tokens: Count
    sampling: SamplingParams
    grant: Grant | None
    cache_salt: Text = ""
    deadline_s: Seconds = 600.0
    pooling: Pooling | None = None


@dataclass(frozen=True, slots=True)
class Generate:
    """router → decode or mixed node: serve this attempt alone, from its prompt on.

    `tokens` is the prompt followed by what earlier attempts have already produced. Answered at once
    by Tokens with all of these output tokens, which may be none, or by Refused.
    """

    id: AttemptId
    tokens: TokenIds
    num_prompt_tokens: Count
    sampling: SamplingParams
    cache_salt: Text = ""


@dataclass(frozen=True, slots=True)
class PrefillTiming:
    """How who computed a prompt spent its time, in durations: hosts' clocks differ."""

    queue_s: Seconds  # heard of it → the first step that computed it began
    compute_s: Seconds  # from there to the end of the step that sampled the first token
    num_steps: Count


@dataclass(frozen=True, slots=True)
class TokenUpdate:
    """New output tokens of one attempt; `index` counts the request's output tokens from 0."""

    id: AttemptId
    index: Count
    tokens: TokenIds
    finish: FinishReason | None = None
    num_cached_tokens: Count | None = None  # prompt tokens that needed no computation
    logprobs: Logprobs | None = None  # for requests that ask
    timing: PrefillTiming | None = None  # with the first token, by who computed the prompt


@dataclass(frozen=True, slots=True)
class Embedding:
    """prefill node → router: the pooled hidden states of one prompt; the attempt is over."""

    id: AttemptId
    vector: Annotated[bytes, Field(strict=True, max_length=1 << 20)]  # little-endian fp32
    num_cached_tokens: Count = 0
    timing: PrefillTiming | None = None


@dataclass(frozen=True, slots=True)
class BeamsFound:
    """node → router: what a beam search has found, best first; the attempt is over.

    From the decode node, or from the prefill node where the first step was the last.
    """

    id: AttemptId
    hypotheses: Annotated[tuple[Hypothesis, ...], Field(max_length=MAX_BEAM_WIDTH)]


@dataclass(frozen=True, slots=True)
class TransferRecord:
    """The bytes of one committed handoff, as the prefill node saw them leave."""

    transport: Text  # "": the decode node had everything in its cache
    num_units: Count
    num_bytes: U64
    seconds: Seconds  # first unit sent → committed
    tail_bytes: U64  # had not left when the prompt's last forward pass was over
    tail_s: Seconds  # that moment → committed
    commit_wait_s: Seconds  # first token known → committed


@dataclass(frozen=True, slots=True)
class HandoffDone:
    """prefill node → router: the decode node has committed. For people only; it may get lost."""

    id: AttemptId
    transfer: TransferRecord


@dataclass(frozen=True, slots=True)
class Tokens:
    """node → router: everything that one step produced for this router."""

    updates: Annotated[tuple[TokenUpdate, ...], Field(max_length=1 << 16, fail_fast=True)]


@dataclass(frozen=True, slots=True)
class AttemptFailed:
    """node → router: this attempt is over without a result; what it held is free or quarantined.

    `cause` is a metric label; `telemetry/causes.py` has them all.
    """

    id: AttemptId
    cause: Name
    message: Text
    retryable: Flag


@dataclass(frozen=True, slots=True)
class Abort:
    """router → node: nobody waits for this attempt, nor for any lower one, any more."""

    id: AttemptId


@dataclass(frozen=True, slots=True)
class Ack:
    """router → decode node: the finished attempt's tokens were logged and may be forgotten."""

    id: AttemptId


@dataclass(frozen=True, slots=True)
class Resend:
    """router → node: repeat this attempt's output tokens from `index` on."""

    id: AttemptId
    index: Count


# ---------------------------------------------------------------- the handoff, between nodes


@dataclass(frozen=True, slots=True)
class UnitHeader:
    """Precedes a unit's bytes on a transport.

    Which layers and heads it holds follows from its number and the grant; the digest binds them.
    """

    lease: U64
    capability: Secret
    unit: Count  # its number, see kvtransfer.units
    handle: BlockHandle
    token_start: Count
    token_end: Count
    num_bytes: Count


@dataclass(frozen=True, slots=True)
class UnitsReceived:
    """decode → prefill: bytes of this lease that left the wire; opens the sender's window."""

    lease: U64
    num_bytes: U64  # since the grant, so that one that got lost does no harm


@dataclass(frozen=True, slots=True)
class UnitSeal:
    """One line of a manifest: what the sender says that a unit holds."""

    unit: Count
    token_start: Count
    token_end: Count
    digest: Digest


@dataclass(frozen=True, slots=True)
class Commit:
    """prefill → decode: the manifest, and all output tokens so far. May overtake the data.

    Idempotent: asked again until it is answered, and answered the same each time.
    """

    id: AttemptId
    lease: U64
    capability: Secret
    units: Annotated[tuple[UnitSeal, ...], Field(max_length=1 << 20, fail_fast=True)]
    output_tokens: TokenIds
    logprobs: Logprobs | None = None  # what the decode node repeats beside the tokens


@dataclass(frozen=True, slots=True)
class Committed:
    """decode → prefill: verified; the decode node owns the request from here on."""

    id: AttemptId
    lease: U64


@dataclass(frozen=True, slots=True)
class LeaseEnded:
    """decode → prefill: the lease will not be committed; stop sending and drop the references."""

    id: AttemptId
    lease: U64
    cause: Name  # as in AttemptFailed


@dataclass(frozen=True, slots=True)
class ReleaseLease:
    """prefill → decode: no handoff is needed; the first token ended the request, or its router did.

    A handoff that fails leaves the lease to the router, which may rebind it.
    """

    id: AttemptId
    lease: U64
    capability: Secret
    cause: Name


@dataclass(frozen=True, slots=True)
class LeaseClaim:
    """A lease and the proof that the sender belongs to it."""

    lease: U64
    capability: Secret


@dataclass(frozen=True, slots=True)
class RenewLeases:
    """prefill → decode: these requests still wait or compute here; do not expire their leases."""

    claims: Annotated[tuple[LeaseClaim, ...], Field(max_length=1 << 16, fail_fast=True)]


Message: TypeAlias = (
    Register
    | Welcome
    | Unwelcome
    | Heartbeat
    | RouterHeartbeat
    | Draining
    | Goodbye
    | Gone
    | FetchTokenizer
    | TokenizerFiles
    | CacheEvents
    | FetchCacheSnapshot
    | SwitchRole
    | SwitchRefused
    | Reserve
    | Rebind
    | Granted
    | Refused
    | Prefill
    | Tokens
    | AttemptFailed
    | Abort
    | Ack
    | Resend
    | HandoffDone
    | Embedding
    | BeamsFound
    | Generate
    | UnitHeader
    | UnitsReceived
    | Commit
    | Committed
    | LeaseEnded
    | ReleaseLease
    | RenewLeases
)

TAGS: dict[int, type[Message]] = {
    1: Register,
    2: Welcome,
    3: Unwelcome,
    4: Heartbeat,
    5: RouterHeartbeat,
    6: Draining,
    7: Goodbye,
    8: Gone,
    9: FetchTokenizer,
    10: TokenizerFiles,
    11: CacheEvents,
    12: FetchCacheSnapshot,
    13: SwitchRole,
    14: SwitchRefused,
    20: Reserve,
    21: Granted,
    22: Refused,
    23: Prefill,
    24: Tokens,
    25: AttemptFailed,
    26: Abort,
    27: Ack,
    28: Resend,
    29: Rebind,
    30: HandoffDone,
    31: Embedding,
    32: BeamsFound,
    33: Generate,
    40: UnitHeader,
    41: UnitsReceived,
    42: Commit,
    43: Committed,
    44: LeaseEnded,
    45: ReleaseLease,
    46: RenewLeases,
}
