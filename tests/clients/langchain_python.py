"""`langchain-openai`: chat and completions."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

from tests.clients.cases import PROMPT, Servers, main, num_aborted, wait_until

QUESTIONS = [f"Write function number {number}." for number in range(4)]


def chat(servers: Servers, **more: Any) -> ChatOpenAI:
    settings: dict[str, Any] = {
        "model": servers.model,
        "base_url": servers.base,
        "api_key": "none",
        "temperature": 0,
        "max_tokens": 24,
        "max_retries": 0,
    }
    return ChatOpenAI(**(settings | more))


def invoke_stream_and_batch(servers: Servers) -> None:
    model = chat(servers)
    alone = [model.invoke(question).content for question in QUESTIONS]
    assert all(alone)
    assert [answer.content for answer in model.batch(QUESTIONS)] == alone
    assert "".join(chunk.content for chunk in model.stream(QUESTIONS[0])) == alone[0]


def concurrently(servers: Servers) -> None:
    async def scenario() -> None:
        model = chat(servers)
        alone = [(await model.ainvoke(question)).content for question in QUESTIONS]
        together = await asyncio.gather(*(model.ainvoke(question) for question in QUESTIONS * 3))
        assert [answer.content for answer in together] == alone * 3
        pieces = [chunk.content async for chunk in model.astream(QUESTIONS[1])]
        assert "".join(pieces) == alone[1]

    asyncio.run(scenario())


def usage_and_finish(servers: Servers) -> None:
    model = chat(servers, stream_usage=True, extra_body={"ignore_eos": True})
    answer = model.invoke(QUESTIONS[0])
    assert answer.usage_metadata["output_tokens"] == 24
    assert answer.response_metadata["finish_reason"] == "length"
    total = None
    for chunk in model.stream(QUESTIONS[0]):
        total = chunk if total is None else total + chunk
    assert total is not None
    assert total.usage_metadata["output_tokens"] == 24
    assert total.response_metadata["finish_reason"] == "length"


def logprobs_stop_and_n(servers: Servers) -> None:
    answer = chat(servers, logprobs=True, top_logprobs=2).invoke(QUESTIONS[0])
    entries = answer.response_metadata["logprobs"]["content"]
    assert len(entries[0]["top_logprobs"]) == 2
    middle = answer.content[len(answer.content) // 2 :][:4]
    cut = chat(servers, stop=[middle]).invoke(QUESTIONS[0])
    assert cut.content == answer.content[: answer.content.index(middle)]
    sampled = chat(servers, n=2, temperature=1.0, seed=3)
    (several,) = sampled.generate([[HumanMessage("Hi")]]).generations
    assert len({choice.text for choice in several}) == 2


def completions(servers: Servers) -> None:
    model = OpenAI(
        model=servers.model,
        base_url=servers.base,
        api_key="none",
        temperature=0,
        max_tokens=16,
        max_retries=0,
    )
    text = model.invoke(PROMPT)
    assert text
    assert "".join(model.stream(PROMPT)) == text


def errors(servers: Servers) -> None:
    for kind, more in (
        (openai.NotFoundError, {"model": "other"}),
        (openai.BadRequestError, {"top_p": 7.0}),
        (openai.BadRequestError, {"max_tokens": 10**6}),
        (openai.AuthenticationError, {"base_url": servers.guarded_base, "api_key": "wrong"}),
    ):
        try:
            chat(servers, **more).invoke("Hi")
        except kind:
            continue
        raise AssertionError(f"no {kind.__name__} for {more}")


def the_rate_limit(servers: Servers) -> None:
    model = chat(servers, base_url=servers.guarded_base, api_key=servers.key, max_tokens=2)
    model.invoke("Hi")
    try:
        model.invoke("Hi")
    except openai.RateLimitError:
        return
    raise AssertionError("no RateLimitError")


def a_stream_that_is_left(servers: Servers) -> None:
    before = num_aborted(servers)
    model = chat(servers, max_tokens=1500, extra_body={"ignore_eos": True})
    stream = model.stream(QUESTIONS[0])
    next(stream)
    stream.close()
    wait_until(lambda: num_aborted(servers) == before + 1, "the request has ended")


class Person(BaseModel):
    """What the bundled model cannot say unless a grammar makes it."""

    is_tall: bool
    kind: Literal["child", "grown"]


def structured_output(servers: Servers) -> None:
    model = chat(servers, max_tokens=200)
    for method in ("json_schema", "function_calling"):
        structured = model.with_structured_output(Person, method=method)
        assert isinstance(structured.invoke(QUESTIONS[0]), Person)
    *_, last = model.with_structured_output(Person, method="json_schema").stream(QUESTIONS[0])
    assert isinstance(last, Person)


def tools(servers: Servers) -> None:
    """A call, its result, and an answer to both."""
    model = chat(servers, max_tokens=200)
    bound = model.bind_tools([Person], tool_choice="any", parallel_tool_calls=False)
    answer = bound.invoke(QUESTIONS[0])
    (call,) = answer.tool_calls
    assert (call["name"], set(call["args"])) == ("Person", {"is_tall", "kind"})
    total = None
    for chunk in bound.stream(QUESTIONS[0]):
        total = chunk if total is None else total + chunk
    assert total is not None
    assert [made["args"] for made in total.tool_calls] == [call["args"]]
    result = ToolMessage("grown", tool_call_id=call["id"])
    talk = [HumanMessage(QUESTIONS[0]), answer, result]
    assert chat(servers, max_tokens=4).bind_tools([Person]).invoke(talk).usage_metadata


def responses(servers: Servers) -> None:
    model = chat(servers, use_responses_api=True, max_tokens=16)
    whole = model.invoke(QUESTIONS[0])
    assert whole.text
    assert "".join(chunk.text for chunk in model.stream(QUESTIONS[0])) == whole.text
    person = chat(servers, use_responses_api=True, max_tokens=200).with_structured_output(Person)
    assert isinstance(person.invoke(QUESTIONS[0]), Person)


CASES = [
    invoke_stream_and_batch,
    concurrently,
    usage_and_finish,
    logprobs_stop_and_n,
    structured_output,
    tools,
    responses,
    completions,
    errors,
    the_rate_limit,
    a_stream_that_is_left,
]

if __name__ == "__main__":
    main(CASES)
