"""Steps that are skipped lead where the same steps, made one by one, lead."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.prefix_cache import PrefixCache
from engine.request import Request
from engine.scheduler import Scheduler
from wire.types import FinishReason, SamplingParams

CONFIG = EngineConfig(
    block_size=4, num_blocks=60, max_model_len=64, max_num_seqs=4, max_num_batched_tokens=16
)


class Node:
    """A scheduler and its pool; the token after a request's last one is the same again."""

    def __init__(self) -> None:
        self.pool = BlockPool(CONFIG.num_blocks, epoch=1)
        self.cache = PrefixCache(self.pool, CONFIG.block_size, "model")
        self.scheduler = Scheduler(CONFIG, self.pool, self.cache, frozenset())
        self.requests: list[Request] = []

    def add(self, number: int, length: int, max_tokens: int) -> None:
        request = self._request(number, length, max_tokens)
        self.requests.append(request)
        self.scheduler.add(request)

    def _request(self, number: int, length: int, max_tokens: int) -> Request:
        return Request(
            request_id=str(number),
            tokens=[number] * length,
            num_prompt_tokens=length,
            sampling=SamplingParams(max_tokens=max_tokens),
            max_num_tokens=length + max_tokens,
        )

    def adopt(self, number: int, length: int, max_tokens: int) -> None:
        """One that was prefilled elsewhere."""
        tokens = [number] * length
        hashes = self.cache.hashes(tokens, "")
        reservation = self.scheduler.reserve(tokens, length + max_tokens, hashes)
        request = self._request(number, length, max_tokens)
        request.tokens.append(number)
        self.requests.append(request)
        self.scheduler.adopt(reservation.id, request)

    def step(self) -> None:
        plan = self.scheduler.plan()
        sampled = [item.request.tokens[-1] for item in plan.scheduled if item.samples]
        self.scheduler.commit(plan, sampled)

    def state(self) -> object:
        return (
            [self._books(r) for r in self.requests],
            self.pool.counts(),
            sorted(self.cache.snapshot()),
        )

    def _books(self, request: Request) -> object:
        """A skip may know the name of a block whose last token is not computed yet."""
        computed = request.num_computed_tokens
        names = request.block_hashes[: computed // CONFIG.block_size]
        blocks = len(request.block_table)
        return list(request.tokens), computed, blocks, names, request.finish_reason


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(2, 30)), min_size=1, max_size=7),
    st.integers(0, 4),
    st.data(),
)
def test_skipping_is_stepping(
    sizes: list[tuple[int, int]], num_prefilled: int, data: st.DataObject
) -> None:
    one_by_one, skipping = Node(), Node()
    for number, (length, max_tokens) in enumerate(sizes):
        for node in (one_by_one, skipping):
            come = node.adopt if number < num_prefilled else node.add
            come(number, length, max_tokens)
    while skipping.scheduler.has_work:
        steps = skipping.scheduler.num_plain_steps()
        steps = data.draw(st.integers(0, steps)) if steps else 0
        if steps:
            running = [r for r in skipping.requests if r.finish_reason is None]
            ended = {done.request_id for done in skipping.scheduler.skip_plain_steps(steps)}
            assert ended == {r.request_id for r in running if r.finish_reason is not None}
        else:
            skipping.step()
        for _ in range(max(1, steps)):
            one_by_one.step()
        assert skipping.state() == one_by_one.state()
        skipping.scheduler.check_integrity()
    assert not one_by_one.scheduler.has_work


def test_no_step_is_plain_that_does_more() -> None:
    node = Node()
    assert node.scheduler.num_plain_steps() == 0
    node.add(1, 30, 10)
    node.step()  # half of the prompt
    assert node.scheduler.num_plain_steps() == 0
    node.step()
    assert node.scheduler.num_plain_steps() == 9  # the tenth token ends it
    node.add(2, 3, 10)
    assert node.scheduler.num_plain_steps() == 0  # it will be admitted
    node.step()
    assert node.scheduler.num_plain_steps() == 8


def test_the_rest_of_a_prompt_is_no_plain_step() -> None:
    """Not even a single token of it: the first token comes of it."""
    node = Node()
    node.add(1, CONFIG.max_num_batched_tokens + 1, 10)
    node.step()
    assert node.scheduler.num_plain_steps() == 0
    node.step()
    assert node.scheduler.num_plain_steps() == 9


def test_the_last_plain_step_ends_requests_and_says_so() -> None:
    node = Node()
    node.adopt(1, 5, 4)
    node.adopt(2, 6, 8)
    assert node.scheduler.num_plain_steps() == 3
    assert node.scheduler.skip_plain_steps(1) == ()
    [progress] = node.scheduler.skip_plain_steps(2)
    assert (progress.request_id, progress.index, progress.new_tokens) == ("1", 2, (1, 1))
    assert progress.finish_reason is FinishReason.LENGTH
    assert node.scheduler.num_running == 1


def test_a_full_node_is_plain_whoever_waits() -> None:
    node = Node()
    for number in range(6):
        node.add(number, 3, 20)
    node.step()
    assert node.scheduler.num_plain_steps() == 19
