"""What a node is told when it starts."""

from __future__ import annotations

import argparse
import socket
from dataclasses import dataclass
from pathlib import Path

from wire.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
DEFAULT_CONTROL_URL = "tcp://127.0.0.1:7400"
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """Settings of one node; nothing changes them afterwards."""

    model: Path
    name: str
    routers: tuple[str, ...] = (DEFAULT_CONTROL_URL,)
    served_model_name: str = ""
    host: str = "127.0.0.1"
    advertise_host: str = ""
    port: int = 0
    insecure: bool = False
    dtype: str = "auto"
    threads: int = 0
    max_model_len: int | None = None
    block_size: int = 16
    kv_memory: int = 0
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    kv_overcommit: float = 1.0
    enable_prefix_caching: bool = True
    lease_ttl_s: float = 10.0
    window_bytes: int = 32 << 20
    router_timeout_s: float = 30.0
    drain_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        if self.host not in LOOPBACK and not self.insecure:
            raise ConfigError(
                f"--host {self.host} is reachable from other machines and node sockets are not "
                "encrypted yet; add --insecure if the network is trusted"
            )
        if not 0 < self.block_size <= 1024:
            raise ConfigError("--block-size must be between 1 and 1024")
        if self.kv_overcommit < 1:
            raise ConfigError("--kv-overcommit must be at least 1.0")
        if min(self.max_num_seqs, self.max_num_batched_tokens) < 1:
            raise ConfigError("--max-num-seqs and --max-num-batched-tokens must be at least 1")
        for url in self.routers:
            split_url(url)

    @property
    def public_host(self) -> str:
        """The host name that other processes use to reach this node."""
        if self.advertise_host:
            return self.advertise_host
        return socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host


def split_url(url: str) -> tuple[str, int]:
    """Host and port of a tcp:// URL. Raises ConfigError if it is something else."""
    scheme, _, address = url.partition("://")
    host, _, port = address.rpartition(":")
    if scheme != "tcp" or not host or not port.isdigit():
        raise ConfigError(f"{url!r} is not an address like tcp://127.0.0.1:7400")
    return host.strip("[]"), int(port)


def parse_bytes(text: str) -> int:
    """Bytes in a size like 512M or 2g."""
    number = text.rstrip("bBiIkKmMgG")
    unit = text[len(number) :].lower().rstrip("b").rstrip("i")
    try:
        return int(float(number) * _UNITS[unit])
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 512M or 2G") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `baton prefill` and `baton decode`."""
    parser.add_argument("model", metavar="MODEL", help="folder of a Hugging Face model")
    add_connection_arguments(parser)
    add_engine_arguments(parser)


def add_connection_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that say where the node stands and whom it serves."""
    group = parser.add_argument_group("connections")
    group.add_argument(
        "--router",
        action="append",
        metavar="URL",
        help=f"control address of a router; give it once per router ({DEFAULT_CONTROL_URL})",
    )
    group.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    group.add_argument("--served-model-name", default="", help="name in the API (the folder's)")
    group.add_argument("--name", help="name of this node in the fleet (role, host name, pid)")
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine only)"
    )
    group.add_argument(
        "--advertise-host", default="", help="host name that other nodes use to reach this one"
    )
    group.add_argument(
        "--port", type=int, default=0, help="port of /health and /metrics (0: any free one)"
    )
    group.add_argument(
        "--insecure",
        action="store_true",
        help="allow a --host that other machines can reach, without encryption",
    )
    group.add_argument(
        "--router-timeout", type=float, default=30.0, metavar="S", help="wait so long for a router"
    )
    group.add_argument(
        "--drain-timeout",
        type=float,
        default=30.0,
        metavar="S",
        help="on SIGTERM, let running requests finish for so long, then hand them back",
    )


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the engine; `baton serve` passes them on to its nodes."""
    default = NodeConfig(Path(), "")
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="auto: float32 on CPUs without bf16 units, else the checkpoint's",
    )
    group.add_argument(
        "--threads", type=int, default=0, help="compute threads (0: all cores of this process)"
    )
    group.add_argument(
        "--max-model-len", type=int, default=None, help="longest prompt plus output (the model's)"
    )
    group.add_argument(
        "--block-size", type=int, default=default.block_size, help="tokens per KV block"
    )
    group.add_argument(
        "--kv-memory",
        type=parse_bytes,
        default=0,
        metavar="SIZE",
        help="memory of the KV block pool, e.g. 2G (a fifth of what is free, at most 1G)",
    )
    group.add_argument(
        "--max-num-seqs", type=int, default=default.max_num_seqs, help="requests per step"
    )
    group.add_argument(
        "--max-num-batched-tokens",
        type=int,
        default=default.max_num_batched_tokens,
        help="tokens per step; longer prompts are computed in chunks of this size",
    )
    group.add_argument(
        "--kv-overcommit",
        type=float,
        default=default.kv_overcommit,
        metavar="X",
        help="promise X times the KV blocks there are; above 1 requests may be preempted",
    )
    group.add_argument(
        "--no-prefix-caching", action="store_true", help="compute every prompt from its start"
    )
    group.add_argument(
        "--lease-ttl",
        type=float,
        default=default.lease_ttl_s,
        metavar="S",
        help="a reservation without progress or heartbeat ends after this time",
    )


def from_args(args: argparse.Namespace, *, role: str, pid: int) -> NodeConfig:
    """The config that the flags describe."""
    path = Path(args.model)
    return NodeConfig(
        model=path,
        name=args.name or f"{role}-{socket.gethostname()}-{pid}",
        routers=tuple(args.router or (DEFAULT_CONTROL_URL,)),
        served_model_name=args.served_model_name or path.resolve().name,
        host=args.host,
        advertise_host=args.advertise_host,
        port=args.port,
        insecure=args.insecure,
        dtype=args.dtype,
        threads=args.threads,
        max_model_len=args.max_model_len,
        block_size=args.block_size,
        kv_memory=args.kv_memory,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        kv_overcommit=args.kv_overcommit,
        enable_prefix_caching=not args.no_prefix_caching,
        lease_ttl_s=args.lease_ttl,
        router_timeout_s=args.router_timeout,
        drain_timeout_s=args.drain_timeout,
    )
