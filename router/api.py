"""The bodies of OpenAI's API: every parameter is honoured or refused by name, none is ignored.

`CompletionBody` and `ChatBody` are what is honoured. `NEUTRAL` names what is known and not
supported, with the values that ask for nothing. Everything else is unknown.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from router.errors import ApiError, bad_request, shorten

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_MESSAGES = 65_536
MAX_CHOICES = 128

PositiveInt = Annotated[int, Field(ge=1, lt=1 << 31)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True)]
Prompt = str | list[int]


class Strict(BaseModel):
    """No unknown field, no conversion between types."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(Strict):
    """What completions and chat have in common; null stands for the default everywhere."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    max_tokens: PositiveInt | None = None
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
    return_token_ids: bool | None = None
    cache_salt: Annotated[str, Field(max_length=1024)] | None = None
    # Labels for the client's own books; by definition they change nothing.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None


def _as_prompts(value: Any) -> list[Prompt]:
    """The prompts in a string, a token array, or an array of either (not mixed).

    By hand, because a union of lists would make one error per element of a long token array.
    """
    if isinstance(value, str) or _is_token_array(value):
        return [value]
    if not isinstance(value, list) or not value or len(value) > MAX_CHOICES:
        raise ValueError(_PROMPT_RULE)
    if not all(isinstance(item, str) for item in value) and not all(map(_is_token_array, value)):
        raise ValueError(_PROMPT_RULE)
    return value


def _is_token_array(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and set(map(type, value)) == {int}
        and min(value) >= 0
        and max(value) < 1 << 31
    )


_PROMPT_RULE = (
    "must be a string, an array of token ids, or an array of at most "
    f"{MAX_CHOICES} strings or token arrays, and not empty"
)


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    prompt: Annotated[list[Prompt], PlainValidator(_as_prompts)]  # one or several in the body


class TextPart(Strict):
    """One piece of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: (
        str
        | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    )
    name: Annotated[str, Field(max_length=256)] | None = None


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[
        list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    ]
    max_completion_tokens: PositiveInt | None = None


# Known parameters that are not supported, with the values (beside null) that ask for nothing.
NEUTRAL_COMMON: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "early_stopping": (False,),
    "guided_choice": (),
    "guided_decoding_backend": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": (),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": ({},),
    "length_penalty": (1.0,),
    "logits_processors": ([],),
    "priority": (0,),
    "prompt_logprobs": (),
    "request_id": (),
    "response_format": ({"type": "text"},),
    "return_tokens_as_token_ids": (False,),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "structured_outputs": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}
NEUTRAL_COMPLETION: dict[str, tuple[Any, ...]] = {
    **NEUTRAL_COMMON,
    "add_special_tokens": (True,),
    "echo": (False,),
    "logprobs": (),
    "prompt_embeds": (),
    "suffix": ("",),
}
NEUTRAL_CHAT: dict[str, tuple[Any, ...]] = {
    **NEUTRAL_COMMON,
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "audio": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "include_reasoning": (True,),
    "logprobs": (False,),
    "mm_processor_kwargs": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),  # without tools there is nothing to run in parallel
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "tool_choice": ("none", "auto"),  # without tools both mean none
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": (),
    "web_search_options": (),
}
NEUTRAL_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "reasoning": (),
    "reasoning_content": (),
    "refusal": (),
    "tool_calls": ([],),
}
NEUTRAL_STREAM_OPTIONS: dict[str, tuple[Any, ...]] = {"include_obfuscation": (False,)}

Body = TypeVar("Body", bound=GenerationBody)


def parse_completion(data: bytes) -> CompletionBody:
    """The body of a completion request. Raises ApiError."""
    fields = _json_object(data)
    best_of = fields.pop("best_of", None)
    if best_of is not None and (isinstance(best_of, bool) or best_of != (fields.get("n") or 1)):
        raise _not_supported("best_of")
    return _validate(CompletionBody, _without_neutral(fields, NEUTRAL_COMPLETION))


def parse_chat(data: bytes) -> ChatBody:
    """The body of a chat request. Raises ApiError."""
    fields = _without_neutral(_json_object(data), NEUTRAL_CHAT)
    messages = fields.get("messages")
    if isinstance(messages, list):
        fields["messages"] = [
            _without_neutral(message, NEUTRAL_MESSAGE, f"messages.{index}.")
            if isinstance(message, dict)
            else message
            for index, message in enumerate(messages)
        ]
    return _validate(ChatBody, fields)


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise bad_request("The body is not valid UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise bad_request(f"The body is not valid JSON: {shorten(str(error), 200)}") from error
    if not isinstance(value, dict):
        raise bad_request("The body must be a JSON object.")
    _refuse_surrogates(data, value)
    return value


def _refuse_surrogates(data: bytes, value: dict[str, Any]) -> None:
    """JSON can spell half a UTF-16 pair, which is no character and has no tokens."""
    if b"\\ud" in data or b"\\uD" in data:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise bad_request("The body contains half of a surrogate pair.") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def _without_neutral(
    fields: dict[str, Any], neutral: dict[str, tuple[Any, ...]], where: str = ""
) -> dict[str, Any]:
    """`fields` without known unsupported ones that ask for nothing; raises for those that ask."""
    for name in fields.keys() & neutral.keys():
        if not _asks_nothing(fields[name], neutral[name]):
            raise _not_supported(where + name)
    kept = {name: value for name, value in fields.items() if name not in neutral}
    options = kept.get("stream_options")
    if isinstance(options, dict):
        kept["stream_options"] = _without_neutral(
            options, NEUTRAL_STREAM_OPTIONS, "stream_options."
        )
    return kept


def _asks_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    if value is None:
        return True
    return any(
        value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral
    )


def _not_supported(name: str) -> ApiError:
    return bad_request(f"`{name}` is not supported yet.", param=name, code="unsupported_parameter")


def _validate(kind: type[Body], fields: dict[str, Any]) -> Body:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _explain(error) from None


def _explain(error: ValidationError) -> ApiError:
    """The most telling of pydantic's errors, without the client's input."""
    errors = error.errors(include_input=False, include_url=False, include_context=False)
    first = max(errors, key=lambda item: len(item["loc"])) if len(errors) > 1 else errors[0]
    param = ".".join(str(part) for part in first["loc"] if not _is_union_branch(part))
    if first["type"] == "extra_forbidden":
        return bad_request(
            f"Unrecognized request argument supplied: {shorten(param, 100)}",
            param=param,
            code="unknown_parameter",
        )
    if first["type"] == "missing":
        return bad_request(f"Missing required parameter: `{param}`.", param=param)
    reason = first["msg"].removeprefix("Value error, ")
    return bad_request(f"Invalid value for `{shorten(param, 100)}`: {reason}.", param=param)


def _is_union_branch(part: str | int) -> bool:
    """Pydantic puts the tried alternative of a union into the path, e.g. `list[str]`."""
    return isinstance(part, str) and ("[" in part or "-" in part or part in ("str", "TextPart"))
