"""What a router is told when it starts; nothing changes it afterwards."""

from __future__ import annotations

import argparse
import ipaddress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from router.access_config import AccessConfig, access_from_args, add_access_arguments
from router.checks import ServerLimits
from router.dispatch import DispatchLimits
from router.place import Place
from router.tools.choose import FORMATS
from wire.errors import ConfigError
from wire.logprobs import MAX_TOP_LOGPROBS
from wire.messages import MAX_WORKERS
from wire.types import Pooling

_POSITIVE = (
    "max_streams",
    "max_body_bytes",
    "idle_connection_s",
    "heartbeat_s",
    "node_timeout_s",
    "response_ttl_s",
    "response_store_bytes",
)


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Addresses, names, limits. Times are in seconds."""

    host: str = "127.0.0.1"
    port: int = 8000
    control_host: str = "127.0.0.1"
    control_port: int = 7400  # 0: any free one
    workers: int = 1
    place: Place | None = None  # among several workers
    tokenizer: Path | None = None
    served_model_name: tuple[str, ...] = ()
    max_streams: int = 2048
    max_queue: int = 1024
    queue_timeout_s: float = 30.0
    request_timeout_s: float = 600.0
    reserve_timeout_s: float = 5.0
    heartbeat_s: float = 0.5
    node_timeout_s: float = 3.0
    node_stall_s: float = 60.0
    max_body_bytes: int = 8 << 20
    body_timeout_s: float = 30.0
    idle_connection_s: float = 75.0
    stream_buffer_bytes: int = 256 << 10
    hold_headers_s: float = 10.0
    debug_requests: int = 1000
    console: bool = True
    tune: str = "off"
    tune_profile: Path | None = None
    slo_ttft_ms: float = 0.0
    slo_tpot_ms: float = 0.0
    shutdown_timeout_s: float = 5.0
    response_store: Path | None = None
    response_ttl_s: float = 2_592_000.0
    response_store_bytes: int = 64 << 20
    max_logprobs: int = 20
    pooling: Pooling = Pooling.LAST
    trust_request_chat_template: bool = False
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    key_file: Path | None = None
    access: AccessConfig = field(default_factory=AccessConfig)
    insecure: bool = False
    log_level: str = "info"

    def __post_init__(self) -> None:
        self._check_exposure()
        for limit in _POSITIVE:
            if getattr(self, limit) <= 0:
                raise ConfigError(f"--{limit.replace('_', '-')} must be positive")
        if not 0 <= self.max_logprobs <= MAX_TOP_LOGPROBS:
            raise ConfigError(f"--max-logprobs must be between 0 and {MAX_TOP_LOGPROBS}")
        for limit in ("hold_headers_s", "debug_requests"):
            if getattr(self, limit) < 0:
                raise ConfigError(f"--{limit.replace('_', '-')} must not be negative")
        if self.tune != "off" and not (
            self.tune_profile and self.slo_ttft_ms > 0 and self.slo_tpot_ms > 0
        ):
            raise ConfigError("--tune needs --tune-profile, --slo-ttft-ms and --slo-tpot-ms")
        if not 1 <= self.workers <= MAX_WORKERS:
            raise ConfigError(f"--workers must be between 1 and {MAX_WORKERS}")
        if self.node_timeout_s <= self.heartbeat_s:
            raise ConfigError("--node-timeout-s must be longer than --heartbeat-s")

    def _check_exposure(self) -> None:
        """What other machines reach must be protected, or be meant to be open."""
        if self.insecure:
            return
        if not is_loopback(self.host) and not self.access.has_keys:
            raise ConfigError(
                f"--host {self.host} is reachable from other machines: give API keys with "
                "--api-key-file (or say --insecure to serve whoever asks)"
            )
        if not is_loopback(self.control_host) and self.key_file is None:
            raise ConfigError(
                f"--control-host {self.control_host} is reachable from other machines: make a "
                "fleet key with `baton keygen` and give it to router and nodes with --key-file "
                "(or say --insecure to do without)"
            )

    @property
    def control_url(self) -> str:
        return f"tcp://{_bracketed(self.control_host)}:{self.control_port}"

    @property
    def server_limits(self) -> ServerLimits:
        return ServerLimits(self.max_logprobs, self.trust_request_chat_template)

    @property
    def limits(self) -> DispatchLimits:
        return DispatchLimits(
            request_s=self.request_timeout_s,
            queue_s=self.queue_timeout_s,
            reserve_s=self.reserve_timeout_s,
        )


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


_HELP: dict[str, str] = {
    "host": "address of the HTTP server",
    "port": "port of the HTTP server (0: any free one)",
    "control_host": "address where nodes connect",
    "control_port": "port where nodes connect (0: any free one, told in the ready line)",
    "workers": "router processes that share the HTTP port, for more than one core's worth of "
    "streams. They take the control ports from --control-port on; nodes need only one of them. "
    "One that dies loses its streams and is started again. Limits per API key hold for all",
    "max_streams": "choices on nodes at the same time, of each worker",
    "max_queue": "choices that may wait, of each worker; beyond it the answer is 429",
    "queue_timeout_s": "how long a choice may wait for capacity; then the answer is 503",
    "request_timeout_s": "how long a request may take",
    "reserve_timeout_s": "how long a decode node may take to answer a reservation",
    "heartbeat_s": "interval of heartbeats, both ways",
    "node_timeout_s": "a node that is silent for so long is dead",
    "node_stall_s": "a node without progress for so long loses its requests",
    "max_body_bytes": "largest request body; beyond it the answer is 413",
    "body_timeout_s": "how long a client may take to send a body",
    "idle_connection_s": "a connection that brings no whole request head for so long is closed",
    "stream_buffer_bytes": "what may wait for a client that does not read its stream",
    "response_ttl_s": "how long a response of /v1/responses is kept after its last use",
    "response_store_bytes": "what kept responses may take; the oldest go first",
    "max_logprobs": "most alternatives per token that a client may ask for",
    "hold_headers_s": "how long a stream's status waits for the first token, so that an earlier "
    "error has a status of its own and Server-Timing is known (0: not at all)",
    "debug_requests": "finished choices that /debug/requests remembers, of each worker (0: no such "
    "route)",
    "shutdown_timeout_s": "how long running requests may take to finish at shutdown",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The router's flags; their defaults are `RouterConfig`'s."""
    defaults = {field.name: field.default for field in fields(RouterConfig)}
    for name, text in _HELP.items():
        default: Any = defaults[name]
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default),
            default=default,
            metavar=type(default).__name__.upper(),
            help=f"{text} (default: {default})",
        )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="PATH",
        help="model folder or tokenizer.json (default: ask the first node)",
    )
    parser.add_argument(
        "--served-model-name",
        nargs="+",
        default=(),
        metavar="NAME",
        help="names that clients may use for the model; answers carry the first "
        "(default: the nodes' own)",
    )
    parser.add_argument(
        "--response-store",
        type=Path,
        metavar="PATH",
        help="file (SQLite) that keeps what /v1/responses has answered; several routers of one "
        "machine may share it (default: in memory, lost with the router)",
    )
    parser.add_argument(
        "--pooling",
        choices=[pooling.value for pooling in Pooling],
        default=Pooling.LAST.value,
        help="which hidden states make an embedding: the last token's, or the mean of all "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--console",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="serve the page at / (default: %(default)s)",
    )
    parser.add_argument(
        "--trust-request-chat-template",
        action="store_true",
        help="let clients send a `chat_template` of their own; it runs in a sandbox, which bounds "
        "what it may touch, not how long it takes",
    )
    parser.add_argument(
        "--tool-call-parser",
        choices=("auto", *FORMATS),
        default=defaults["tool_call_parser"],
        help="how the model writes its calls (default: what its chat template shows, else hermes)",
    )
    parser.add_argument(
        "--reasoning-parser",
        choices=("auto", "think", "none"),
        default=defaults["reasoning_parser"],
        help="whether text in <think></think> is told as reasoning_content "
        "(default: if the chat template knows it)",
    )
    parser.add_argument(
        "--key-file",
        type=Path,
        metavar="PATH",
        help="the fleet's key, made by `baton keygen`; nodes without it are not heard",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="allow addresses that other machines reach, without keys",
    )
    _add_tuner_arguments(parser)
    add_access_arguments(parser)
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default=defaults["log_level"],
        help="what to log on stderr (default: %(default)s)",
    )


def _add_tuner_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tune",
        choices=("off", "dry-run", "on"),
        default="off",
        help="move nodes between prefill and decode as the work changes; dry-run only says what it "
        "would do (default: %(default)s)",
    )
    parser.add_argument(
        "--tune-profile",
        type=Path,
        metavar="FILE",
        help="what the nodes' steps take, as `baton profile` measured it",
    )
    parser.add_argument(
        "--slo-ttft-ms",
        type=float,
        default=0.0,
        metavar="MS",
        help="the tuner's limit of the time to first token",
    )
    parser.add_argument(
        "--slo-tpot-ms",
        type=float,
        default=0.0,
        metavar="MS",
        help="its limit of the time per further token",
    )


def from_args(args: argparse.Namespace) -> RouterConfig:
    """Raises ConfigError where the flags contradict each other."""
    names = {field.name for field in fields(RouterConfig)} - {"access", "place"}
    given = {name: getattr(args, name) for name in names}
    given["access"] = access_from_args(args)
    given["place"] = getattr(args, "place", None)
    given["pooling"] = Pooling(args.pooling)
    given["served_model_name"] = tuple(args.served_model_name)
    return RouterConfig(**given)
