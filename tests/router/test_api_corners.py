"""Corners of the API where other servers went wrong, each as clients meet it."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from benchmarks.stub_pair import Script
from tests.router.harness import Answer, Harness, alphabet, endless, router, saying
from wire.request_messages import Prefill

CHAT = "/v1/chat/completions"


async def ask(harness: Harness, chat: bool, **fields: Any) -> Answer:
    return await (harness.chat(**fields) if chat else harness.complete(**fields))


def text(choice: dict[str, Any]) -> str:
    return str(choice["text"] if "text" in choice else choice["delta"].get("content", ""))


both = pytest.mark.parametrize("chat", [False, True], ids=["completions", "chat"])


@both
def test_each_choice_of_a_stream_opens_once_and_ends_once(chat: bool) -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            events = (await ask(harness, chat, n=3, max_tokens=4, stream=True)).events
            assert len({(e["id"], e["created"], e["model"], e["object"]) for e in events}) == 1
            choices = [choice for event in events for choice in event["choices"]]
            finishes = [c["index"] for c in choices if c["finish_reason"] is not None]
            assert sorted(finishes) == [0, 1, 2]
            for choice in choices:
                assert choice["finish_reason"] in (None, "length"), "null, never an empty string"
                assert choice["finish_reason"] is None or text(choice) == ""
            for index in range(3):
                mine = [choice for choice in choices if choice["index"] == index]
                assert "".join(text(choice) for choice in mine) == "abcd"
                assert mine[-1]["finish_reason"] == "length"
            if chat:
                roles = Counter(c["index"] for c in choices if "role" in c["delta"])
                assert roles == {0: 1, 1: 1, 2: 1}

    asyncio.run(scenario())


@both
def test_usage_comes_alone_and_last_with_an_empty_choices(chat: bool) -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            options = {"include_usage": True}
            answer = await ask(
                harness, chat, n=2, max_tokens=3, stream=True, stream_options=options
            )
            *others, last = answer.events
            assert all(event["usage"] is None and event["choices"] for event in others)
            assert last["choices"] == []
            assert last["usage"]["completion_tokens"] == 6
            whole = (await ask(harness, chat, n=2, max_tokens=3)).json
            assert last["usage"] == whole["usage"]
            plain = await ask(harness, chat, max_tokens=3, stream=True)
            assert all("usage" not in event and event["choices"] for event in plain.events)

    asyncio.run(scenario())


@both
@pytest.mark.parametrize(
    ("says", "stops", "shown"),
    [
        ("Hello\nUser: hi", ["\nUser:"], "Hello"),
        ("aXYb", ["XYZ", "Yb"], "aX"),
        ("né🎉x", ["🎉"], "né"),
        ("stop", ["stop"], ""),
        ("s", ["s", *map(str, range(15))], ""),
        ("almost STO", ["STOP"], "almost STO"),
    ],
)
def test_nothing_of_a_stop_string_is_shown(
    chat: bool, says: str, stops: list[str], shown: str
) -> None:
    """One byte per token, so that every stop string lies across chunks."""

    async def scenario() -> None:
        async with router(saying(says)) as harness:
            fields: dict[str, Any] = {"stop": stops, "max_tokens": 99}
            whole = (await ask(harness, chat, **fields)).json["choices"][0]
            assert (whole["message"]["content"] if chat else whole["text"]) == shown
            events = (await ask(harness, chat, **fields, stream=True)).events
            choices = [event["choices"][0] for event in events]
            pieces = [text(choice) for choice in choices]
            assert "".join(pieces) == shown
            assert choices[-1]["finish_reason"] == whole["finish_reason"] == "stop"

    asyncio.run(scenario())


FIRST: dict[str, tuple[Script, dict[str, Any], str, str, int]] = {
    "the end token": (saying(""), {}, "", "stop", 1),
    "a stop string": (saying("abc"), {"stop": "a"}, "", "stop", 1),
    "all there is": (endless, {"max_tokens": 1}, "a", "length", 1),
    "half a character": (saying("é"), {"max_tokens": 1}, "\ufffd", "length", 1),
    "the beginning of a stop string": (endless, {"max_tokens": 1, "stop": "ab"}, "a", "length", 1),
}


@both
@pytest.mark.parametrize("case", FIRST)
@pytest.mark.parametrize("stream", [False, True])
def test_the_first_token_is(case: str, chat: bool, stream: bool) -> None:
    """The prefill node's token, which may end everything."""
    script, fields, shown, finish, count = FIRST[case]

    async def scenario() -> None:
        async with router(script) as harness:
            usage = {"stream_options": {"include_usage": True}} if stream else {}
            answer = await ask(
                harness, chat, **fields, stream=stream, logprobs=(True and chat) or 0, **usage
            )
            assert answer.status == 200, answer.body
            if stream:
                *events, last = answer.events
                choices = [event["choices"][0] for event in events]
                assert "".join(text(choice) for choice in choices) == shown
                assert choices[-1]["finish_reason"] == finish
                assert last["usage"]["completion_tokens"] == count
                told = [choice["logprobs"] for choice in choices if choice["logprobs"]]
                assert len(told) == 1
            else:
                (choice,) = answer.json["choices"]
                assert (choice["message"]["content"] if chat else choice["text"]) == shown
                assert choice["finish_reason"] == finish
                assert answer.json["usage"]["completion_tokens"] == count
                entries = choice["logprobs"]["content" if chat else "tokens"]
                assert len(entries) == count

    asyncio.run(scenario())


def test_roles_and_content_parts() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
            messages = [
                {"role": "developer", "content": "brief"},
                {"role": "user", "content": parts, "name": "me"},
                {"role": "assistant", "content": "", "refusal": None, "tool_calls": None},
                {"role": "user", "content": "c"},
            ]
            assert (await harness.post(CHAT, {"messages": messages})).status == 200
            (sent,) = harness.sent(Prefill)
            assert bytes(token for token in sent.tokens if token < 256) == b"<|system|>briefa\nbc"

    asyncio.run(scenario())


def test_many_choices_and_one_too_many() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            body = (await harness.complete(n=128, max_tokens=2)).json
            assert [choice["index"] for choice in body["choices"]] == list(range(128))
            assert {choice["text"] for choice in body["choices"]} == {alphabet(2)}
            assert (await harness.complete(n=129)).error["param"] == "n"

    asyncio.run(scenario())


def test_seeds_belong_to_the_request_and_the_choice() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            seeds = []
            for fields in ({"seed": 3}, {"seed": 3}, {"seed": 4}, {}, {}):
                await harness.complete(**fields, max_tokens=1)
                seeds.append(harness.sent(Prefill)[-1].sampling.seed)
            assert seeds[0] == seeds[1]
            assert len(set(seeds)) == 4
            await harness.complete(seed=3, n=3, max_tokens=1)
            of_choices = [message.sampling.seed for message in harness.sent(Prefill)[-3:]]
            assert len(set(of_choices)) == 3
            assert seeds[0] in of_choices

    asyncio.run(scenario())


@both
def test_too_long_is_a_400_in_the_words_that_clients_match(chat: bool) -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            for stream in (False, True):
                answer = await ask(harness, chat, max_tokens=512, stream=stream)
                assert answer.status == 400
                assert answer.error["code"] == "context_length_exceeded"
                assert "maximum context length is 512 tokens" in answer.error["message"]
            assert harness.sent(Prefill) == []

    asyncio.run(scenario())
