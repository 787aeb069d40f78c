"""Messages of a request's life, between its router and the nodes that serve it.

    router  ── Reserve, Rebind ──▶ decode        router  ── Prefill(grant) ──▶ prefill
    decode  ── Granted ──────────▶ router        prefill, decode ── Tokens ──▶ router
    router  ── Generate ─────────▶ decode

The grant passes through the router: from the decode node that promises to the prefill node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

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
    FinishReason,
    Flag,
    Hypothesis,
    Name,
    NodeId,
    Pooling,
    SamplingParams,
    Seconds,
    Secret,
    Text,
    TokenIds,
    TransportAddress,
)


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
