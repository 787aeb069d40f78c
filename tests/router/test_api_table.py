"""docs/api.md tells the status of every parameter as the models that validate have it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from router.api import NEUTRAL_COMPLETION, CompletionBody, parse_completion
from router.api_chat import NEUTRAL_CHAT, ChatBody, parse_chat
from router.errors import ApiError
from router.responses.body import NEUTRAL as NEUTRAL_RESPONSES
from router.responses.body import ResponsesBody, parse_responses

TABLE = Path(__file__).resolve().parents[2] / "docs" / "api.md"
SHORT_ROW = re.compile(r"\| `(\w+)` \| ([^|]*) \| [^|]*\|$")
ROW = re.compile(r"\| `(\w+)` \| ([^|]*) \| ([^|]*) \| [^|]*\|$")
Neutral = dict[str, tuple[Any, ...]]
USER = [{"role": "user", "content": "x"}]


def _wrong(model: type[BaseModel]) -> Iterator[tuple[str, object]]:
    """For each parameter a value that no parameter takes."""
    for name in model.model_fields:
        yield name, [[]]


def status(name: str, model: type[BaseModel], neutral: Neutral) -> str:
    assert not (name in model.model_fields and name in neutral), f"{name} is both"
    if name in model.model_fields:
        return "yes"
    if name not in neutral:
        return "unknown"
    values = ", ".join(f"`{json.dumps(value)}`" for value in neutral[name])
    return f"only {values}" if values else "refused"


def test_the_table_is_true() -> None:
    rows = [match.groups() for line in TABLE.read_text().splitlines() if (match := ROW.match(line))]
    told = {name: (completions, chat) for name, completions, chat in rows}
    assert len(told) == len(rows), "a parameter stands there twice"
    known = {*CompletionBody.model_fields, *ChatBody.model_fields}
    known |= {*NEUTRAL_COMPLETION, *NEUTRAL_CHAT}
    assert told == {
        name: (
            status(name, CompletionBody, NEUTRAL_COMPLETION),
            status(name, ChatBody, NEUTRAL_CHAT),
        )
        for name in known
    }


def test_the_table_of_responses_is_true() -> None:
    text = TABLE.read_text().partition("## Responses")[2].partition("\n## ")[0]
    rows = [match.groups() for line in text.splitlines() if (match := SHORT_ROW.match(line))]
    known = {*ResponsesBody.model_fields, *NEUTRAL_RESPONSES}
    assert len(rows) == len(known)
    assert {row[0]: row[1] for row in rows} == {
        name: status(name, ResponsesBody, NEUTRAL_RESPONSES) for name in known
    }


# Parameters of OpenAI's and vLLM's documentation that must be known, whatever their status.
DOCUMENTED_COMPLETIONS = """
best_of echo frequency_penalty logit_bias logprobs max_tokens model n presence_penalty prompt seed
stop stream stream_options suffix temperature top_p user use_beam_search top_k min_p
repetition_penalty length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens
skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens allowed_token_ids
prompt_logprobs add_special_tokens response_format structured_outputs priority request_id
logits_processors return_tokens_as_token_ids return_token_ids cache_salt kv_transfer_params
vllm_xargs prompt_embeds bad_words
"""
DOCUMENTED_RESPONSES = """
background context_management conversation include input instructions max_output_tokens
max_tool_calls metadata model parallel_tool_calls previous_response_id prompt prompt_cache_key
prompt_cache_retention reasoning safety_identifier service_tier store stream stream_options
temperature text tool_choice tools top_logprobs top_p truncation user
"""
DOCUMENTED_CHAT = """
messages model audio frequency_penalty function_call functions logit_bias logprobs
max_completion_tokens max_tokens metadata modalities n parallel_tool_calls prediction
presence_penalty prompt_cache_key prompt_cache_retention reasoning_effort response_format
safety_identifier seed service_tier stop store stream stream_options temperature tool_choice tools
top_logprobs top_p user verbosity web_search_options use_beam_search top_k min_p
repetition_penalty length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens
skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens prompt_logprobs
allowed_token_ids bad_words echo add_generation_prompt continue_final_message add_special_tokens
documents chat_template chat_template_kwargs mm_processor_kwargs structured_outputs priority
request_id logits_processors return_tokens_as_token_ids return_token_ids cache_salt
kv_transfer_params vllm_xargs include_reasoning
"""


def test_everything_documented_elsewhere_is_known() -> None:
    completions = {*CompletionBody.model_fields, *NEUTRAL_COMPLETION}
    chat = {*ChatBody.model_fields, *NEUTRAL_CHAT}
    assert set(DOCUMENTED_COMPLETIONS.split()) <= completions
    assert set(DOCUMENTED_CHAT.split()) <= chat
    assert set(DOCUMENTED_RESPONSES.split()) <= {*ResponsesBody.model_fields, *NEUTRAL_RESPONSES}


CASES = [
    *((parse_completion, {"prompt": "x"}, name, value) for name, value in _wrong(CompletionBody)),
    *((parse_completion, {"prompt": "x"}, name, ["x"]) for name in NEUTRAL_COMPLETION),
    *((parse_chat, {"messages": USER}, name, value) for name, value in _wrong(ChatBody)),
    *((parse_chat, {"messages": USER}, name, ["x"]) for name in NEUTRAL_CHAT),
    *((parse_responses, {"input": "x"}, name, value) for name, value in _wrong(ResponsesBody)),
    *((parse_responses, {"input": "x"}, name, ["x"]) for name in NEUTRAL_RESPONSES),
]


@pytest.mark.parametrize(("parse", "body", "name", "value"), CASES)
def test_what_is_not_honoured_is_refused_by_name(
    parse: Callable[[bytes], object], body: dict[str, Any], name: str, value: object
) -> None:
    parse(json.dumps(body).encode())
    with pytest.raises(ApiError) as caught:
        parse(json.dumps({**body, name: value}).encode())
    assert caught.value.status == 400
    assert str(caught.value.param).partition(".")[0] == name
    assert name in caught.value.message


@pytest.mark.parametrize(
    ("parse", "body"), [(parse_completion, {"prompt": "x"}), (parse_chat, {"messages": USER})]
)
def test_null_asks_for_nothing(parse: Callable[[bytes], object], body: dict[str, Any]) -> None:
    model = CompletionBody if "prompt" in body else ChatBody
    neutral = NEUTRAL_COMPLETION if "prompt" in body else NEUTRAL_CHAT
    nulls = dict.fromkeys([*model.model_fields, *neutral])
    parse(json.dumps({**nulls, **body}).encode())
    for name, values in neutral.items():
        for value in values:
            parse(json.dumps({**body, name: value}).encode())
