"""The KV transports that a node offers and uses, the best one first.

shm   both nodes on one host: one copy, out of the prefill node's shared pool
zmq   everything else, over TCP
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import zmq

from kvtransfer.shared_memory import SharedMemory
from kvtransfer.shm_transport import ShmUnitReceiver, ShmUnitSender
from kvtransfer.transport import TransferStats, UnitReceiver, UnitSender, UnitSink
from kvtransfer.zmq_transport import ZmqUnitReceiver, ZmqUnitSender
from node.config import NodeConfig
from wire.errors import ConfigError
from wire.types import NodeId, TransportAddress

log = logging.getLogger(__name__)

BEST_FIRST = ("shm", "zmq")


def shared_pool(config: NodeConfig, num_bytes: int) -> SharedMemory | None:
    """Memory for a prefill node's blocks that decode nodes of this host may read, if it is wanted.

    Raises ConfigError where it is wanted by name and there is none.
    """
    if "shm" not in _wanted(config):
        return None
    try:
        return SharedMemory(num_bytes)
    except ConfigError as error:
        _do_without("shm", config, error)
        return None


def unit_senders(
    config: NodeConfig, me: NodeId, pool: SharedMemory | None, context: zmq.Context[Any]
) -> dict[str, UnitSender]:
    """The sending ends of a prefill node."""
    senders: dict[str, UnitSender] = {}
    for name in _wanted(config):
        if name == "zmq":
            senders[name] = ZmqUnitSender(me, context)
        elif pool is not None:
            senders[name] = ShmUnitSender(me, pool)
    return senders


def unit_receivers(
    config: NodeConfig, me: NodeId, sink: UnitSink, stats: TransferStats, context: zmq.Context[Any]
) -> list[UnitReceiver]:
    """The receiving ends of a decode node. Raises ConfigError where one asked for is not there."""
    make: dict[str, Callable[[], UnitReceiver]] = {
        "shm": lambda: ShmUnitReceiver(me, sink, stats),
        "zmq": lambda: ZmqUnitReceiver(me, config.bind_url, sink, stats, context),
    }
    receivers = []
    for name in _wanted(config):
        try:
            receivers.append(make[name]())
        except ConfigError as error:
            _do_without(name, config, error)
    return receivers


def public_address(address: TransportAddress, config: NodeConfig) -> TransportAddress:
    """The address as other machines use it; that of a Unix socket is the same everywhere."""
    scheme = address.url.partition("://")[0]
    if scheme != "tcp":
        return address
    return TransportAddress(address.transport, config.url(scheme, address.url))


def _wanted(config: NodeConfig) -> tuple[str, ...]:
    return BEST_FIRST if config.transport == "auto" else (config.transport,)


def _do_without(name: str, config: NodeConfig, error: ConfigError) -> None:
    """Of all transports only the last one must work."""
    if config.transport == name or name == BEST_FIRST[-1]:
        raise error
    log.info("no %s transport: %s", name, error)
