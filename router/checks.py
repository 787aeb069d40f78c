"""What a body's parameters say together, and against this server's limits."""

from __future__ import annotations

from dataclasses import dataclass

from router.api import CompletionBody
from router.api_chat import ChatBody, ChatRendering
from router.errors import bad_request
from wire.logprobs import MAX_PAIRS
from wire.types import SamplingParams


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What a server allows its clients to ask for."""

    max_logprobs: int = 20
    trust_request_chat_template: bool = False


def check_body(body: CompletionBody | ChatBody, limits: ServerLimits) -> None:
    """Raise ApiError for parameters that contradict each other or this server."""
    if body.stream_options is not None and not body.stream:
        raise bad_request("`stream_options` is only allowed with `stream`.", "stream_options")
    if body.truncate_prompt_tokens == 0:
        raise bad_request("`truncate_prompt_tokens` would leave nothing.", "truncate_prompt_tokens")
    if body.prompt_logprobs is not None and body.stream:
        raise bad_request("`prompt_logprobs` is not available with `stream`.", "prompt_logprobs")
    _check_num_logprobs("prompt_logprobs", body.prompt_logprobs, limits)
    if isinstance(body, ChatBody):
        _check_chat(body, limits)
    else:
        _check_completion(body, limits)


def check_num_pairs(num_prompt_tokens: int, sampling: SamplingParams) -> None:
    """Raise ApiError for more logprobs than nodes take on."""
    if sampling.num_logprob_pairs(num_prompt_tokens, sampling.max_tokens) > MAX_PAIRS:
        raise bad_request(
            "These are too many logprobs for one request; ask for fewer alternatives, or limit "
            "the number of tokens.",
            "logprobs" if sampling.logprobs is not None else "prompt_logprobs",
        )


def _check_num_logprobs(name: str, number: int | None, limits: ServerLimits) -> None:
    if number is not None and number > limits.max_logprobs:
        raise bad_request(
            f"Invalid value for `{name}`: this server gives at most {limits.max_logprobs}.", name
        )


def _check_completion(body: CompletionBody, limits: ServerLimits) -> None:
    _check_num_logprobs("logprobs", body.logprobs, limits)
    if body.max_tokens == 0 and not body.echo:
        raise bad_request("`max_tokens` must be at least 1 without `echo`.", "max_tokens")
    if body.best_of is None:
        return
    if body.best_of < (body.n or 1):
        raise bad_request("`best_of` must not be less than `n`.", "best_of")
    if body.stream and body.best_of > (body.n or 1):
        raise bad_request("`best_of` is not available with `stream`.", "best_of")


def _check_chat(body: ChatBody, limits: ServerLimits) -> None:
    _check_num_logprobs("top_logprobs", body.top_logprobs, limits)
    if body.top_logprobs and not body.logprobs:
        raise bad_request("`top_logprobs` needs `logprobs` to be true.", "top_logprobs")
    check_rendering(body, limits)


def check_rendering(body: ChatRendering, limits: ServerLimits) -> None:
    """Raise ApiError for a template that is not trusted, or options that contradict each other."""
    if body.chat_template is not None and not limits.trust_request_chat_template:
        raise bad_request(
            "This server takes no `chat_template` from requests "
            "(`--trust-request-chat-template` would allow it).",
            "chat_template",
        )
    if body.continue_final_message and body.add_generation_prompt is not False:
        raise bad_request(
            "`continue_final_message` needs `add_generation_prompt` to be false.",
            "continue_final_message",
        )
