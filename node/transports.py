"""The KV transports that a node offers and uses, the best one first.

cuda-ipc  both nodes on GPUs of one host that can read each other: one copy, from GPU to GPU
shm       both nodes on one host: one copy, out of the prefill node's shared pool
ucx       RDMA; by itself only where UCX has it. Over TCP it is slower than zmq, costs half a second
          of imports, and opens a port whose reader trusts what it reads: then only for who asks
zmq       everything else, over TCP
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import zmq

from kvtransfer.cuda_ipc_transport import NAME as CUDA_IPC
from kvtransfer.cuda_ipc_transport import CudaIpcUnitSender, cuda_ipc_receiver
from kvtransfer.cuda_memory import CudaPool
from kvtransfer.device_pool import OpenPool, Pool
from kvtransfer.shared_memory import SharedMemory
from kvtransfer.shm_transport import ShmUnitReceiver, ShmUnitSender
from kvtransfer.transport import OnLost, TransferStats, UnitReceiver, UnitSender, UnitSink
from kvtransfer.ucx_devices import UcxNetwork, has_rdma_hardware, network_of
from kvtransfer.ucx_receiver import UcxUnitReceiver
from kvtransfer.ucx_sender import UcxUnitSender
from kvtransfer.zmq_transport import ZmqUnitReceiver, ZmqUnitSender
from node.config import NodeConfig, is_loopback
from node.devices import gpu_index, is_gpu
from wire.errors import ConfigError
from wire.types import NodeId, TransportAddress

log = logging.getLogger(__name__)

End = TypeVar("End")


def shared_pool(config: NodeConfig, num_bytes: int) -> SharedMemory | None:
    """Memory for a prefill node's blocks that decode nodes of this host may read, if it is wanted.

    Raises ConfigError where it is wanted by name and there is none.
    """
    return _pool("shm", config, lambda: SharedMemory(num_bytes))


def shared_gpu_pool(config: NodeConfig, num_bytes: int) -> CudaPool | None:
    """The same of a GPU, for its blocks themselves."""
    return _pool(CUDA_IPC, config, lambda: CudaPool(gpu_index(config.device), num_bytes))


def _pool(name: str, config: NodeConfig, make: Callable[[], End]) -> End | None:
    if config.transport != "auto" and name not in config.transport.split(","):
        return None
    try:
        return make()
    except ConfigError as error:
        _do_without(name, config, error)
        return None


def unit_senders(
    config: NodeConfig,
    me: NodeId,
    pool: SharedMemory | None,
    context: zmq.Context[Any],
    on_lost: OnLost,
    device_pool: Pool | None = None,
) -> dict[str, UnitSender]:
    """The sending ends of a prefill node. Raises ConfigError where one asked for is not there.

    Args:
        pool: host memory that decode nodes of this host may read, if there is any.
        device_pool: the same of a device, with the blocks themselves.
    """
    make: dict[str, Callable[[], UnitSender]] = {
        "zmq": lambda: ZmqUnitSender(me, context),
        "ucx": lambda: UcxUnitSender(me, on_lost=on_lost, options=_ucx(config).options),
    }
    if pool is not None:
        make["shm"] = lambda: ShmUnitSender(me, pool)
    if device_pool is not None:
        make[CUDA_IPC] = lambda: CudaIpcUnitSender(me, device_pool, on_lost)
    return _make_all(config, make)


def unit_receivers(
    config: NodeConfig,
    me: NodeId,
    sink: UnitSink,
    stats: TransferStats,
    context: zmq.Context[Any],
    open_pool: OpenPool | None = None,
) -> list[UnitReceiver]:
    """The receiving ends of a decode node. Raises ConfigError where one asked for is not there.

    Args:
        open_pool: maps memory of a device that other processes share, where this node has one.
    """
    make: dict[str, Callable[[], UnitReceiver]] = {
        "shm": lambda: ShmUnitReceiver(me, sink, stats),
        "zmq": lambda: ZmqUnitReceiver(me, config.bind_url, sink, stats, context),
        "ucx": lambda: UcxUnitReceiver(me, sink, stats, options=_ucx(config).options),
    }
    if open_pool is not None:
        make[CUDA_IPC] = lambda: cuda_ipc_receiver(me, sink, stats, open_pool)
    return list(_make_all(config, make).values())


def _make_all(config: NodeConfig, make: Mapping[str, Callable[[], End]]) -> dict[str, End]:
    ends: dict[str, End] = {}
    for name in _wanted(config):
        try:
            if name in make:
                ends[name] = make[name]()
            elif config.transport != "auto":
                raise ConfigError(f"--transport {name} needs a node on a GPU; see --device")
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
    on_gpu = (CUDA_IPC,) if is_gpu(config.device) else ()
    return (*on_gpu, *(("shm", "ucx", "zmq") if _ucx_is_fast(config) else ("shm", "zmq")))


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
