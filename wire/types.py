"""The values that messages are made of.

Every field that can come from the network is strict and bounded by its annotation, so that the
codec checks type and size in one place. Own code builds these objects without that cost. Tuples
fail fast: a million wrong items would else become as many error objects (20 s and 4 GB, measured).
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from wire.logprobs import MAX_TOP_LOGPROBS

MAX_REQUEST_TOKENS = 1 << 20
"""No request is longer than this many tokens, whatever the model allows."""

U64 = Annotated[int, Field(strict=True, ge=0, lt=1 << 64)]
Count = Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]
Positive = Annotated[int, Field(strict=True, ge=1, lt=1 << 31)]
TokenId = Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]
TokenIds = Annotated[tuple[TokenId, ...], Field(max_length=MAX_REQUEST_TOKENS, fail_fast=True)]
Port = Annotated[int, Field(strict=True, ge=1, lt=1 << 16)]
Name = Annotated[str, Field(strict=True, min_length=1, max_length=256)]
Url = Annotated[str, Field(strict=True, min_length=1, max_length=1024)]
Text = Annotated[str, Field(strict=True, max_length=4096)]
Seconds = Annotated[float, Field(ge=0, le=86_400 * 30, allow_inf_nan=False)]
Real = Annotated[float, Field(allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
NumLogprobs = Annotated[int, Field(strict=True, ge=0, lt=MAX_TOP_LOGPROBS + 1)]
Grammar = Annotated[str, Field(strict=True, max_length=64 << 10)]  # see wire/grammar.py
Digest = Annotated[bytes, Field(strict=True, min_length=16, max_length=16)]
Secret = Annotated[bytes, Field(strict=True, min_length=16, max_length=32)]


class Role(StrEnum):
    """What a node does for the fleet."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"  # both, and whole requests

    @property
    def sends(self) -> bool:
        """Whether it computes prompts for others."""
        return self is not Role.DECODE

    @property
    def receives(self) -> bool:
        """Whether it generates: from what others computed, or from the prompt on."""
        return self is not Role.PREFILL


class FinishReason(StrEnum):
    """Why a request ended; `stop` and `length` mean what OpenAI's API means by them."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class Pooling(StrEnum):
    """How a prompt's hidden states become one embedding."""

    LAST = "last"
    MEAN = "mean"


class EarlyStopping(StrEnum):
    """When a beam search ends before its length limit; the words of transformers."""

    WHEN_FULL = "true"  # with as many finished hypotheses as there are beams
    HEURISTIC = "false"  # when no running beam beats the worst of them at its present length
    NEVER = "never"  # when no running beam could beat it at any length


MAX_BEAM_WIDTH = 32


@dataclass(frozen=True, slots=True)
class BeamParams:
    """The choices of one request are searched for together, and none is drawn."""

    width: Annotated[int, Field(strict=True, ge=1, lt=MAX_BEAM_WIDTH + 1)]
    length_penalty: Annotated[float, Field(ge=-10, le=10)] = 1.0
    early_stopping: EarlyStopping = EarlyStopping.HEURISTIC


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """One result of a beam search."""

    tokens: TokenIds  # output tokens, the one that ended it included
    score: Annotated[float, Field(ge=-1e300, le=0)]
    finish: FinishReason


@dataclass(frozen=True, slots=True)
class NodeId:
    """One life of one node: a restarted node has the same name and another incarnation."""

    name: Name
    incarnation: U64

    def __str__(self) -> str:
        return f"{self.name}#{self.incarnation:016x}"


@dataclass(frozen=True, slots=True)
class AttemptId:
    """One try to serve one choice of a request. A higher attempt supersedes a lower one."""

    request: Name
    attempt: Count

    def __str__(self) -> str:
        return f"{self.request}/{self.attempt}"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one choice is sampled. All limits are on output tokens of the whole request.

    The noise is a pure function of (`seed`, position, token id), so two nodes given the same logits
    draw the same token. The router has already folded the choice's index into `seed`.
    """

    seed: U64 = 0
    max_tokens: Count = 16
    min_tokens: Count = 0
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 1.0
    top_k: Count = 0  # 0: no limit
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[
        dict[TokenId, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=4096)
    ] = field(default_factory=dict)
    stop_token_ids: Annotated[tuple[TokenId, ...], Field(max_length=256, fail_fast=True)] = ()
    ignore_eos: Flag = False
    logprobs: NumLogprobs | None = None  # of each output token, and of so many best
    prompt_logprobs: NumLogprobs | None = None  # the same for the prompt, from the prefill node
    grammar: Grammar = ""  # what the output must look like
    speculate: Flag = True  # whether tokens may be drafted; they come out the same
    beam: BeamParams | None = None  # search instead of sampling

    def num_logprob_pairs(self, num_prompt_tokens: int, num_output_tokens: int) -> int:
        """Pairs (`wire/logprobs.py`) of a request that comes to so many tokens."""
        pairs = 0
        if self.prompt_logprobs is not None:
            pairs += num_prompt_tokens * (1 + self.prompt_logprobs)
        if self.logprobs is not None:
            pairs += num_output_tokens * (1 + self.logprobs)
        return pairs


@dataclass(slots=True, unsafe_hash=True)
class BlockHandle:
    """Names the content of a block, not only its place: a reused block has another generation.

    Nobody changes one. It is not frozen because a request has hundreds, and to make them takes a
    third of the time so.
    """

    epoch: U64  # random per process start
    block_id: Count
    generation: U64


@dataclass(frozen=True, slots=True)
class TransportAddress:
    """Where a node receives KV blocks by one transport."""

    transport: Name
    url: Url  # the ucx transport's holds the address of a UCX worker, which grows with its devices


@dataclass(frozen=True, slots=True)
class StepSums:
    """Steps of one kind since a node's start: the variables of their latency formula, summed up."""

    steps: U64 = 0
    tokens: U64 = 0  # computed by prefills; whose KV decodes have read
    weight: U64 = 0  # of prefills Σ(end² - start²); of decodes Σ requests
    seconds: Seconds = 0.0

    def plus(self, tokens: int, weight: int, seconds: float, steps: int = 1) -> StepSums:
        """With further steps."""
        return StepSums(
            self.steps + steps, self.tokens + tokens, self.weight + weight, self.seconds + seconds
        )


@dataclass(frozen=True, slots=True)
class NodeLoad:
    """A snapshot of a node, sent with every heartbeat; the router's policies read only this."""

    step: U64 = 0  # forward passes so far
    stalled_s: Seconds = 0.0  # age of the oldest runnable request without progress
    num_running: Count = 0
    num_waiting: Count = 0
    queued_tokens: Count = 0  # prompt tokens not yet computed
    blocks_total: Count = 0
    blocks_free: Count = 0  # free or evictable
    blocks_promised: Count = 0  # predicted growth of what is admitted
    prefill_steps: StepSums = StepSums()  # that did nothing else
    decode_steps: StepSums = StepSums()


def new_node_id(name: str) -> NodeId:
    """A fresh life of the node called `name`."""
    return NodeId(name, secrets.randbits(64))
