"""POST /v1/embeddings against stub nodes: shapes, parameters, errors, lost nodes."""

from __future__ import annotations

import asyncio
import base64
import struct
from math import sqrt
from typing import Any

import pytest

from router.embeddings import WINDOW, embedding_of
from router.errors import ApiError
from tests.router.harness import Answer, Harness, endless, eventually, router
from tests.router.test_router_bad_input import check_error
from wire.request_messages import Abort, Embedding, Prefill, Reserve
from wire.types import Pooling

PATH = "/v1/embeddings"


async def embed(harness: Harness, **fields: Any) -> Answer:
    return await harness.post(PATH, {"input": "hi", **fields})


def vectors(answer: Answer) -> list[list[float]]:
    """See `stub_embedding`: pooling, length, first and last token."""
    assert answer.status == 200, answer.body
    assert [item["index"] for item in answer.json["data"]] == list(range(len(answer.json["data"])))
    return [item["embedding"] for item in answer.json["data"]]


def test_the_answer() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            answer = await embed(harness, model="stub", encoding_format="float", user="me")
            assert answer.json == {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": 0, "embedding": [0.0, 2.0, 104.0, 105.0]}
                ],
                "model": "stub",
                "usage": {"prompt_tokens": 2, "total_tokens": 2},
            }
            [prefill] = harness.sent(Prefill)
            assert prefill.pooling is Pooling.LAST
            assert prefill.grant is None
            assert harness.sent(Reserve) == []

    asyncio.run(scenario())


def test_inputs() -> None:
    async def scenario() -> None:
        async with router(endless, pooling=Pooling.MEAN) as harness:
            assert vectors(await embed(harness, input=[7, 8, 9])) == [[1, 3, 7, 9]]
            assert vectors(await embed(harness, input=["ab", "c"])) == [
                [1, 2, 97, 98],
                [1, 1, 99, 99],
            ]
            several = await embed(harness, input=[[7], [8, 9]])
            assert vectors(several) == [[1, 1, 7, 7], [1, 2, 8, 9]]
            assert several.json["usage"] == {"prompt_tokens": 3, "total_tokens": 3}

    asyncio.run(scenario())


def test_base64() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            [text] = vectors(await embed(harness, encoding_format="base64"))
            assert isinstance(text, str)
            assert struct.unpack("<4f", base64.b64decode(text)) == (0, 2, 104, 105)

    asyncio.run(scenario())


def test_dimensions_cut_and_have_length_1_again() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            [vector] = vectors(await embed(harness, dimensions=3))
            length = sqrt(2 * 2 + 104 * 104)
            assert vector == pytest.approx([0, 2 / length, 104 / length])
            check_error(await embed(harness, dimensions=5), 400, "dimensions")

    asyncio.run(scenario())


def test_a_vector_of_zeros_stays_one() -> None:
    assert embedding_of(bytes(8), 1, as_base64=False) == [0.0]
    with pytest.raises(ApiError):
        embedding_of(bytes(8), 3, as_base64=False)


def test_many_inputs_leave_room_for_others() -> None:
    async def scenario() -> None:
        async with router(endless, max_queue=WINDOW, max_streams=8) as harness:
            answer = await embed(harness, input=[[1 + i % 50] for i in range(300)])
            assert [vector[2] for vector in vectors(answer)] == [1 + i % 50 for i in range(300)]
            assert len(harness.server.control.requests) == 0
            assert (await harness.get("/load")).json == {"server_load": 0}

    asyncio.run(scenario())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": ""}, "input"),
    ({"input": []}, "input"),
    ({"input": None}, "input"),
    ({"input": 5}, "input"),
    ({"input": ["a", 1]}, "input"),
    ({"input": ["a", ""]}, "input"),
    ({"input": [[1], []]}, "input"),
    ({"input": [-1]}, "input"),
    ({"input": [10**9]}, "input"),
    ({"input": ["a"] * 2049}, "input"),
    ({"input": "x" * 512}, "input"),
    ({"model": 5}, "model"),
    ({"encoding_format": "hex"}, "encoding_format"),
    ({"dimensions": 0}, "dimensions"),
    ({"dimensions": "4"}, "dimensions"),
    ({"user": 5}, "user"),
    ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ({"normalize": False}, "normalize"),
    ({"prompt": "x"}, "prompt"),
]


def test_bad_fields() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            for fields, param in BAD:
                check_error(await embed(harness, **fields), 400, param)
            error = check_error(await embed(harness, model="other"), 404, "model")
            assert error["code"] == "model_not_found"
            assert harness.sent(Prefill) == []
            assert (await embed(harness)).status == 200

    asyncio.run(scenario())


def test_without_nodes() -> None:
    async def scenario() -> None:
        async with router() as harness:
            check_error(await embed(harness), 503)

    asyncio.run(scenario())


def test_a_node_that_dies_is_replaced() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            first, second = harness.pair, await harness.add_pair(endless)
            first.prefill_hangs = second.prefill_hangs = True
            asked = asyncio.create_task(embed(harness))
            await eventually(lambda: len(harness.sent(Prefill)) == 1)
            [holder] = [pair for pair in harness.pairs if pair.prefill.received]
            first.prefill_hangs = second.prefill_hangs = False
            await holder.close()
            assert vectors(await asked) == [[0, 2, 104, 105]]

    asyncio.run(scenario())


@pytest.mark.parametrize("vector", [b"", b"abc"])
def test_a_vector_that_is_none_ends_the_attempt(vector: bytes) -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            harness.pair.prefill_hangs = True
            asked = asyncio.create_task(embed(harness))
            prefills = harness.pair.prefill.received
            for _ in range(2):
                await eventually(lambda: any(isinstance(m, Prefill) for m in prefills))
                harness.pair.prefill.send(Embedding(harness.sent(Prefill)[-1].id, vector))
                prefills.clear()
            check_error(await asked, 500)

    asyncio.run(scenario())


def test_a_client_that_leaves_frees_the_node() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            harness.pair.prefill_hangs = True
            asked = asyncio.create_task(embed(harness, input=["a", "b"]))
            await eventually(lambda: len(harness.sent(Prefill)) == 2)
            asked.cancel()
            await eventually(lambda: len(harness.sent(Abort)) == 2)
            assert len(harness.server.control.requests) == 0

    asyncio.run(scenario())


def test_it_is_counted() -> None:
    async def scenario() -> None:
        async with router(endless) as harness:
            await embed(harness, input=["ab", "c"])
            text = (await harness.get("/metrics")).body.decode()
            assert 'vllm:prompt_tokens_total{model_name="stub"} 3.0' in text
            assert 'vllm:generation_tokens_total{model_name="stub"} 0.0' in text

    asyncio.run(scenario())
