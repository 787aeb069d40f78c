"""The blocks of one KV pool: who needs each, which may be given out, and what each is called.

A block's state follows from its counts, so that it cannot contradict them:

    running refs > 0                 RUNNING       a request of this engine computes with it
    leased refs > 0                  LEASED        a reservation or a handoff counts on it
    io_refs > 0                      QUARANTINED   not needed, but a transfer may still touch it
    published                        CACHED        evictable, least recently used first
    otherwise                        FREE

Only FREE and CACHED blocks are given out. An allocation for new content grows the block's
generation; a handle names (epoch, block, generation).
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum, auto

from wire.errors import CapacityError
from wire.types import BlockHandle


class Owner(Enum):
    """On whose behalf a reference is held."""

    RUNNING = auto()
    LEASED = auto()


class BlockState(IntEnum):
    """An index, so that counting blocks by state costs no hash."""

    FREE = 0
    CACHED = 1
    LEASED = 2
    RUNNING = 3
    QUARANTINED = 4


_STATE_OF = {Owner.RUNNING: BlockState.RUNNING, Owner.LEASED: BlockState.LEASED}


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """How many blocks are in each state."""

    free: int
    cached: int
    leased: int
    running: int
    quarantined: int
    total: int

    @property
    def balanced(self) -> bool:
        states = self.free + self.cached + self.leased + self.running + self.quarantined
        return states == self.total


@dataclass(slots=True)
class _Block:
    generation: int = 0
    running: int = 0
    leased: int = 0
    io_refs: int = 0
    content_hash: bytes | None = None  # set while the prefix cache can find the block

    @property
    def held(self) -> bool:
        return self.running > 0 or self.leased > 0

    @property
    def state(self) -> BlockState:
        if self.running:
            return BlockState.RUNNING
        if self.leased:
            return BlockState.LEASED
        if self.io_refs:
            return BlockState.QUARANTINED
        return BlockState.FREE if self.content_hash is None else BlockState.CACHED


def _keep_quiet(_content_hashes: Sequence[bytes]) -> None:
    """Nobody asked to be told of evictions."""


class BlockPool:
    """Block accounting; every operation is O(1) per block.

    `on_evict` is called with the content hashes of cached blocks that are about to be given out.
    """

    def __init__(self, num_blocks: int, epoch: int) -> None:
        self.num_blocks = num_blocks
        self.epoch = epoch
        self.on_evict: Callable[[Sequence[bytes]], None] = _keep_quiet
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._free = list(range(num_blocks - 1, -1, -1))  # popped from the end
        # What is called how, the next to be evicted first.
        self._lru: OrderedDict[int, bytes] = OrderedDict()
        self._num_in = [0] * len(BlockState)
        self._num_in[BlockState.FREE] = num_blocks

    # ------------------------------------------------------------ who needs a block

    @property
    def num_available(self) -> int:
        """Blocks that an allocation may take: free or evictable."""
        return len(self._free) + len(self._lru)

    def allocate(self, count: int, owner: Owner) -> list[int]:
        """`count` blocks for new content; raises CapacityError where there are fewer."""
        if count > self.num_available:
            raise CapacityError(f"{count} blocks wanted, {self.num_available} available")
        taken = self._free[: -count - 1 : -1]  # the list's end, its last first
        del self._free[len(self._free) - len(taken) :]
        self._num_in[BlockState.FREE] -= len(taken)
        if len(taken) < count:
            taken += self._evict(count - len(taken))
        self._fill(taken, owner)
        return taken

    def _evict(self, count: int) -> list[int]:
        """The cached blocks that were not used for longest; their content is forgotten."""
        evict = self._lru.popitem
        evicted = [evict(False) for _ in range(count)]  # the first of them
        self._num_in[BlockState.CACHED] -= count
        self.on_evict([content_hash for _, content_hash in evicted])
        return [block_id for block_id, _ in evicted]

    def _fill(self, taken: Sequence[int], owner: Owner) -> None:
        """As _hold and _moved, in a fraction of the time: nobody had these blocks for sure."""
        running = int(owner is Owner.RUNNING)
        leased = 1 - running
        for block in map(self._blocks.__getitem__, taken):
            block.generation += 1
            block.content_hash = None
            block.running = running
            block.leased = leased
        self._num_in[_STATE_OF[owner]] += len(taken)

    def acquire(self, block_ids: Iterable[int], owner: Owner) -> None:
        """Add a reference to blocks that have content: held already, or published."""
        for block_id in block_ids:
            block = self._blocks[block_id]
            assert block.held or block.content_hash is not None, f"block {block_id} has no content"
            self._hold(block_id, owner)

    def release(self, block_ids: Iterable[int], owner: Owner) -> None:
        """Drop a reference to each; what is released last is evicted last."""
        running = owner is Owner.RUNNING
        before = _STATE_OF[owner]
        num_cached, blocks, lru = 0, self._blocks, self._lru
        for block_id in block_ids:
            block = blocks[block_id]
            if running:
                left = block.running = block.running - 1
            else:
                left = block.leased = block.leased - 1
            assert left >= 0, f"block {block_id} released too often"
            if block.running:
                continue  # it is what it was
            if block.leased or block.io_refs or block.content_hash is None:
                self._moved(block_id, before)
            else:  # as _moved, in half the time
                lru[block_id] = block.content_hash
                num_cached += 1
        self._num_in[before] -= num_cached
        self._num_in[BlockState.CACHED] += num_cached

    def hand_over(self, block_ids: Iterable[int], old: Owner, new: Owner) -> None:
        """Turn one owner's references into the other's. Whoever had a block still has it."""
        if old is new:
            return
        to_run = new is Owner.RUNNING
        num_changed = 0
        for block in map(self._blocks.__getitem__, block_ids):
            if to_run:
                num_changed += not block.running
                block.running += 1
                left = block.leased = block.leased - 1
            else:
                block.leased += 1
                left = block.running = block.running - 1
                num_changed += not left
            assert left >= 0, f"a block is not {old.name}"
        before, after = _STATE_OF[old], _STATE_OF[new]
        self._num_in[before] -= num_changed
        self._num_in[after] += num_changed

    def _hold(self, block_id: int, owner: Owner) -> None:
        block = self._blocks[block_id]
        before = block.state
        if owner is Owner.RUNNING:
            block.running += 1
        else:
            block.leased += 1
        self._moved(block_id, before)

    def _moved(self, block_id: int, before: BlockState) -> None:
        """Bring lists and counts in line with the block's state."""
        block = self._blocks[block_id]
        after = block.state
        if after is before:
            return
        assert before is not BlockState.FREE, f"block {block_id} was not allocated"
        self._num_in[before] -= 1
        self._num_in[after] += 1
        if before is BlockState.CACHED:
            del self._lru[block_id]
        if after is BlockState.FREE:
            self._free.append(block_id)
        elif after is BlockState.CACHED:
            assert block.content_hash is not None
            self._lru[block_id] = block.content_hash

    # ------------------------------------------------------------ content

    def publish(self, contents: Mapping[bytes, int]) -> None:
        """Mark held blocks' content, by its hash, as complete and findable.

        It never changes from here on.
        """
        blocks = self._blocks
        for content_hash, block_id in contents.items():
            block = blocks[block_id]
            assert block.running or block.leased, f"block {block_id} is published by nobody"
            assert block.content_hash is None, f"block {block_id} is already published"
            block.content_hash = content_hash

    def unpublish(self, block_id: int) -> None:
        """The content is not findable any more; a cached block becomes free."""
        block = self._blocks[block_id]
        before = block.state
        block.content_hash = None
        self._moved(block_id, before)

    def content_hash(self, block_id: int) -> bytes | None:
        return self._blocks[block_id].content_hash

    def touch(self, block_id: int) -> None:
        """Make a cached block the last to be evicted; others are not concerned."""
        if block_id in self._lru:
            self._lru.move_to_end(block_id)

    def num_cached_among(self, block_ids: Iterable[int]) -> int:
        """How many of the blocks would stop being available when acquired."""
        return sum(block_id in self._lru for block_id in block_ids)

    # ------------------------------------------------------------ names and transfers

    def handle(self, block_id: int) -> BlockHandle:
        """The name of the block's present content."""
        return BlockHandle(self.epoch, block_id, self._blocks[block_id].generation)

    def handles(self, block_ids: Iterable[int]) -> tuple[BlockHandle, ...]:
        epoch, blocks = self.epoch, self._blocks
        return tuple([BlockHandle(epoch, i, blocks[i].generation) for i in block_ids])

    def is_current(self, handle: BlockHandle) -> bool:
        """Whether the block still has this content: named so, and held or published."""
        block = self._named(handle)
        return block is not None and (block.held or block.content_hash is not None)

    def begin_io(self, handle: BlockHandle) -> bool:
        """Let a transfer touch the block until `end_io`; False if nobody holds that content now."""
        block = self._named(handle)
        if block is None or not block.held:
            return False
        block.io_refs += 1
        return True

    def end_io(self, block_id: int) -> None:
        """A transfer will not touch the block any more; the last one ends its quarantine."""
        block = self._blocks[block_id]
        assert block.io_refs > 0, f"block {block_id} has no transfer to end"
        before = block.state
        block.io_refs -= 1
        self._moved(block_id, before)

    def num_in_transfer(self, block_ids: Iterable[int]) -> int:
        """How many of the blocks a transfer may still touch."""
        return sum(self._blocks[block_id].io_refs > 0 for block_id in block_ids)

    def _named(self, handle: BlockHandle) -> _Block | None:
        if handle.epoch != self.epoch or not 0 <= handle.block_id < self.num_blocks:
            return None
        block = self._blocks[handle.block_id]
        return block if block.generation == handle.generation else None

    # ------------------------------------------------------------ accounting

    def state(self, block_id: int) -> BlockState:
        return self._blocks[block_id].state

    def counts(self) -> BlockCounts:
        num_in = self._num_in
        return BlockCounts(
            free=num_in[BlockState.FREE],
            cached=num_in[BlockState.CACHED],
            leased=num_in[BlockState.LEASED],
            running=num_in[BlockState.RUNNING],
            quarantined=num_in[BlockState.QUARANTINED],
            total=self.num_blocks,
        )

    def num_references(self, owner: Owner) -> int:
        """All references that one kind of owner holds; the holders' own count must agree."""
        running = owner is Owner.RUNNING
        return sum(block.running if running else block.leased for block in self._blocks)

    def check_integrity(self) -> None:
        """Raise AssertionError where counts, lists and states contradict each other. O(blocks)."""
        assert self.counts().balanced, f"blocks do not add up: {self.counts()}"
        found = Counter(block.state for block in self._blocks)
        for state in BlockState:
            assert found[state] == self._num_in[state], (
                f"{found[state]} blocks are {state.name}, {self._num_in[state]} are counted"
            )
        self._check_list("free list", self._free, BlockState.FREE)
        self._check_list("cached list", list(self._lru), BlockState.CACHED)

    def _check_list(self, name: str, listed: list[int], state: BlockState) -> None:
        assert len(set(listed)) == len(listed), f"a block is in the {name} twice"
        assert len(listed) == self._num_in[state], f"the {name} is incomplete"
        for block_id in listed:
            actual = self._blocks[block_id].state
            assert actual is state, f"block {block_id} in the {name} is {actual.name}"
