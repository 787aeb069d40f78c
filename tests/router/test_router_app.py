"""The router's API over real sockets, with stub nodes behind it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from router.params import choice_seed
from tests.router import tiny_tokenizer
from tests.router.harness import Answer, alphabet, endless, eventually, router, saying
from wire.request_messages import Ack, Prefill, Reserve

TEXT = "Grüße, 世界 🎉!"


def completion_text(answer: Answer, index: int = 0) -> str:
    choices = [c for event in answer.events for c in event["choices"] if c["index"] == index]
    return "".join(choice["text"] for choice in choices)


def test_completion() -> None:
    async def scenario() -> None:
        async with router(saying(TEXT)) as harness:
            answer = await harness.complete(max_tokens=100)
            assert answer.status == 200
            body = answer.json
            assert body["object"] == "text_completion"
            assert body["model"] == "stub"
            assert body["id"].startswith("cmpl-")
            assert body["choices"] == [
                {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}
            ]
            num_output = len(TEXT.encode()) + 1  # the stop token counts
            assert body["usage"] == {
                "prompt_tokens": 2,
                "completion_tokens": num_output,
                "total_tokens": 2 + num_output,
                "prompt_tokens_details": {"cached_tokens": 0},
            }
            await eventually(lambda: not harness.pair.running)
            assert len(harness.sent(Ack)) == 1

    asyncio.run(scenario())


def test_token_ids_where_asked() -> None:
    async def scenario() -> None:
        async with router(saying(TEXT)) as harness:
            answer = await harness.complete(max_tokens=100, return_token_ids=True)
            assert answer.json["choices"][0]["token_ids"] == [*TEXT.encode(), tiny_tokenizer.EOS]
            chat = await harness.chat(return_token_ids=True)
            assert chat.json["choices"][0]["token_ids"] == [*TEXT.encode(), tiny_tokenizer.EOS]
            assert answer.json["choices"][0]["prompt_token_ids"] == list(b"hi")
            assert chat.json["prompt_token_ids"][-2:] == [256, 258]
            for stream in (
                await harness.complete(max_tokens=100, stream=True, return_token_ids=True),
                await harness.chat(stream=True, return_token_ids=True),
            ):
                first, *events = stream.events
                assert "prompt_token_ids" in str(first)
                told = [event["choices"][0].get("token_ids", []) for event in events]
                assert [token for tokens in told for token in tokens] == [
                    *TEXT.encode(),
                    tiny_tokenizer.EOS,
                ]

    asyncio.run(scenario())


def test_streamed_completion_is_the_same_text() -> None:
    async def scenario() -> None:
        async with router(saying(TEXT)) as harness:
            answer = await harness.complete(max_tokens=100, stream=True)
            assert answer.headers["Content-Type"].startswith("text/event-stream")
            assert completion_text(answer) == TEXT
            events = answer.events
            assert "\ufffd" not in answer.body.decode()
            assert len({(e["id"], e["created"], e["model"], e["object"]) for e in events}) == 1
            assert all("usage" not in event for event in events)
            reasons = [event["choices"][0]["finish_reason"] for event in events]
            assert reasons == [None] * (len(events) - 1) + ["stop"]

    asyncio.run(scenario())


def test_chat_and_its_stream() -> None:
    async def scenario() -> None:
        async with router(saying(TEXT)) as harness:
            body = (await harness.chat()).json
            assert body["object"] == "chat.completion"
            message = body["choices"][0]["message"]
            assert message == {"role": "assistant", "content": TEXT, "refusal": None}
            events = (await harness.chat(stream=True)).events
            assert {event["object"] for event in events} == {"chat.completion.chunk"}
            deltas = [event["choices"][0]["delta"] for event in events]
            assert deltas[0] == {"role": "assistant", "content": ""}
            assert all("role" not in delta for delta in deltas[1:])
            assert "".join(delta.get("content", "") for delta in deltas) == TEXT
            assert deltas[-1] == {}
            assert events[-1]["choices"][0]["finish_reason"] == "stop"

    asyncio.run(scenario())


def test_usage_only_where_asked() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            harness.pair.num_cached_tokens = 1
            options = {"include_usage": True}
            events = (await harness.complete(stream=True, stream_options=options)).events
            assert all(event["usage"] is None for event in events[:-1])
            assert events[-1]["choices"] == []
            assert events[-1]["usage"]["completion_tokens"] == 16  # the default for completions
            assert events[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
            options["continuous_usage_stats"] = True
            events = (await harness.complete(stream=True, stream_options=options)).events
            counts = [event["usage"]["completion_tokens"] for event in events]
            assert counts == sorted(counts)
            assert counts[-1] == 16

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_the_request_on_both_nodes(stream: bool) -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            answer = await harness.complete(max_tokens=400, stop=["klm"], stream=stream)
            if stream:
                assert completion_text(answer) == "abcdefghij"
                assert answer.events[-1]["choices"][0]["finish_reason"] == "stop"
            else:
                assert answer.json["choices"][0]["text"] == "abcdefghij"
                assert answer.json["usage"]["completion_tokens"] == 13
            await eventually(lambda: not harness.pair.running)

    asyncio.run(scenario())


def test_several_prompts_and_choices() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            fields = {"prompt": ["one", "two"], "n": 2, "max_tokens": 3, "seed": 7}
            body = (await harness.complete(**fields)).json
            assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
            assert {choice["text"] for choice in body["choices"]} == {"abc"}
            assert body["usage"]["prompt_tokens"] == 6
            assert body["usage"]["completion_tokens"] == 12
            sent: list[Prefill] = sorted(harness.sent(Prefill), key=lambda p: p.id.request)
            assert [message.id.request[-2:] for message in sent] == ["-0", "-1", "-2", "-3"]
            assert [bytes(message.tokens) for message in sent] == [b"one", b"one", b"two", b"two"]
            seeds = [message.sampling.seed for message in sent]
            assert seeds == [choice_seed(7, number) for number in (0, 1, 0, 1)]
            answer = await harness.complete(**fields, stream=True)
            assert [completion_text(answer, index) for index in range(4)] == ["abc"] * 4
            finishes = [
                choice["index"]
                for event in answer.events
                for choice in event["choices"]
                if choice["finish_reason"] is not None
            ]
            assert sorted(finishes) == [0, 1, 2, 3]

    asyncio.run(scenario())


def test_later_choices_wait_for_the_first_ones_decode_node() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            harness.pair.prefill_hangs = True
            task = asyncio.create_task(harness.complete(n=3))
            await eventually(lambda: len(harness.sent(Prefill)) == 1)
            await asyncio.sleep(0.1)
            assert len(harness.sent(Prefill)) == 1
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(scenario())


def test_one_token_reserves_nothing() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            body = (await harness.complete(max_tokens=1, n=2)).json
            assert [choice["text"] for choice in body["choices"]] == ["a", "a"]
            assert harness.sent(Reserve) == []
            assert all(message.grant is None for message in harness.sent(Prefill))

    asyncio.run(scenario())


def test_first_token_may_end_the_request() -> None:
    async def scenario() -> None:
        async with router(saying("")) as harness:
            body = (await harness.complete(max_tokens=9)).json
            assert body["choices"][0]["text"] == ""
            assert body["choices"][0]["finish_reason"] == "stop"
            assert body["usage"]["completion_tokens"] == 1
            assert harness.sent(Ack) == []

    asyncio.run(scenario())


def test_sampling_parameters_reach_the_nodes() -> None:
    fields: dict[str, Any] = {
        "max_tokens": 5,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "logit_bias": {"65": -100},
        "stop_token_ids": [70],
        "min_tokens": 2,
        "ignore_eos": True,
        "cache_salt": "tenant",
        "seed": -1,
    }

    async def scenario() -> None:
        async with router(endless) as harness:
            await harness.complete(**fields)
            (reserve,) = harness.sent(Reserve)
            (prefill,) = harness.sent(Prefill)
            assert reserve.sampling == prefill.sampling
            assert reserve.cache_salt == prefill.cache_salt == "tenant"
            sampling = prefill.sampling
            assert sampling.seed == choice_seed((1 << 64) - 1, 0)
            assert sampling.logit_bias == {65: -100.0}
            assert sampling.stop_token_ids == (70,)
            same = set(fields) - {"seed", "logit_bias", "stop_token_ids", "cache_salt"}
            assert all(getattr(sampling, name) == fields[name] for name in same)

    asyncio.run(scenario())


def test_max_completion_tokens_wins_and_chat_fills_the_context() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            await harness.chat(max_tokens=3, max_completion_tokens=5)
            body = (await harness.chat()).json
            limits = [message.sampling.max_tokens for message in harness.sent(Prefill)]
            prompt = body["usage"]["prompt_tokens"]
            assert limits == [5, 512 - prompt]
            assert body["choices"][0]["message"]["content"] == alphabet(512 - prompt)

    asyncio.run(scenario())


def test_token_prompts() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            await harness.complete(prompt=[104, 105])
            await harness.complete(prompt=[[104], [105]])
            prompts = [bytes(message.tokens) for message in harness.sent(Prefill)]
            assert sorted(prompts) == [b"h", b"hi", b"i"]

    asyncio.run(scenario())


def test_models_health_ready_metrics() -> None:
    async def scenario() -> None:
        async with router() as harness:
            assert (await harness.get("/health")).status == 200
            ready = await harness.get("/ready")
            assert (ready.status, ready.json["ready"]) == (503, False)
            assert (await harness.get("/v1/models")).json["data"] == []
            refused = await harness.complete()
            assert (refused.status, refused.error["code"]) == (503, "no_nodes")
            assert int(refused.headers["Retry-After"]) >= 1
            await harness.add_pair(endless)
            assert (await harness.get("/ready")).status == 200
            (model,) = (await harness.get("/v1/models")).json["data"]
            assert (model["id"], model["max_model_len"]) == ("stub", 512)
            assert (await harness.get("/v1/models/stub")).json == model
            assert (await harness.get("/v1/models/none")).status == 404
            await harness.complete(model="stub")
            text = (await harness.get("/metrics")).body.decode()
            assert (
                'vllm:request_success_total{finished_reason="length",model_name="stub"} 1' in text
            )
            assert 'vllm:generation_tokens_total{model_name="stub"} 16' in text
            assert 'vllm:time_to_first_token_seconds_count{model_name="stub"} 1' in text
            assert 'baton_router_nodes{role="decode",state="serving"} 1' in text

    asyncio.run(scenario())


def test_served_model_names() -> None:
    async def scenario() -> None:
        async with router(endless, served_model_name=("first", "second")) as harness:
            assert (await harness.complete(model="second")).json["model"] == "first"
            assert (await harness.complete(model="stub")).status == 404

    asyncio.run(scenario())


def test_unknown_fields_of_responses_do_not_appear() -> None:
    """The exact keys of OpenAI's chunk: clients validate them."""

    async def scenario() -> None:
        async with router(endless) as harness:
            event = (await harness.chat(stream=True, max_tokens=2)).events[0]
            assert set(event) == {"id", "object", "created", "model", "choices"}
            assert set(event["choices"][0]) == {"index", "delta", "logprobs", "finish_reason"}
            body = (await harness.complete(max_tokens=2)).json
            assert json.dumps(body)
            assert set(body) == {"id", "object", "created", "model", "choices", "usage"}

    asyncio.run(scenario())
