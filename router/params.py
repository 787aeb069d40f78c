"""From a parsed body to what the engine is told: sampling, limits, seeds, stop strings."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from hashlib import blake2b

from router.api import CompletionBody, GenerationBody
from router.api_chat import ChatBody
from router.api_structured import StructuredBody
from router.beams import beam_params
from router.chat_template import ChatOptions, chat_options
from router.checks import ServerLimits, check_body
from router.choice_text import TextRules
from router.errors import ApiError, bad_request, context_too_long
from router.structured import bounded, grammar_of, json_grammar
from router.tools.choose import READ_AS_TEXT, Reading
from router.tools.use import NO_TOOLS, TOOL_WHITESPACE, ToolUse, tool_use
from wire.fleet_messages import ModelInfo
from wire.types import MAX_REQUEST_TOKENS, BeamParams, SamplingParams

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
    logprobs: int | None = None  # of output tokens, as the client asked
    best_of: int | None = None  # choices of which the best `n` are answered
    beam: BeamParams | None = None  # search for the choices instead of sampling them
    grammar: str = ""  # what the output must look like
    grammar_param: str = ""  # who asks for that
    tools: ToolUse = NO_TOOLS
    reading: Reading = READ_AS_TEXT

    @property
    def n(self) -> int:
        return self.body.n or 1

    @property
    def num_choices(self) -> int:
        """How many are sampled for each prompt."""
        return self.best_of or self.n

    @property
    def echo(self) -> bool:
        return isinstance(self.body, CompletionBody) and bool(self.body.echo)

    @property
    def is_mute(self) -> bool:
        """Whether only the prompt is of interest."""
        return self.max_tokens == 0

    @property
    def skip_special_tokens(self) -> bool:
        asked = self.body.skip_special_tokens is not False
        return asked and not self.reading.shows_special_tokens

    @property
    def text_rules(self) -> TextRules:
        return TextRules(
            stops=self.stops,
            min_tokens=self.body.min_tokens or 0,
            include_stop=bool(self.body.include_stop_str_in_output),
            tells_tokens=self._sampled_logprobs is not None or self.return_token_ids,
            is_mute=self.is_mute,
        )

    @property
    def chat_options(self) -> ChatOptions:
        assert isinstance(self.body, ChatBody)
        return replace(chat_options(self.body), tools=self.tools.rendered)

    @property
    def prompt_logprobs(self) -> int | None:
        """Of so many best at each token of the prompt; an echo has them as the output has."""
        asked = [self.body.prompt_logprobs, self.logprobs if self.echo else None]
        return max((number for number in asked if number is not None), default=None)

    @property
    def _sampled_logprobs(self) -> int | None:
        """What the nodes are asked for: without logprobs nobody knows which choice is best."""
        return 0 if self.logprobs is None and self.best_of else self.logprobs

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
        min_tokens = 0 if self.is_mute else body.min_tokens or 0
        if min_tokens > max_tokens:
            raise bad_request("`min_tokens` is larger than `max_tokens`.", "min_tokens")
        if self.beam is not None:
            return SamplingParams(
                max_tokens=max_tokens,
                min_tokens=min_tokens,
                temperature=0,
                ignore_eos=bool(body.ignore_eos),
                beam=self.beam,
            )
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
            speculate=body.speculative_decoding is not False,
            logprobs=self._sampled_logprobs,
            prompt_logprobs=None if choice else self.prompt_logprobs,  # the same for all choices
            grammar="" if self.is_mute else self.grammar,
        )

    def _max_tokens(self, num_prompt_tokens: int, max_model_len: int) -> int:
        room = min(max_model_len, MAX_REQUEST_TOKENS) - num_prompt_tokens
        if room < 1 or (self.max_tokens is not None and self.max_tokens > room):
            asked = self.max_tokens or 0  # an echo alone still needs room for a token, as in vLLM
            raise context_too_long(
                max_model_len, num_prompt_tokens, asked, "prompt" if self._completes else "messages"
            )
        if self.max_tokens is not None:
            return max(1, self.max_tokens)
        return room if self.default_max_tokens is None else min(room, self.default_max_tokens)

    @property
    def _completes(self) -> bool:
        return isinstance(self.body, CompletionBody)


def needs_grammar(body: GenerationBody) -> bool:
    """Whether the body's parameters have to become a grammar."""
    if any(getattr(body, name) is not None for name in StructuredBody.model_fields):
        return True
    return isinstance(body, ChatBody) and body.tool_choice not in (None, "none", "auto")


def generation_params(
    body: CompletionBody | ChatBody, model: ModelInfo, limits: ServerLimits
) -> GenerationParams:
    """Check a body against the server and the model's vocabulary. Raises ApiError."""
    check_body(body, limits)
    beam = beam_params(body)
    if any(token >= model.vocab_size for token in body.stop_token_ids or ()):
        raise _outside_vocabulary("stop_token_ids", model)
    stop = body.stop
    grammar, grammar_param = grammar_of(body)
    common = GenerationParams(
        body=body,
        max_tokens=body.max_tokens,
        default_max_tokens=None,
        seed=secrets.randbits(64) if body.seed is None else body.seed % (1 << 64),
        stops=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        logit_bias=_logit_bias(body.logit_bias or {}, model),
        beam=beam,
        grammar=grammar,
        grammar_param=grammar_param,
    )
    whole = _for_chat(common, body) if isinstance(body, ChatBody) else _for_completion(common, body)
    if whole.beam is not None and whole.grammar:
        param = whole.grammar_param
        raise bad_request(f"`{param}` is not available with `use_beam_search`.", param)
    return whole


def _for_completion(common: GenerationParams, body: CompletionBody) -> GenerationParams:
    several = body.best_of is not None and body.best_of > (body.n or 1) and common.beam is None
    return replace(
        common,
        default_max_tokens=COMPLETION_MAX_TOKENS,
        logprobs=body.logprobs,
        best_of=body.best_of if several else None,
    )


def _for_chat(common: GenerationParams, body: ChatBody) -> GenerationParams:
    limit = body.max_completion_tokens
    use = tool_use(body.tools, body.tool_choice, body.parallel_tool_calls)
    if use.rendered and common.grammar:
        raise bad_request(
            f"`{common.grammar_param}` and `tools` cannot both say what the output is.",
            common.grammar_param,
        )
    if use.schema is not None:
        grammar = bounded(
            json_grammar(use.schema, TOOL_WHITESPACE, "tools"), "tools", body.ignore_eos
        )
        common = replace(common, grammar=grammar, grammar_param="tools")
    return replace(
        common,
        tools=use,
        max_tokens=body.max_tokens if limit is None else limit,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


def choice_seed(seed: int, choice: int) -> int:
    """The seed of one choice: the first 64 bits of BLAKE2b over (seed, choice), little-endian."""
    content = seed.to_bytes(8, "little") + choice.to_bytes(8, "little")
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def check_tokens(tokens: list[int], model: ModelInfo, param: str = "prompt") -> None:
    """Refuse prompts in token ids that the model does not have."""
    if max(tokens) >= model.vocab_size:
        raise _outside_vocabulary(param, model)


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
