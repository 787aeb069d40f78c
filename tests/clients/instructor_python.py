"""`instructor`: plain answers, JSON that is only asked for, and objects by tools."""

from __future__ import annotations

from typing import Any, Literal

import instructor
import openai
from pydantic import BaseModel

from tests.clients.cases import MESSAGES, Servers, main

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


class Person(BaseModel):
    """What the bundled model cannot say unless a grammar makes it."""

    is_tall: bool
    kind: Literal["child", "grown"]


def client(servers: Servers, mode: Any = instructor.Mode.MD_JSON) -> Any:
    api = openai.OpenAI(base_url=servers.base, api_key="none", max_retries=0)
    return instructor.from_openai(api, mode=mode)


def failure_of(call: Any, **ask: Any) -> Exception:
    """What a call must raise; instructor wraps it in kinds of its own."""
    try:
        call(**ask)
    except Exception as error:
        return error
    raise AssertionError("the bundled model has learned JSON")


def plain_answers_pass_through(servers: Servers) -> None:
    ask = {"model": servers.model, "messages": MESSAGES, **GREEDY, "response_model": None}
    whole = client(servers).chat.completions.create(**ask)
    stream = client(servers).chat.completions.create(**ask, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content


def prose_instead_of_json_is_asked_for_again(servers: Servers) -> None:
    """In this mode the schema stands in the prompt; each try is a longer conversation."""
    seen: list[Any] = []
    api = client(servers)
    api.on("completion:response", seen.append)
    error = failure_of(
        api.chat.completions.create,
        model=servers.model,
        messages=MESSAGES,
        response_model=Person,
        max_retries=2,
        stop=["e"],  # else its length would end the answer, which is not tried again
        **GREEDY,
    )
    assert "Retry" in type(error).__name__, error
    assert len(seen) >= 2
    assert seen[-1].usage.prompt_tokens > seen[0].usage.prompt_tokens


def grammars_give_an_object(servers: Servers) -> None:
    """A named function's arguments, and an answer, are held to their schema: the first one fits."""
    for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
        ask: dict[str, Any] = {
            "model": servers.model,
            "messages": MESSAGES,
            "response_model": Person,
            "max_retries": 1,
            "temperature": 0,
            "max_tokens": 200,
        }
        person = client(servers, mode).chat.completions.create(**ask)
        assert isinstance(person, Person), mode
    *_, last = client(servers, instructor.Mode.JSON_SCHEMA).chat.completions.create_partial(**ask)
    assert last.kind == person.kind


CASES = [
    plain_answers_pass_through,
    prose_instead_of_json_is_asked_for_again,
    grammars_give_an_object,
]

if __name__ == "__main__":
    main(CASES)
