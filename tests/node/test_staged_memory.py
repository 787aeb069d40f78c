"""A device's blocks give and take the same bytes as the host's own, however units are cut."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from engine.engine import Engine
from engine.kv_store import KVStore
from engine.staging import Staging
from engine.unit_copies import UnitCopies, WhenOver, at_once
from kvtransfer.block_memory import ArrivedUnit, BlockMemory, HeldUnit
from kvtransfer.relay import blocks_of, place_of
from kvtransfer.units import Unit, units_of
from node.memory import NodeMemory
from node.staged_memory import StagedMemory
from tests.kernels.paged_cases import seeded
from wire.geometry import Geometry
from wire.layout import KVLayout

STORE = KVLayout(num_layers=3, num_kv_heads=4, head_dim=16, block_size=8, dtype="float32")
BLOCKS = (3, 0, 5, 1)  # of a request of 29 tokens
NUM_TOKENS = 29
SEED = 77
THEIRS = [
    (STORE, Geometry()),
    (STORE, Geometry(3)),
    (STORE, Geometry(dtype="bfloat16")),
    (STORE, Geometry(dtype="int8")),
    (STORE, Geometry(dtype="fp8")),
    (KVLayout(3, 4, 16, 16, "float16"), Geometry()),
    (KVLayout(3, 4, 16, 4, "float32"), Geometry(2)),
    (KVLayout(3, 2, 16, 8, "float32", tp_rank=1, tp_size=2), Geometry()),
]


def no_engine() -> Engine:
    return cast(Engine, None)


def store_of(layout: KVLayout, num_blocks: int = 6) -> KVStore:
    store = KVStore(layout, num_blocks)
    store.blocks.copy_(seeded(*store.blocks.shape))
    return store


def staged(
    store: KVStore, when_over: WhenOver = at_once, staging_bytes: int = 1 << 20
) -> StagedMemory:
    staging = Staging(staging_bytes, pinned=False)
    copies = UnitCopies(store, staging, when_over=when_over, scratch_bytes=1 << 16)
    return StagedMemory(no_engine(), store, staging, copies)


def read(memory: BlockMemory, units: list[HeldUnit], dtype: str) -> list[tuple[bytes, bytes]]:
    told: dict[int, tuple[bytes, bytes]] = {}

    def tell(number: int, data: memoryview | None, content: bytes) -> None:
        assert number not in told
        told[number] = (bytes(data or b""), content)

    memory.read(units, dtype, tell, seed=SEED)
    return [told[number] for number in range(len(units))]


def cut(theirs: KVLayout, geometry: Geometry, ours: KVLayout) -> list[Unit]:
    first, end = ours.head_range
    units = units_of(NUM_TOKENS, 0, theirs, geometry)
    return [unit for unit in units if first <= unit.head_start and unit.head_end <= end]


@pytest.mark.parametrize(("theirs", "geometry"), THEIRS, ids=str)
def test_units_are_read_as_the_host_reads_them(theirs: KVLayout, geometry: Geometry) -> None:
    store = store_of(STORE)
    held = [
        HeldUnit(unit, tuple(BLOCKS[index] for index in blocks_of(unit, STORE)))
        for unit in cut(theirs, geometry, STORE)
    ]
    dtype = geometry.dtype_for(theirs)
    expected = read(NodeMemory(no_engine(), store), held, dtype)
    assert read(staged(store), held, dtype) == expected
    assert all(len(content) == 16 for _, content in expected)


@pytest.mark.parametrize(("theirs", "geometry"), THEIRS, ids=str)
def test_units_are_written_as_the_host_writes_them(theirs: KVLayout, geometry: Geometry) -> None:
    """Into blocks of the layout that the units are cut for."""
    source = store_of(STORE)
    held = [
        HeldUnit(unit, tuple(BLOCKS[index] for index in blocks_of(unit, STORE)))
        for unit in cut(theirs, geometry, STORE)
        if theirs.head_range[0] <= unit.head_start and unit.head_end <= theirs.head_range[1]
    ]
    dtype = geometry.dtype_for(theirs)
    data = [payload for payload, _ in read(NodeMemory(no_engine(), source), held, dtype)]
    targets = [store_of(theirs, 8) for _ in range(2)]

    async def body() -> list[list[bytes]]:
        told: list[list[bytes]] = []
        memories: list[Any] = [NodeMemory(no_engine(), targets[0]), staged(targets[1])]
        for memory in memories:
            arrived = []
            for unit, payload in zip([unit for unit, _ in held], data, strict=True):
                part = place_of(unit, theirs, dtype)
                view = memory.room(unit.block, part, len(payload))
                view[:] = payload
                arrived.append(ArrivedUnit(unit, unit.block, view))
            memory.write(arrived, dtype, lambda contents: told.append(list(contents)), seed=SEED)
            await asyncio.sleep(0)
        return told

    there, here = asyncio.run(body())
    assert there == here
    assert torch.equal(targets[0].blocks, targets[1].blocks)


def whole_blocks() -> list[HeldUnit]:
    units = units_of(16, 0, STORE)
    return [HeldUnit(unit, (BLOCKS[unit.block],)) for unit in units]


@pytest.mark.parametrize("method", ["read", "write"])
@pytest.mark.parametrize(
    ("text", "lost"), [("CUDA error: an illegal access\nhint", True), ("no", False)]
)
def test_a_lost_device_ends_the_node_in_one_line(
    method: str, text: str, lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **more: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(UnitCopies, method, broken)
    told: list[object] = []

    async def body() -> None:
        memory = staged(store_of(STORE))
        memory.on_lost = told.append
        if method == "read":
            with pytest.raises(RuntimeError):
                read(memory, whole_blocks(), "float32")
        else:
            unit, (block,) = whole_blocks()[0]
            view = memory.room(block, None, STORE.block_bytes)
            verdicts: list[object] = []
            memory.write([ArrivedUnit(unit, block, view)], "float32", verdicts.append, seed=SEED)
            await asyncio.sleep(0)
            assert verdicts == [None], "its lease is rejected"

    asyncio.run(body())
    assert told == (["the device is lost: CUDA error: an illegal access"] if lost else [])


def test_one_failed_write_is_told_once_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was launched before it failed may be over later; that is not told again."""
    original = UnitCopies.write
    over: list[Callable[[], None]] = []

    def second_fails(copies: UnitCopies, cut: Any, *args: Any, **more: Any) -> None:
        if cut.slots.shape[1] == 5:  # the partial last block
            raise MemoryError
        original(copies, cut, *args, **more)

    monkeypatch.setattr(UnitCopies, "write", second_fails)

    async def body() -> None:
        memory = staged(store_of(STORE), over.append)
        verdicts: list[tuple[str, bool]] = []
        for name, num_tokens, seed in (("bad", 13, 1), ("good", 8, 2)):
            units = [
                ArrivedUnit(unit, BLOCKS[unit.block], memoryview(bytearray(size)))
                for unit in units_of(num_tokens, 0, STORE)
                for size in [STORE.bytes_per_token * unit.num_tokens]
            ]
            memory.write(
                units,
                "float32",
                lambda contents, name=name: verdicts.append((name, contents is not None)),  # type: ignore[misc]
                seed=seed,
            )
        await asyncio.sleep(0)
        assert verdicts == [("bad", False)]
        for tell in over:
            tell()
        assert verdicts == [("bad", False), ("good", True)]

    asyncio.run(body())
