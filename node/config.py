"""What a node is told when it starts."""

from __future__ import annotations

import argparse
import ipaddress
import math
import socket
from dataclasses import dataclass
from pathlib import Path

from engine.drafting.config import NO_SPECULATION, SpeculativeConfig
from wire.errors import ConfigError

STORAGES = ("float32", "bfloat16", "float16", "int8")  # of weights, as kernels/weights.py
TRANSPORTS = ("shm", "zmq", "ucx", "cuda-ipc")  # auto chooses among them, see node/transports.py
DEFAULT_CONTROL_URL = "tcp://127.0.0.1:7400"
_MAX_NAME = 256  # no message carries a longer one
_MAX_PORT = 65535
_MAX_OVERCOMMIT = 1000


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """Settings of one node; nothing changes them afterwards."""

    model: Path
    name: str
    routers: tuple[str, ...] = (DEFAULT_CONTROL_URL,)
    served_model_name: str = "model"
    host: str = "127.0.0.1"
    advertise_host: str = ""
    port: int = 0
    key_file: Path | None = None
    insecure: bool = False
    transport: str = "auto"
    device: str = "cpu"  # or cuda:N
    gpu_memory_utilization: float = 0.9
    cuda_graphs: bool = True
    dtype: str = "auto"
    threads: int = 0
    max_model_len: int | None = None
    block_size: int = 16
    kv_memory: int = 0
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    long_prefill_token_threshold: int = 0
    kv_overcommit: float = 1.0
    enable_prefix_caching: bool = True
    async_scheduling: bool = False
    weight_dtype: str = "auto"
    fusing: bool = True
    deterministic: bool = False
    lease_ttl_s: float = 10.0
    transfer_dtype: str = "auto"
    speculative: SpeculativeConfig = NO_SPECULATION
    window_bytes: int = 32 << 20
    router_timeout_s: float = 30.0
    drain_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        self._check_connections()
        self._check_engine()

    def _check_connections(self) -> None:
        _check(len(self.host) > 0, "--host is empty")
        if not is_loopback(self.host) and self.key_file is None and not self.insecure:
            raise ConfigError(
                f"--host {self.host} is reachable from other machines: make a fleet key with "
                "`baton keygen` and give it to router and nodes with --key-file (or add "
                "--insecure if the network is trusted)"
            )
        _check(0 <= self.port <= _MAX_PORT, f"--port must be between 0 and {_MAX_PORT}")
        good = len(self.name) <= _MAX_NAME and self.name.isprintable() and " " not in self.name
        _check(good, f"--name must have at most {_MAX_NAME} characters and no space")
        _check(
            0 < len(self.served_model_name) <= _MAX_NAME,
            f"--served-model-name must have between 1 and {_MAX_NAME} characters",
        )
        for name in ("router_timeout_s", "drain_timeout_s"):
            flag = name.replace("_", "-")
            _check(0 <= getattr(self, name) < math.inf, f"--{flag} must be a number of seconds")
        for url in self.routers:
            split_url(url)
        self._check_transport()

    def _check_transport(self) -> None:
        try:
            names = parse_transport(self.transport).split(",")
        except argparse.ArgumentTypeError as error:
            raise ConfigError(f"--transport {error}") from error
        if "ucx" in names and not is_loopback(self.host) and not self.insecure:
            raise ConfigError(
                f"--transport ucx on --host {self.host} would send KV blocks unencrypted and let "
                "anybody there reach UCX; take zmq, or add --insecure if the network is trusted"
            )

    def _check_engine(self) -> None:
        _check(0 < self.block_size <= 1024, "--block-size must be between 1 and 1024")
        _check(self.kv_memory >= 0, "--kv-cache-memory must not be negative")
        _check(self.threads >= 0, "--threads must not be negative")
        _check(
            0 < self.gpu_memory_utilization <= 1,
            "--gpu-memory-utilization must be above 0 and at most 1",
        )
        _check(
            1 <= self.kv_overcommit <= _MAX_OVERCOMMIT,
            f"--kv-overcommit must be between 1.0 and {_MAX_OVERCOMMIT}",
        )
        _check(
            min(self.max_num_seqs, self.max_num_batched_tokens) >= 1,
            "--max-num-seqs and --max-num-batched-tokens must be at least 1",
        )
        _check(
            self.long_prefill_token_threshold >= 0,
            "--long-prefill-token-threshold must not be negative",
        )
        _check(0 < self.lease_ttl_s < math.inf, "--lease-ttl-s must be a number of seconds above 0")

    @property
    def public_host(self) -> str:
        """The host name that other processes use to reach this node."""
        if self.advertise_host:
            return self.advertise_host
        return socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host

    @property
    def bind_url(self) -> str:
        """Where sockets for other nodes listen: any free port of the host."""
        return f"tcp://{_bracketed(self.host)}:*"

    def url(self, scheme: str, bound: str) -> str:
        """The URL of a `bound` address as other processes reach it."""
        return f"{scheme}://{_bracketed(self.public_host)}:{bound.rpartition(':')[2]}"

    @property
    def ipv6(self) -> bool:
        """Whether any address of this node or its routers needs IPv6."""
        return any(":" in host for host in (self.host, *(split_url(u)[0] for u in self.routers)))


def _check(holds: bool, mistake: str) -> None:
    if not holds:
        raise ConfigError(mistake)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def split_url(url: str) -> tuple[str, int]:
    """Host and port of a tcp:// URL. Raises ConfigError if it is something else."""
    scheme, _, address = url.partition("://")
    host, _, port = address.rpartition(":")
    is_port = port.isascii() and port.isdigit() and int(port) <= _MAX_PORT
    if scheme != "tcp" or not host or not is_port:
        raise ConfigError(f"{url!r} is not an address like tcp://127.0.0.1:7400")
    return host.strip("[]"), int(port)


def parse_transport(text: str) -> str:
    """`auto`, or names of transports, the best one first, with commas between them."""
    names = text.split(",")
    if text == "auto" or (set(names) <= set(TRANSPORTS) and len(set(names)) == len(names)):
        return text
    raise argparse.ArgumentTypeError(
        f"{text!r} is neither auto nor one or several of {','.join(TRANSPORTS)}"
    )
