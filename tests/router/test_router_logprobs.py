"""Logprobs, echo and best_of over real sockets, in OpenAI's two schemas and vLLM's third."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from router.choice_text import Told
from router.logprobs import TokenNames, chat_logprobs, completion_logprobs
from router.tokenizer import tokenizer_from_files
from tests.router import tiny_tokenizer
from tests.router.harness import Answer, endless, router, saying
from wire.logprobs import TokenLogprobs, pack
from wire.request_messages import Prefill
from wire.types import FinishReason

TEXT = "aé🎉b"
TOKENS = list(TEXT.encode())
EOS = tiny_tokenizer.EOS
NAMES = [
    "a",
    r"bytes:\xc3",
    r"bytes:\xa9",
    r"bytes:\xf0",
    r"bytes:\x9f",
    r"bytes:\x8e",
    r"bytes:\x89",
]
NAMES += ["b", "</s>"]


def merged(answer: Answer) -> dict[str, Any]:
    """The only choice of a stream: text, and its logprobs put together again."""
    text, logprobs = "", dict[str, Any]()
    for event in answer.events:
        (choice,) = event["choices"]
        delta = choice.get("delta", {"content": choice.get("text")}).get("content") or ""
        text += delta
        for key, value in (choice["logprobs"] or {}).items():
            logprobs[key] = logprobs.get(key, []) + value if value is not None else None
    return {"text": text, "logprobs": logprobs, "finish_reason": choice["finish_reason"]}


@pytest.mark.parametrize("stream", [False, True])
def test_completion_logprobs(stream: bool) -> None:
    async def scenario() -> None:
        async with router(saying(TEXT)) as harness:
            answer = await harness.complete(max_tokens=50, logprobs=2, stream=stream)
            choice = merged(answer) if stream else answer.json["choices"][0]
            assert choice["text"] == TEXT
            logprobs = choice["logprobs"]
            assert list(logprobs) == ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
            assert logprobs["tokens"] == NAMES
            assert logprobs["token_logprobs"] == [-0.5] * len(NAMES)
            assert logprobs["top_logprobs"][0] == {"a": -0.5, "b": -1.0}
            assert logprobs["top_logprobs"][1] == {r"bytes:\xc3": -0.5, r"bytes:\xc4": -1.0}
            assert logprobs["text_offset"] == [0, 1, 1, 2, 2, 2, 2, 3, 4]

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(stream: bool) -> None:
    async def scenario() -> None:
        async with router(saying(TEXT)) as harness:
            answer = await harness.chat(logprobs=True, top_logprobs=1, stream=stream)
            choice = merged(answer) if stream else answer.json["choices"][0]
            assert set(choice["logprobs"]) == {"content", "refusal"}
            assert choice["logprobs"]["refusal"] is None
            content = choice["logprobs"]["content"]
            spelled = b"".join(bytes(entry["bytes"]) for entry in content)
            assert spelled.decode() == f"{TEXT}</s>"
            assert [entry["token"] for entry in content] == [
                name.removeprefix("bytes:") for name in NAMES
            ]
            assert content[0] == {
                "token": "a",
                "logprob": -0.5,
                "bytes": [97],
                "top_logprobs": [{"token": "a", "logprob": -0.5, "bytes": [97]}],
            }
            only = (await harness.chat(logprobs=True)).json["choices"][0]["logprobs"]["content"]
            assert [entry["top_logprobs"] for entry in only] == [[]] * len(content)

    asyncio.run(scenario())


def test_who_does_not_ask_gets_none() -> None:
    async def scenario() -> None:
        async with router(saying(TEXT)) as harness:
            for answer in (await harness.complete(), await harness.chat(logprobs=False)):
                assert answer.json["choices"][0]["logprobs"] is None
            (prefill, *_) = harness.sent(Prefill)
            assert prefill.sampling.logprobs is prefill.sampling.prompt_logprobs is None

    asyncio.run(scenario())


def test_every_chunk_has_the_logprobs_of_its_text() -> None:
    async def scenario() -> None:
        async with router(saying("xyzSTOPped")) as harness:
            answer = await harness.complete(
                max_tokens=50, logprobs=0, stop=["STOP", "zS!"], stream=True
            )
            for event in answer.events[:-2]:
                (choice,) = event["choices"]
                assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
            whole = merged(answer)
            assert whole["text"] == "xyz"
            assert whole["logprobs"]["tokens"] == list("xyzSTOP")
            assert whole["logprobs"]["text_offset"] == [0, 1, 2, 3, 3, 3, 3]

    asyncio.run(scenario())


def test_what_json_cannot_say_is_said_as_openai_does() -> None:
    names = TokenNames(tokenizer_from_files(tiny_tokenizer.files(), "test"))
    row = pack(TokenLogprobs(-math.inf, 9, ((98, -0.0), (99, -math.inf))))
    told = completion_logprobs([Told(97, row, 0)], names, 2)
    assert told["token_logprobs"] == [-9999.0]
    assert told["top_logprobs"] == [{"b": 0.0, "c": -9999.0, "a": -9999.0}]
    content = chat_logprobs([Told(97, row, 0)], names, 1)["content"]
    assert content[0]["logprob"] == -9999.0


def test_tokens_as_ids_do_not_move_the_offsets() -> None:
    async def scenario() -> None:
        async with router(saying("ab")) as harness:
            fields = {"logprobs": 1, "return_tokens_as_token_ids": True}
            choice = (await harness.complete(**fields)).json["choices"][0]
            assert choice["logprobs"]["tokens"] == ["token_id:97", "token_id:98", f"token_id:{EOS}"]
            assert choice["logprobs"]["top_logprobs"][0] == {"token_id:97": -0.5}
            assert choice["logprobs"]["text_offset"] == [0, 1, 2]

    asyncio.run(scenario())


# ---------------------------------------------------------------- the prompt


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(stream: bool) -> None:
    async def scenario() -> None:
        async with router(saying("xy")) as harness:
            answer = await harness.complete(prompt="né", echo=True, logprobs=1, stream=stream)
            choice = merged(answer) if stream else answer.json["choices"][0]
            assert choice["text"] == "néxy"
            logprobs = choice["logprobs"]
            assert logprobs["tokens"] == ["n", r"bytes:\xc3", r"bytes:\xa9", "x", "y", "</s>"]
            assert logprobs["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5, -0.5]
            assert logprobs["top_logprobs"][0] is None
            assert logprobs["top_logprobs"][1] == {r"bytes:\xc3": -0.5}
            assert logprobs["text_offset"] == [0, 1, 1, 2, 3, 4]

    asyncio.run(scenario())


def test_echo_alone_and_with_token_prompts() -> None:
    async def scenario() -> None:
        async with router(saying("xy")) as harness:
            body = (await harness.complete(prompt=[[104, EOS], [105]], echo=True, n=2)).json
            texts = [choice["text"] for choice in body["choices"]]
            assert texts == ["h</s>xy", "h</s>xy", "ixy", "ixy"]
            assert all(
                message.sampling.prompt_logprobs is None for message in harness.sent(Prefill)
            )
            stream = await harness.complete(prompt=[104, 105], echo=True, stream=True)
            assert merged(stream)["text"] == "hixy"

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_without_output(stream: bool) -> None:
    """How loglikelihoods are asked for: nothing is generated, shown or counted."""

    async def scenario() -> None:
        async with router(saying("xy")) as harness:
            fields = {"prompt": [104, 105], "echo": True, "max_tokens": 0, "logprobs": 1}
            usage = {"stream_options": {"include_usage": True}} if stream else {}
            answer = await harness.complete(**fields, stream=stream, **usage)
            if stream:
                assert answer.events[-1]["usage"]["completion_tokens"] == 0
                events = [event for event in answer.events if event["choices"]]
                texts = [event["choices"][0]["text"] for event in events]
                assert texts == ["hi", ""]
                choice = events[0]["choices"][0]
                assert events[1]["choices"][0]["finish_reason"] == "length"
            else:
                choice = answer.json["choices"][0]
                assert choice["text"] == "hi"
                assert choice["finish_reason"] == "length"
                assert answer.json["usage"]["completion_tokens"] == 0
            assert choice["logprobs"]["tokens"] == ["h", "i"]
            assert choice["logprobs"]["token_logprobs"] == [None, -0.5]

    asyncio.run(scenario())


def test_prompt_logprobs_are_asked_for_once_per_prompt() -> None:
    async def scenario() -> None:
        async with router(saying("x")) as harness:
            body = (await harness.complete(prompt="hi", n=2, prompt_logprobs=2)).json
            told = [choice["prompt_logprobs"] for choice in body["choices"]]
            i = {"logprob": -0.5, "rank": 1, "decoded_token": "i"}
            j = {"logprob": -1.0, "rank": 2, "decoded_token": "j"}
            assert told == [[None, {"105": i, "106": j}]] * 2
            asked = [message.sampling.prompt_logprobs for message in harness.sent(Prefill)]
            assert sorted(asked, key=str) == [2, None]
            chat = (await harness.chat(prompt_logprobs=0)).json
            assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
            assert "prompt_logprobs" not in chat["choices"][0]

    asyncio.run(scenario())


def test_the_server_bounds_what_may_be_asked() -> None:
    async def scenario() -> None:
        async with router(endless, max_logprobs=3) as harness:
            assert (await harness.complete(logprobs=3)).status == 200
            for refused, param in (
                (await harness.complete(logprobs=4), "logprobs"),
                (await harness.complete(prompt_logprobs=4), "prompt_logprobs"),
                (await harness.chat(logprobs=True, top_logprobs=4), "top_logprobs"),
            ):
                assert (refused.status, refused.error["param"]) == (400, param)

    asyncio.run(scenario())


def test_all_logprobs_of_a_request_fit_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.checks.MAX_PAIRS", 100)

    async def scenario() -> None:
        async with router(endless) as harness:
            assert (await harness.complete(max_tokens=50, logprobs=1)).status == 200
            cases: list[tuple[dict[str, Any], str]] = [
                ({"max_tokens": 51, "logprobs": 1}, "logprobs"),
                ({"prompt": "x" * 51, "prompt_logprobs": 1}, "prompt_logprobs"),
                ({"prompt": "x" * 40, "echo": True, "max_tokens": 11, "logprobs": 1}, "logprobs"),
            ]
            for fields, param in cases:
                refused = await harness.complete(**fields)
                assert (refused.status, refused.error["param"]) == (400, param)

    asyncio.run(scenario())


def test_long_answers_are_written_in_a_thread_and_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        async with router(saying("xyz")) as harness:
            fields = {"prompt": "hé", "echo": True, "logprobs": 1, "prompt_logprobs": 0}
            inline = (await harness.complete(**fields)).json["choices"]
            monkeypatch.setattr("router.prompts.INLINE_TOKENS", 1)
            monkeypatch.setattr("router.generation.INLINE_TOKENS", 1)
            threads: list[Any] = []
            to_thread = asyncio.to_thread

            async def watch(work: Any, *args: Any) -> Any:
                threads.append(work.__name__)
                return await to_thread(work, *args)

            monkeypatch.setattr("asyncio.to_thread", watch)
            assert (await harness.complete(**fields)).json["choices"] == inline
            assert threads == ["echo_of", "_write"]

    asyncio.run(scenario())


# ---------------------------------------------------------------- best_of


def letters(request: Prefill, index: int) -> tuple[int, FinishReason | None]:
    """The more tokens, the less probable; choice 0 says four, choice 1 three, …"""
    number = int(request.id.request.rpartition("-")[2])
    last = index == 3 - number % 3
    return ord("a") + number, FinishReason.LENGTH if last else None


def test_best_of_answers_the_most_probable() -> None:
    async def scenario() -> None:
        async with router(letters) as harness:
            body = (await harness.complete(n=2, best_of=3, max_tokens=4)).json
            assert [choice["text"] for choice in body["choices"]] == ["cc", "bbb"]
            assert [choice["index"] for choice in body["choices"]] == [0, 1]
            assert body["choices"][0]["logprobs"] is None
            assert body["usage"]["completion_tokens"] == 2 + 3 + 4  # all were sampled
            assert len(harness.sent(Prefill)) == 3

    asyncio.run(scenario())


# ---------------------------------------------------------------- when nodes die


def test_logprobs_survive_the_death_of_a_decode_node() -> None:
    """Each token has its logprobs once, though two nodes have told about some of them."""

    async def scenario() -> None:
        async with router(endless, step_s=0.01) as harness:
            await harness.add_pair(endless, step_s=0.01)
            task = asyncio.create_task(
                harness.complete(
                    prompt="hi", max_tokens=60, logprobs=1, echo=True, return_token_ids=True
                )
            )
            holder = await _holder_with_tokens(harness.pairs, 5)
            await holder.decode.close()
            body = (await task).json
            (choice,) = body["choices"]
            assert len(choice["token_ids"]) == 60
            expected = [104, 105, *choice["token_ids"]]
            assert choice["logprobs"]["tokens"] == [chr(token) for token in expected]
            assert choice["logprobs"]["token_logprobs"] == [None] + [-0.5] * 61
            assert len({m.id.attempt for m in harness.sent(Prefill)}) > 1

    asyncio.run(scenario())


async def _holder_with_tokens(pairs: list[Any], count: int) -> Any:
    async with asyncio.timeout(10):
        while True:
            for pair in pairs:
                for running in pair.running.values():
                    if len(running.tokens) >= count:
                        return pair
            await asyncio.sleep(0.005)
