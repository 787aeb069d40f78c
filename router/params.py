"""From a parsed body to what the engine is told: sampling, limits, seeds, stop strings."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from hashlib import blake2b

from router.api import ChatBody, CompletionBody, GenerationBody
from router.errors import ApiError, bad_request, context_too_long
from wire.messages import ModelInfo
from wire.types import MAX_REQUEST_TOKENS, SamplingParams

COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for completions; chat's default is the rest of the context."""


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """What holds for every choice of one client request."""

    body: GenerationBody
    max_tokens: int | None  # as the client asked
    default_max_tokens: int | None
    seed: int
    stops: tuple[str, ...]
    logit_bias: dict[int, float]

    @property
    def n(self) -> int:
        return self.body.n or 1

    @property
    def stream(self) -> bool:
        return bool(self.body.stream)

    @property
    def include_usage(self) -> bool:
        return self._stream_option("include_usage")

    @property
    def continuous_usage(self) -> bool:
        return self.include_usage and self._stream_option("continuous_usage_stats")

    @property
    def return_token_ids(self) -> bool:
        return bool(self.body.return_token_ids)

    @property
    def cache_salt(self) -> str:
        return self.body.cache_salt or ""

    def _stream_option(self, name: str) -> bool:
        options = self.body.stream_options
        return options is not None and bool(getattr(options, name))

    def sampling(self, choice: int, num_prompt_tokens: int, max_model_len: int) -> SamplingParams:
        """For choice number `choice` of a prompt that long. Raises ApiError."""
        body = self.body
        max_tokens = self._max_tokens(num_prompt_tokens, max_model_len)
        min_tokens = body.min_tokens or 0
        if min_tokens > max_tokens:
            raise bad_request("`min_tokens` is larger than `max_tokens`.", "min_tokens")
        return SamplingParams(
            seed=choice_seed(self.seed, choice),
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            temperature=_given(body.temperature, 1.0),
            top_k=max(0, body.top_k or 0),  # vLLM's -1 means no limit, as 0 does
            top_p=_given(body.top_p, 1.0),
            min_p=_given(body.min_p, 0.0),
            repetition_penalty=_given(body.repetition_penalty, 1.0),
            presence_penalty=_given(body.presence_penalty, 0.0),
            frequency_penalty=_given(body.frequency_penalty, 0.0),
            logit_bias=self.logit_bias,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=bool(body.ignore_eos),
        )

    def _max_tokens(self, num_prompt_tokens: int, max_model_len: int) -> int:
        room = min(max_model_len, MAX_REQUEST_TOKENS) - num_prompt_tokens
        if room < 1 or (self.max_tokens is not None and self.max_tokens > room):
            asked = self.max_tokens or 0
            raise context_too_long(
                max_model_len, num_prompt_tokens, asked, "prompt" if self._completes else "messages"
            )
        if self.max_tokens is not None:
            return self.max_tokens
        return room if self.default_max_tokens is None else min(room, self.default_max_tokens)

    @property
    def _completes(self) -> bool:
        return isinstance(self.body, CompletionBody)


def generation_params(body: CompletionBody | ChatBody, model: ModelInfo) -> GenerationParams:
    """Check what needs the model's vocabulary. Raises ApiError."""
    if body.stream_options is not None and not body.stream:
        raise bad_request("`stream_options` is only allowed with `stream`.", "stream_options")
    if body.return_token_ids and body.stream:
        raise bad_request("`return_token_ids` is not supported with `stream`.", "return_token_ids")
    if any(token >= model.vocab_size for token in body.stop_token_ids or ()):
        raise _outside_vocabulary("stop_token_ids", model)
    chat = isinstance(body, ChatBody)
    limit = body.max_tokens
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        limit = body.max_completion_tokens
    stop = body.stop
    return GenerationParams(
        body=body,
        max_tokens=limit,
        default_max_tokens=None if chat else COMPLETION_MAX_TOKENS,
        seed=secrets.randbits(64) if body.seed is None else body.seed % (1 << 64),
        stops=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        logit_bias=_logit_bias(body.logit_bias or {}, model),
    )


def choice_seed(seed: int, choice: int) -> int:
    """The seed of one choice: the first 64 bits of BLAKE2b over (seed, choice), little-endian."""
    content = seed.to_bytes(8, "little") + choice.to_bytes(8, "little")
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def check_tokens(tokens: list[int], model: ModelInfo) -> None:
    """Refuse prompts in token ids that the model does not have."""
    if max(tokens) >= model.vocab_size:
        raise _outside_vocabulary("prompt", model)


def _logit_bias(bias: dict[str, float], model: ModelInfo) -> dict[int, float]:
    if not all(key.isascii() and key.isdigit() and len(key) < 11 for key in bias):
        raise bad_request("Invalid value for `logit_bias`: keys must be token ids.", "logit_bias")
    by_token = {int(key): value for key, value in bias.items()}
    if any(token >= model.vocab_size for token in by_token):
        raise _outside_vocabulary("logit_bias", model)
    return by_token


def _outside_vocabulary(param: str, model: ModelInfo) -> ApiError:
    return bad_request(
        f"Invalid value for `{param}`: token ids must be below {model.vocab_size}.", param
    )


def _given(value: float | None, default: float) -> float:
    return default if value is None else float(value)
