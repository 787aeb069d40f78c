"""What a router is told when it starts; nothing changes it afterwards."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from router.access_config import AccessConfig
from router.checks import ServerLimits
from router.dispatch import DispatchLimits
from router.place import Place
from router.way import Mode, Rules
from tuner.goodput import Slo
from wire.errors import ConfigError
from wire.fleet_messages import MAX_WORKERS
from wire.logprobs import MAX_TOP_LOGPROBS
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
    handoff: Mode = Mode.AUTO
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
        if (self.slo_ttft_ms > 0) != (self.slo_tpot_ms > 0):
            raise ConfigError("--slo-ttft-ms and --slo-tpot-ms are given together, or none of them")
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
    def rules(self) -> Rules:
        """What the choice between handing over and serving in place goes by."""
        if not self.slo_ttft_ms:
            return Rules(self.handoff)
        return Rules(self.handoff, Slo(self.slo_ttft_ms / 1e3, self.slo_tpot_ms / 1e3))

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
