"""The KV transports that a node offers and uses, the best one first.

shm   both nodes on one host: one copy, out of the prefill node's shared pool
ucx   RDMA; by itself only where UCX has it. Over TCP it is slower than zmq, costs half a second of
      imports, and opens a port whose reader trusts what it reads: then only for who asks for it
zmq   everything else, over TCP
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import zmq

from kvtransfer.shared_memory import SharedMemory
from kvtransfer.shm_transport import ShmUnitReceiver, ShmUnitSender
from kvtransfer.transport import OnLost, TransferStats, UnitReceiver, UnitSender, UnitSink
from kvtransfer.ucx_devices import UcxNetwork, has_rdma_hardware, network_of
from kvtransfer.ucx_receiver import UcxUnitReceiver
from kvtransfer.ucx_sender import UcxUnitSender
from kvtransfer.zmq_transport import ZmqUnitReceiver, ZmqUnitSender
from node.config import NodeConfig, is_loopback
from wire.errors import ConfigError
from wire.types import NodeId, TransportAddress

log = logging.getLogger(__name__)

End = TypeVar("End")


def shared_pool(config: NodeConfig, num_bytes: int) -> SharedMemory | None:
    """Memory for a prefill node's blocks that decode nodes of this host may read, if it is wanted.

    Raises ConfigError where it is wanted by name and there is none.
    """
    if config.transport != "auto" and "shm" not in config.transport.split(","):
        return None
    try:
        return SharedMemory(num_bytes)
    except ConfigError as error:
        _do_without("shm", config, error)
        return None


def unit_senders(
    config: NodeConfig,
    me: NodeId,
    pool: SharedMemory | None,
    context: zmq.Context[Any],
    on_lost: OnLost,
) -> dict[str, UnitSender]:
    """The sending ends of a prefill node. Raises ConfigError where one asked for is not there."""
    make: dict[str, Callable[[], UnitSender]] = {
        "zmq": lambda: ZmqUnitSender(me, context),
        "ucx": lambda: UcxUnitSender(me, on_lost=on_lost, options=_ucx(config).options),
    }
    if pool is not None:
        make["shm"] = lambda: ShmUnitSender(me, pool)
    return _make_all(config, make)


def unit_receivers(
    config: NodeConfig, me: NodeId, sink: UnitSink, stats: TransferStats, context: zmq.Context[Any]
) -> list[UnitReceiver]:
    """The receiving ends of a decode node. Raises ConfigError where one asked for is not there."""
    make: dict[str, Callable[[], UnitReceiver]] = {
        "shm": lambda: ShmUnitReceiver(me, sink, stats),
        "zmq": lambda: ZmqUnitReceiver(me, config.bind_url, sink, stats, context),
        "ucx": lambda: UcxUnitReceiver(me, sink, stats, options=_ucx(config).options),
    }
    return list(_make_all(config, make).values())


def _make_all(config: NodeConfig, make: Mapping[str, Callable[[], End]]) -> dict[str, End]:
    ends: dict[str, End] = {}
    for name in _wanted(config):
        try:
            if name in make:
                ends[name] = make[name]()
        except ConfigError as error:
            _do_without(name, config, error)
    return ends


def _ucx(config: NodeConfig) -> UcxNetwork:
    network = network_of(config.host)
    log.info("%s", network)
    return network


def public_address(address: TransportAddress, config: NodeConfig) -> TransportAddress:
    """The address as other machines use it; that of a Unix socket is the same everywhere."""
    scheme = address.url.partition("://")[0]
    if scheme != "tcp":
        return address
    return TransportAddress(address.transport, config.url(scheme, address.url))


def _wanted(config: NodeConfig) -> tuple[str, ...]:
    if config.transport != "auto":
        return tuple(config.transport.split(","))
    return ("shm", "ucx", "zmq") if _ucx_is_fast(config) else ("shm", "zmq")


def _ucx_is_fast(config: NodeConfig) -> bool:
    """Whether ucx goes before zmq without being asked for.

    The hardware is asked before UCX, whose import takes half a second. It is not encrypted, so a
    network must be trusted explicitly.
    """
    if not has_rdma_hardware() or (not is_loopback(config.host) and not config.insecure):
        return False
    try:
        network = network_of(config.host)
    except ConfigError as error:
        log.info("there is RDMA hardware, and no ucx transport: %s", error)
        return False
    if not network.has_rdma:
        log.info("there is RDMA hardware that UCX does not use here: %s", network)
    return network.has_rdma


def _do_without(name: str, config: NodeConfig, error: ConfigError) -> None:
    """What was asked for by name must be there; of the others only the last one."""
    if config.transport != "auto" or name == "zmq":
        raise error
    log.info("no %s transport: %s", name, error)
