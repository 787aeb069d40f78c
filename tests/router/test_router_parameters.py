"""The smaller parameters, each seen in what reaches the nodes or in what comes back."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from router.admission import Admission
from tests.router import tiny_tokenizer
from tests.router.harness import Answer, Harness, endless, eventually, router, saying
from wire.request_messages import Prefill
from wire.types import FinishReason

EOS = tiny_tokenizer.EOS
USER = {"role": "user", "content": "hi"}


def prompt_of(harness: Harness) -> str:
    """The prompt that reached the nodes last, special tokens spelled out."""
    tokens = list(harness.sent(Prefill)[-1].tokens)
    return str(tiny_tokenizer.build().decode(tokens, skip_special_tokens=False))


def text_of(answer: Answer) -> str:
    (choice,) = answer.json["choices"]
    return str(choice.get("text", choice.get("message", {}).get("content")))


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_in_the_output(stream: bool) -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            answer = await harness.complete(
                max_tokens=100, stop=["klm"], include_stop_str_in_output=True, stream=stream
            )
            if stream:
                texts = [event["choices"][0]["text"] for event in answer.events]
                assert "".join(texts) == "abcdefghijklm"
            else:
                assert text_of(answer) == "abcdefghijklm"

    asyncio.run(scenario())


def test_a_stop_token_in_the_output() -> None:
    def script(request: Prefill, index: int) -> tuple[int, FinishReason | None]:
        return ord("a") + index, FinishReason.STOP if index == 2 else None

    async def scenario() -> None:
        async with router(script) as harness:
            assert text_of(await harness.complete()) == "ab"
            assert text_of(await harness.complete(include_stop_str_in_output=True)) == "abc"

    asyncio.run(scenario())


def test_special_tokens_in_the_output() -> None:
    def script(request: Prefill, index: int) -> tuple[int, FinishReason | None]:
        return [ord("a"), 258, ord("b")][index], FinishReason.LENGTH if index == 2 else None

    async def scenario() -> None:
        async with router(script) as harness:
            assert text_of(await harness.complete()) == "ab"
            shown = await harness.complete(skip_special_tokens=False)
            assert text_of(shown) == "a<|assistant|>b"

    asyncio.run(scenario())


def test_truncated_prompts() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            body = (await harness.complete(prompt="hello", truncate_prompt_tokens=2)).json
            assert prompt_of(harness) == "lo"
            assert body["usage"]["prompt_tokens"] == 2
            echoed = await harness.complete(prompt="hello", truncate_prompt_tokens=3, echo=True)
            assert text_of(echoed).startswith("lloabc")
            assert (await harness.complete(prompt="x" * 600)).status == 400
            body = (await harness.complete(prompt="x" * 600, truncate_prompt_tokens=-1)).json
            assert body["usage"]["prompt_tokens"] == 512 - 16
            await harness.chat(truncate_prompt_tokens=4)
            assert prompt_of(harness) == "hi</s><|assistant|>"

    asyncio.run(scenario())


def test_chat_rendering() -> None:
    """The model's template, told how to end the prompt."""
    talk = [USER, {"role": "assistant", "content": "I say "}]

    async def ask(harness: Harness, **fields: Any) -> str:
        answer = await harness.post("/v1/chat/completions", {"messages": talk, **fields})
        assert answer.status == 200, answer.body
        return prompt_of(harness)

    async def scenario() -> None:
        async with router(saying("so")) as harness:
            turns = "<|user|>hi</s><|assistant|>I say </s>"
            assert await ask(harness) == turns + "<|assistant|>"
            assert await ask(harness, add_generation_prompt=False) == turns
            goes_on = {"add_generation_prompt": False, "continue_final_message": True}
            assert await ask(harness, **goes_on) == "<|user|>hi</s><|assistant|>I say "
            kwargs = {"eos_token": "!", "messages": []}  # what the request said is not replaced
            assert await ask(harness, chat_template_kwargs=kwargs) == (
                "<|user|>hi!<|assistant|>I say !<|assistant|>"
            )

    asyncio.run(scenario())


def test_a_template_of_the_request_where_it_is_trusted() -> None:
    async def scenario() -> None:
        async with router(endless, trust_request_chat_template=True) as harness:
            template = "{{ eos_token }}{{ mood }}{{ messages[0].content }}"
            kwargs = {"mood": "sad "}
            answer = await harness.chat(chat_template=template, chat_template_kwargs=kwargs)
            assert answer.status == 200
            assert prompt_of(harness) == "</s>sad hi"
            for bad in (
                "{% for %}",
                "{{ ''.__class__.__mro__ }}{{ messages.x.y }}",
                "{{ 1 // 0 }}",
            ):
                refused = await harness.chat(chat_template=bad)
                assert refused.status == 400, bad
            assert (await harness.chat()).status == 200

    asyncio.run(scenario())


def test_lower_priority_values_go_first() -> None:
    queue: Admission[str] = Admission(max_active=1, max_waiting=9)
    assert queue.enter("running")
    for key, priority in (("a", 5), ("b", 0), ("c", -1), ("d", 0)):
        assert not queue.enter(key, priority)
    order = []
    queue.leave("running")
    while (first := queue.next(0.0)) is not None:
        order.append(first)
        queue.leave(first)
    assert order == ["c", "b", "d", "a"]


def test_priority_reaches_the_queue() -> None:
    async def scenario() -> None:
        async with router(endless, max_streams=1) as harness:
            harness.pair.prefill_hangs = True
            requests = harness.server.control.requests
            tasks = [asyncio.create_task(harness.complete(prompt="first"))]
            await eventually(lambda: len(harness.sent(Prefill)) == 1)
            tasks.append(asyncio.create_task(harness.complete(prompt="late", priority=3)))
            await eventually(lambda: requests.num_waiting == 1)
            tasks.append(asyncio.create_task(harness.complete(prompt="soon", priority=-3)))
            await eventually(lambda: requests.num_waiting == 2)
            tasks[0].cancel()
            await eventually(lambda: len(harness.sent(Prefill)) == 2)
            assert prompt_of(harness) == "soon"
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(scenario())
