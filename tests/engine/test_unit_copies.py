"""Units between blocks and host as a device copies them, on the CPU, with either kernels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import xxhash

from engine.kv_store import KVStore
from engine.staging import Staging
from engine.unit_copies import Address, Copied, Cut, UnitCopies, can_digest
from kernels.block_copy import Part, gather_units
from kernels.unit_kernels import REFERENCE, UnitKernels, triton_kernels
from tests.kernels.paged_cases import seeded
from wire.layout import KVLayout

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32")
NUM_BLOCKS = 8
WHOLE = Part(0, 3, 0, 2)
SEED = 0xABCDEF


@pytest.fixture(params=["reference", "triton"])
def kernels(request: pytest.FixtureRequest) -> UnitKernels:
    return REFERENCE if request.param == "reference" else triton_kernels()


class Rig:
    """A store of noise; what was asked for is over when `finish` is called."""

    def __init__(self, kernels: UnitKernels, *, staging_blocks: int = 8, scratch: int = 0) -> None:
        self.store = KVStore(LAYOUT, NUM_BLOCKS)
        shape = self.store.blocks.shape
        self.store.blocks.copy_(seeded(*shape))
        self.staging = Staging(staging_blocks * LAYOUT.block_bytes, pinned=False)
        self.over: list[Callable[[], None]] = []
        self.copies = UnitCopies(
            self.store,
            self.staging,
            when_over=self.over.append,
            scratch_bytes=scratch,
            kernels=kernels,
        )

    def finish(self) -> None:
        while self.over:
            self.over.pop(0)()

    def read(self, cut: Cut, *, seed: int | None = SEED, payload: bool = True) -> list[Copied]:
        told: dict[int, Copied] = {}

        def tell(start: int, copied: list[Copied]) -> None:
            told.update(enumerate(copied, start))

        self.copies.read(cut, tell, seed=seed, payload=payload)
        assert not told, "nothing is told before the device has done it"
        self.finish()
        return [told[number] for number in range(len(cut))]

    def write(
        self, cut: Cut, sources: list[memoryview | Address], seed: int | None = SEED
    ) -> list[bytes | None]:
        told: dict[int, bytes | None] = {}

        def tell(start: int, contents: list[bytes | None]) -> None:
            told.update(enumerate(contents, start))

        self.copies.write(cut, sources, tell, seed=seed)
        assert not told
        self.finish()
        return [told[number] for number in range(len(cut))]


def cut(blocks: list[int], part: Part = WHOLE, num_tokens: int = 4, **more: torch.dtype) -> Cut:
    """The first tokens of each block."""
    slots = np.array([[4 * block + token for token in range(num_tokens)] for block in blocks])
    return Cut(part, slots, more.get("dtype", torch.float32))


@pytest.mark.parametrize("scratch", [0, 1 << 20], ids=["in pieces", "at once"])
@pytest.mark.parametrize("part", [WHOLE, Part(1, 3, 0, 2), Part(0, 2, 1, 2)], ids=str)
@pytest.mark.parametrize("num_tokens", [4, 3])
def test_units_leave_and_come_back_with_their_digests(
    kernels: UnitKernels, part: Part, num_tokens: int, scratch: int
) -> None:
    rig = Rig(kernels, scratch=scratch)
    asked = cut([5, 0, 7, 2, 1, 6], part, num_tokens)
    copied = rig.read(asked)
    expected = gather_units(rig.store.blocks, torch.from_numpy(asked.slots), part, torch.float32)
    for unit, one in zip(expected, copied, strict=True):
        assert one.payload is not None
        assert bytes(one.payload) == unit.numpy().tobytes()
        assert one.content == xxhash.xxh3_128_digest(one.payload, SEED)
    before = rig.store.blocks.clone()
    rig.store.blocks.fill_(torch.nan)
    sources: list[memoryview | Address] = [one.payload for one in copied if one.payload is not None]
    assert rig.write(asked, sources) == [one.content for one in copied]
    back = gather_units(rig.store.blocks, torch.from_numpy(asked.slots), part, torch.float32)
    assert torch.equal(back, expected)
    written = ~rig.store.blocks.isnan()
    assert torch.equal(rig.store.blocks[written], before[written])
    assert int(written.sum()) == expected.numel(), "and nothing else is touched"


def test_bytes_or_digests_alone(kernels: UnitKernels) -> None:
    rig = Rig(kernels)
    both = rig.read(cut([1, 2]))
    digests = rig.read(cut([1, 2]), payload=False)
    assert [one.payload for one in digests] == [None, None]
    assert [one.content for one in digests] == [one.content for one in both]
    plain = rig.read(cut([1, 2]), seed=None)
    assert [one.content for one in plain] == [None, None]
    assert [one.payload for one in plain] == [one.payload for one in both]


def test_numbers_change_their_type_on_the_way(kernels: UnitKernels) -> None:
    rig = Rig(kernels)
    rig.store.blocks.copy_(rig.store.blocks.bfloat16())
    asked = cut([3, 4], dtype=torch.bfloat16)
    before = rig.store.blocks[3:5].clone()
    copied = rig.read(asked)
    sources: list[memoryview | Address] = [one.payload for one in copied if one.payload is not None]
    assert {source.nbytes for source in sources} == {LAYOUT.block_bytes // 2}
    rig.store.blocks.zero_()
    assert rig.write(asked, sources) == [one.content for one in copied]
    assert torch.equal(rig.store.blocks[3:5], before)


def test_from_memory_of_the_device_that_is_no_tensors(kernels: UnitKernels) -> None:
    rig = Rig(kernels)
    peer = seeded(4, *rig.store.blocks.shape[1:])
    size = LAYOUT.block_bytes
    sources: list[memoryview | Address] = [
        Address(peer.data_ptr() + size * block, size) for block in (2, 0, 3)
    ]
    contents = rig.write(cut([1, 4, 6]), sources)
    assert torch.equal(rig.store.blocks[[1, 4, 6]], peer[[2, 0, 3]])
    assert contents == [
        xxhash.xxh3_128_digest(peer[block].numpy().tobytes(), SEED) for block in (2, 0, 3)
    ]


@pytest.mark.parametrize("staging_blocks", [1, 3])
def test_without_a_region_for_all_each_takes_what_there_is(
    kernels: UnitKernels, staging_blocks: int
) -> None:
    """Out of staging memory copies lie in plain memory: slower, and as right."""
    rig = Rig(kernels, staging_blocks=staging_blocks, scratch=1 << 20)
    copied = rig.read(cut([0, 1, 2, 3]))
    for block, one in enumerate(copied):
        assert one.payload is not None
        assert bytes(one.payload) == bytes(rig.store.block_bytes(block))
    assert rig.staging.num_plain == 4 - staging_blocks
    assert rig.staging.num_free == 0
    del copied, one
    assert rig.staging.num_free == rig.staging.num_bytes


def test_one_region_holds_all_units_of_a_copy(kernels: UnitKernels) -> None:
    rig = Rig(kernels, staging_blocks=3, scratch=1 << 20)
    copied = rig.read(cut([0, 1, 2]))
    assert (rig.staging.num_free, rig.staging.num_plain) == (0, 0)
    del copied[0]
    assert rig.staging.num_free == 0, "the others are still held"
    del copied
    assert rig.staging.num_free == rig.staging.num_bytes


def test_warming_up_changes_no_block(kernels: UnitKernels) -> None:
    rig = Rig(kernels)
    before = rig.store.blocks.clone()
    rig.copies.warm_up(NUM_BLOCKS - 1)
    assert torch.equal(rig.store.blocks, before)
    assert not rig.over


def test_what_the_device_can_digest() -> None:
    assert can_digest(256)
    assert not can_digest(248)
    assert not can_digest(260)
