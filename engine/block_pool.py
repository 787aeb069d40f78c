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
        # Columns, one entry per block: those of a request lie near each other, and so in the cache.
        self._generation = [0] * num_blocks
        self._running = [0] * num_blocks
        self._leased = [0] * num_blocks
        self._io_refs = [0] * num_blocks
        self._content: list[bytes | None] = [None] * num_blocks  # hash, while it can be found
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
        generation, content, held = self._generation, self._content, self._held_by(owner)
        for block_id in taken:
            generation[block_id] += 1
            content[block_id] = None
            held[block_id] = 1
        self._num_in[_STATE_OF[owner]] += len(taken)

    def acquire(self, block_ids: Iterable[int], owner: Owner) -> None:
        """Add a reference to blocks that have content: held already, or published."""
        for block_id in block_ids:
            before = self.state(block_id)
            known = self._is_held(block_id) or self._content[block_id] is not None
            assert known, f"block {block_id} has no content"
            self._held_by(owner)[block_id] += 1
            self._moved(block_id, before)

    def release(self, block_ids: Iterable[int], owner: Owner) -> None:
        """Drop a reference to each; what is released last is evicted last."""
        before, held, running = _STATE_OF[owner], self._held_by(owner), self._running
        leased, io_refs, content, lru = self._leased, self._io_refs, self._content, self._lru
        num_cached = 0
        for block_id in block_ids:
            left = held[block_id] = held[block_id] - 1
            assert left >= 0, f"block {block_id} released too often"
            if running[block_id]:
                continue  # it is what it was
            content_hash = content[block_id]
            if leased[block_id] or io_refs[block_id] or content_hash is None:
                self._moved(block_id, before)
            else:  # as _moved, in half the time
                lru[block_id] = content_hash
                num_cached += 1
        self._num_in[before] -= num_cached
        self._num_in[BlockState.CACHED] += num_cached

    def hand_over(self, block_ids: Iterable[int], old: Owner, new: Owner) -> None:
        """Turn one owner's references into the other's. Whoever had a block still has it."""
        if old is new:
            return
        to_run = new is Owner.RUNNING
        running, leased = self._running, self._leased
        num_changed = 0
        for block_id in block_ids:
            if to_run:
                num_changed += not running[block_id]
                running[block_id] += 1
                left = leased[block_id] = leased[block_id] - 1
            else:
                leased[block_id] += 1
                left = running[block_id] = running[block_id] - 1
                num_changed += not left
            assert left >= 0, f"block {block_id} is not {old.name}"
        before, after = _STATE_OF[old], _STATE_OF[new]
        self._num_in[before] -= num_changed
        self._num_in[after] += num_changed

    def _held_by(self, owner: Owner) -> list[int]:
        """References of one kind of owner, by block."""
        return self._running if owner is Owner.RUNNING else self._leased

    def _moved(self, block_id: int, before: BlockState) -> None:
        """Bring lists and counts in line with the block's state."""
        after = self.state(block_id)
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
            content_hash = self._content[block_id]
            assert content_hash is not None
            self._lru[block_id] = content_hash

    # ------------------------------------------------------------ content

    def publish(self, contents: Mapping[bytes, int]) -> None:
        """Mark held blocks' content, by its hash, as complete and findable.

        It never changes from here on.
        """
        running, leased, content = self._running, self._leased, self._content
        for content_hash, block_id in contents.items():
            held = running[block_id] or leased[block_id]
            assert held, f"block {block_id} is published by nobody"
            assert content[block_id] is None, f"block {block_id} is already published"
            content[block_id] = content_hash

    def unpublish(self, block_id: int) -> None:
        """The content is not findable any more; a cached block becomes free."""
        before = self.state(block_id)
        self._content[block_id] = None
        self._moved(block_id, before)

    def content_hash(self, block_id: int) -> bytes | None:
        return self._content[block_id]

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
        return BlockHandle(self.epoch, block_id, self._generation[block_id])

    def handles(self, block_ids: Iterable[int]) -> tuple[BlockHandle, ...]:
        epoch, generation = self.epoch, self._generation
        return tuple([BlockHandle(epoch, i, generation[i]) for i in block_ids])

    def is_current(self, handle: BlockHandle) -> bool:
        """Whether the block still has this content: named so, and held or published."""
        block_id = handle.block_id
        known = self._names(handle)
        return known and (self._is_held(block_id) or self._content[block_id] is not None)

    def begin_io(self, handle: BlockHandle) -> bool:
        """Let a transfer touch the block until `end_io`; False if nobody holds that content now."""
        if not self._names(handle) or not self._is_held(handle.block_id):
            return False
        self._io_refs[handle.block_id] += 1
        return True

    def end_io(self, block_id: int) -> None:
        """A transfer will not touch the block any more; the last one ends its quarantine."""
        assert self._io_refs[block_id] > 0, f"block {block_id} has no transfer to end"
        before = self.state(block_id)
        self._io_refs[block_id] -= 1
        self._moved(block_id, before)

    def num_in_transfer(self, block_ids: Iterable[int]) -> int:
        """How many of the blocks a transfer may still touch."""
        return sum(self._io_refs[block_id] > 0 for block_id in block_ids)

    def _names(self, handle: BlockHandle) -> bool:
        """Whether the block's content is still the one that was called so."""
        if handle.epoch != self.epoch or not 0 <= handle.block_id < self.num_blocks:
            return False
        return self._generation[handle.block_id] == handle.generation

    def _is_held(self, block_id: int) -> bool:
        return self._running[block_id] > 0 or self._leased[block_id] > 0

    # ------------------------------------------------------------ accounting

    def state(self, block_id: int) -> BlockState:
        if self._running[block_id]:
            return BlockState.RUNNING
        if self._leased[block_id]:
            return BlockState.LEASED
        if self._io_refs[block_id]:
            return BlockState.QUARANTINED
        return BlockState.FREE if self._content[block_id] is None else BlockState.CACHED

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
        return sum(self._held_by(owner))

    def check_integrity(self) -> None:
        """Raise AssertionError where counts, lists and states contradict each other. O(blocks)."""
        assert self.counts().balanced, f"blocks do not add up: {self.counts()}"
        found = Counter(map(self.state, range(self.num_blocks)))
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
            actual = self.state(block_id)
            assert actual is state, f"block {block_id} in the {name} is {actual.name}"
