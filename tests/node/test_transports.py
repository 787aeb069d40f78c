"""Which transports a node offers and uses, and what happens where one is not there."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import zmq

from kvtransfer.shared_memory import SharedMemory
from kvtransfer.transport import TransferStats, UnitSender
from kvtransfer.ucx_devices import UcxNetwork
from kvtransfer.ucx_worker import settings, why_unavailable
from node.config import NodeConfig
from node.transports import (
    public_address,
    shared_pool,
    unit_receivers,
    unit_senders,
)
from wire.errors import ConfigError, TransferError
from wire.handoff_messages import UnitHeader
from wire.types import NodeId, TransportAddress

ME = NodeId("me", 1)


class Nowhere:
    """A sink that takes nothing."""

    def begin(self, sender: NodeId, header: UnitHeader, num_units: int = 1) -> None:
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


def never(address: TransportAddress, error: TransferError) -> None:
    raise AssertionError("a way was lost")


def senders_of(
    chosen: NodeConfig, pool: SharedMemory | None, context: zmq.Context[Any]
) -> dict[str, UnitSender]:
    return unit_senders(chosen, ME, pool, context, never)


needs_ucx = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))


@pytest.mark.parametrize(
    ("transport", "names"),
    [
        ("auto", ["shm", "zmq"]),  # no test machine has RDMA
        ("shm", ["shm"]),
        ("zmq", ["zmq"]),
        ("zmq,shm", ["zmq", "shm"]),
        pytest.param("ucx", ["ucx"], marks=needs_ucx),
        pytest.param("ucx,zmq", ["ucx", "zmq"], marks=needs_ucx),
    ],
)
def test_both_ends_in_order(context: zmq.Context[Any], transport: str, names: list[str]) -> None:
    async def body() -> None:
        chosen = config(transport)
        pool = shared_pool(chosen, 4096)
        assert (pool is not None) is ("shm" in names)
        senders = senders_of(chosen, pool, context)
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
        assert list(senders_of(config("auto"), None, context)) == ["zmq"]
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
    ucx = TransportAddress("ucx", "ucx://abc")
    assert public_address(ucx, advertised) == ucx


@pytest.mark.parametrize(
    ("resources", "names"),
    [(("tcp/lo",), ["shm", "zmq"]), (("tcp/eth0", "rc_mlx5/mlx5_0:1"), ["shm", "ucx", "zmq"])],
)
@needs_ucx
def test_auto_takes_ucx_where_it_has_rdma(
    context: zmq.Context[Any],
    monkeypatch: pytest.MonkeyPatch,
    resources: tuple[str, ...],
    names: list[str],
) -> None:
    async def body() -> None:
        receivers = unit_receivers(config(), ME, Nowhere(), TransferStats(), context)
        assert [receiver.address.transport for receiver in receivers] == names
        for receiver in receivers:
            receiver.close()

    monkeypatch.setattr("node.transports.has_rdma_hardware", lambda: True)
    monkeypatch.setattr(
        "node.transports.network_of", lambda host: UcxNetwork(settings(), resources)
    )
    asyncio.run(body())


@pytest.mark.parametrize("transport", ["ucx", "ucx,zmq"])
def test_without_ucxx_who_asks_for_it_is_told_what_to_install(
    context: zmq.Context[Any], monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    async def body() -> None:
        for make in (
            lambda: senders_of(config(transport), None, context),
            lambda: unit_receivers(config(transport), ME, Nowhere(), TransferStats(), context),
        ):
            with pytest.raises(ConfigError, match=r"pip install 'baton-serve\[ucx\]'") as caught:
                make()
            assert "\n" not in str(caught.value)
        receivers = unit_receivers(config(), ME, Nowhere(), TransferStats(), context)
        assert [receiver.address.transport for receiver in receivers] == ["shm", "zmq"]
        for receiver in receivers:
            receiver.close()

    monkeypatch.setattr("node.transports.has_rdma_hardware", lambda: True)
    monkeypatch.setitem(sys.modules, "ucxx._lib", None)
    monkeypatch.setitem(sys.modules, "ucxx", None)
    asyncio.run(body())


def test_ucx_leaves_this_host_only_where_the_network_is_trusted() -> None:
    for key_file in (None, Path("fleet.key")):  # a key does not encrypt UCX
        with pytest.raises(ConfigError, match="--insecure"):
            config("ucx", host="0.0.0.0", key_file=key_file)
    assert config("ucx", host="0.0.0.0", insecure=True).transport == "ucx"


@pytest.mark.parametrize("transport", ["", "smoke", "zmq,", "zmq,zmq", "auto,zmq", "zmq, shm"])
def test_a_transport_that_is_none(transport: str) -> None:
    with pytest.raises(ConfigError, match="--transport"):
        config(transport)
