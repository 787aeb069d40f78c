"""What is simulated: a fleet, its nodes, and how long things besides the forward pass take."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.config import EngineConfig
from tuner.latency import LatencyModel
from wire.layout import KVLayout


@dataclass(frozen=True, slots=True)
class Split:
    """How many nodes do what. Mixed nodes prefill and decode; they are alone or there are none."""

    prefill: int = 0
    decode: int = 0
    mixed: int = 0

    def __post_init__(self) -> None:
        apart = self.prefill > 0 and self.decode > 0 and self.mixed == 0
        together = self.prefill == 0 == self.decode and self.mixed > 0
        if not (apart or together):
            raise ValueError(f"{self} is no fleet: prefill and decode nodes, or mixed ones")

    @property
    def num_nodes(self) -> int:
        return self.prefill + self.decode + self.mixed

    def __str__(self) -> str:
        if self.mixed:
            return f"{self.mixed} colocated"
        return f"{self.prefill} prefill + {self.decode} decode"


@dataclass(frozen=True, slots=True)
class Failure:
    """A node dies and does not come back."""

    node: str  # "prefill-0", "decode-1", "mixed-2"
    at: float


@dataclass(frozen=True, slots=True)
class Setup:
    """One simulated fleet."""

    split: Split
    engine: EngineConfig
    layout: KVLayout
    model: LatencyModel
    hop_s: float = 0.0005  # one message from one process to another
    heartbeat_s: float = 0.5
    node_timeout_s: float = 3.0
    max_streams: int = 4096
    max_waiting: int = 4096
    failures: tuple[Failure, ...] = field(default=())
