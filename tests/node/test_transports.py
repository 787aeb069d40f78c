"""Which transports a node offers and uses, and what happens where one is not there."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import zmq

from kvtransfer.shared_memory import SharedMemory
from kvtransfer.transport import TransferStats
from node.config import TRANSPORTS, NodeConfig
from node.transports import (
    BEST_FIRST,
    public_address,
    shared_pool,
    unit_receivers,
    unit_senders,
)
from wire.errors import ConfigError
from wire.messages import UnitHeader
from wire.types import NodeId, TransportAddress

ME = NodeId("me", 1)


class Nowhere:
    """A sink that takes nothing."""

    def begin(self, sender: NodeId, header: UnitHeader) -> None:
        return None


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    context = zmq.Context()
    yield context
    context.destroy(0)


def config(transport: str = "auto", **other: Any) -> NodeConfig:
    return NodeConfig(Path("model"), "me", transport=transport, **other)


def no_memory(num_bytes: int) -> NoReturn:
    raise ConfigError("no shared memory here")


def test_auto_means_all_of_them() -> None:
    assert set(TRANSPORTS) == {"auto", *BEST_FIRST}


@pytest.mark.parametrize(
    ("transport", "names"),
    [("auto", ["shm", "zmq"]), ("shm", ["shm"]), ("zmq", ["zmq"])],
)
def test_both_ends_in_order(context: zmq.Context[Any], transport: str, names: list[str]) -> None:
    async def body() -> None:
        chosen = config(transport)
        pool = shared_pool(chosen, 4096)
        assert (pool is not None) is ("shm" in names)
        senders = unit_senders(chosen, ME, pool, context)
        receivers = unit_receivers(chosen, ME, Nowhere(), TransferStats(), context)
        assert list(senders) == names
        assert [receiver.address.transport for receiver in receivers] == names
        for sender, receiver in zip(senders.values(), receivers, strict=True):
            assert sender.reaches(receiver.address.url, ME)
            sender.close()
            receiver.close()

    asyncio.run(body())


def test_without_shared_memory_auto_goes_on_and_shm_says_why(
    context: zmq.Context[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        assert shared_pool(config("auto"), 4096) is None
        assert list(unit_senders(config("auto"), ME, None, context)) == ["zmq"]
        with pytest.raises(ConfigError, match="no shared memory"):
            shared_pool(config("shm"), 4096)

    monkeypatch.setattr("node.transports.SharedMemory", no_memory)
    asyncio.run(body())


def test_no_pool_is_made_that_nobody_may_read() -> None:
    assert shared_pool(config("zmq"), 1 << 40) is None
    assert isinstance(shared_pool(config("shm"), 4096), SharedMemory)


def test_an_address_for_other_machines() -> None:
    advertised = config(advertise_host="node7")
    tcp = TransportAddress("zmq", "tcp://127.0.0.1:4000")
    assert public_address(tcp, advertised) == TransportAddress("zmq", "tcp://node7:4000")
    shm = TransportAddress("shm", "shm://boot.1/00")
    assert public_address(shm, advertised) == shm
