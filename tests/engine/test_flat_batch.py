"""The flat arrays of a step, against each row worked out by itself."""

from __future__ import annotations

import random

import pytest

from engine.flat_batch import flatten
from engine.plan import ScheduledRequest, StepPlan
from engine.request import Request
from wire.types import SamplingParams


def scheduled(rng: random.Random, number: int, block_size: int) -> ScheduledRequest:
    length = rng.randint(1, 50)
    start = rng.randrange(length)
    end = rng.randint(start + 1, length)
    num_blocks = -(-length // block_size) + rng.randint(0, 2)
    prompt_logprobs = rng.choice([None, None, 1])
    request = Request(
        request_id=str(number),
        tokens=[rng.randrange(1000) for _ in range(length)],
        num_prompt_tokens=length,
        sampling=SamplingParams(prompt_logprobs=prompt_logprobs),
        max_num_tokens=100,
        block_table=rng.sample(range(1000), num_blocks),
    )
    return ScheduledRequest(request, start, end - start)


@pytest.mark.parametrize("seed", range(30))
def test_every_row_is_where_its_token_is(seed: int) -> None:
    rng = random.Random(seed)
    block_size = rng.choice([1, 4, 16])
    items = tuple(scheduled(rng, i, block_size) for i in range(rng.randint(1, 9)))
    flat = flatten(StepPlan(items), block_size)
    rows = [(item, p) for item in items for p in range(item.start, item.end)]
    tables = [item.request.block_table for item, _ in rows]
    positions = [p for _, p in rows]
    assert flat.positions.tolist() == positions
    assert flat.token_ids.tolist() == [item.request.tokens[p] for item, p in rows]
    pairs = list(zip(tables, positions, strict=True))
    assert flat.blocks.tolist() == [table[p // block_size] for table, p in pairs]
    assert flat.offsets.tolist() == [p % block_size for p in positions]
    needed = [i for i, (item, p) in enumerate(rows) if p >= item.end - item.num_logits]
    assert flat.needed_rows.tolist() == needed
    for item, begin, end in zip(items, flat.table_start, flat.table_start[1:], strict=False):
        used = item.request.block_table[: -(-item.end // block_size)]
        assert flat.tables[begin:end].tolist() == used
