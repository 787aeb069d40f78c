"""The bodies of OpenAI's API: every parameter is honoured or refused by name, none is ignored.

`CompletionBody` and `ChatBody` (`router/api_chat.py`) are what is honoured. `NEUTRAL_…` name what
is known and not supported, with the values that ask for nothing. Everything else is unknown.
`docs/api.md` has the table.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator

from router.api_structured import Strict, StructuredBody
from router.parsing import json_object, validate, without_neutral
from wire.logprobs import MAX_TOP_LOGPROBS

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_CHOICES = 128

PositiveInt = Annotated[int, Field(ge=1, lt=1 << 31)]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True)]
Prompt = str | list[int]


class StreamOptions(Strict):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(StructuredBody):
    """What completions and chat have in common; null stands for the default everywhere."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopString | Stops | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=256, fail_fast=True)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=4096),
        ]
        | None
    ) = None
    min_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    ignore_eos: bool | None = None
    speculative_decoding: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, lt=1 << 31)] | None = None
    prompt_logprobs: NumLogprobs | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)] | None = None
    cache_salt: Annotated[str, Field(max_length=1024)] | None = None
    use_beam_search: bool | None = None
    length_penalty: Annotated[float, Field(ge=-10, le=10)] | None = None
    early_stopping: Literal[True, False, "never"] | None = None
    # Labels for the client's own books; by definition they change nothing.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None


def as_prompts(value: Any, limit: int = MAX_CHOICES) -> list[Prompt]:
    """The prompts in a string, a token array, or an array of either (not mixed).

    By hand, because a union of lists would make one error per element of a long token array.
    """
    if isinstance(value, str) or _is_token_array(value):
        return [value]
    good = isinstance(value, list) and 0 < len(value) <= limit
    if good and all(isinstance(item, str) for item in value):
        return value  # type: ignore[no-any-return]
    if good and all(map(_is_token_array, value)):
        return value  # type: ignore[no-any-return]
    raise ValueError(
        "must be a string, an array of token ids, or an array of at most "
        f"{limit} strings or token arrays, and not empty"
    )


def _is_token_array(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and set(map(type, value)) == {int}
        and min(value) >= 0
        and max(value) < 1 << 31
    )


PromptInput = (
    Annotated[str, Field(min_length=1)]
    | Annotated[list[TokenId], Field(min_length=1)]
    | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
)
"""What `as_prompts` takes, for the description alone."""


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Annotated[
        list[Prompt], PlainValidator(as_prompts, json_schema_input_type=PromptInput)
    ]  # one or several in the body
    logprobs: NumLogprobs | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None


# Known parameters that are not supported, with the values (beside null) that ask for nothing.
NEUTRAL_COMMON: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "guided_decoding_backend": ("auto", "guidance"),
    "kv_transfer_params": ({},),
    "logits_processors": ([],),
    "request_id": (),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True, False),  # these tokenizers never write such spaces
    "store": (False,),
    "vllm_xargs": ({},),
}
NEUTRAL_COMPLETION: dict[str, tuple[Any, ...]] = {
    **NEUTRAL_COMMON,
    "prompt_embeds": (),
    "suffix": ("",),
}
NEUTRAL_STREAM_OPTIONS: dict[str, tuple[Any, ...]] = {"include_obfuscation": (False,)}


def known_fields(data: bytes, neutral: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """The fields of a body that ask for something. Raises ApiError for what is not supported."""
    fields = without_neutral(json_object(data), neutral)
    options = fields.get("stream_options")
    if isinstance(options, dict):
        fields["stream_options"] = without_neutral(
            options, NEUTRAL_STREAM_OPTIONS, "stream_options."
        )
    return fields


def parse_completion(data: bytes) -> CompletionBody:
    """The body of a completion request. Raises ApiError."""
    return validate(CompletionBody, known_fields(data, NEUTRAL_COMPLETION))
