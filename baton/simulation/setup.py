"""What is simulated: a fleet, its nodes, and how long things besides the forward pass take."""

from __future__ import annotations

from dataclasses import dataclass, field

from baton.simulation.clock import VirtualClock
from baton.simulation.machine import SharedMachine
from baton.simulation.tuned import Known, Tuning
from engine.config import EngineConfig
from router.pace import Pace
from router.way import Mode, Rules
from tuner.latency import LatencyModel, StepWork
from tuner.online import Costs
from tuner.overheads import NO_OVERHEADS, Overheads
from tuner.trace import Trace
from wire.geometry import geometry_for
from wire.layout import KVLayout

HOP_S = 0.0005  # one message from one process to another
ALWAYS = Rules(Mode.ALWAYS)
HOPS_TO_FIRST_TOKEN = 4  # reserve, granted, prefill, token


@dataclass(frozen=True, slots=True)
class Split:
    """How many nodes do what. Mixed nodes prefill and decode, and need no decode nodes."""

    prefill: int = 0
    decode: int = 0
    mixed: int = 0

    def __post_init__(self) -> None:
        apart = self.prefill > 0 and self.decode > 0 and self.mixed == 0
        together = self.decode == 0 and self.mixed > 0
        if not (apart or together):
            raise ValueError(
                f"{self} is no fleet: prefill nodes with decode or mixed ones, or those"
            )

    @property
    def num_nodes(self) -> int:
        return self.prefill + self.decode + self.mixed

    def __str__(self) -> str:
        if self.mixed:
            apart = f"{self.prefill} prefill + {self.mixed} mixed"
            return apart if self.prefill else f"{self.mixed} colocated"
        return f"{self.prefill} prefill + {self.decode} decode"


@dataclass(frozen=True, slots=True)
class Failure:
    """A node dies and does not come back."""

    node: str  # "prefill-0", "decode-1", "mixed-2"
    at: float


@dataclass(frozen=True, slots=True)
class Setup:
    """One simulated fleet. `model` is of the bare engine; `overheads` come on top."""

    split: Split
    engine: EngineConfig
    layout: KVLayout
    model: LatencyModel
    overheads: Overheads = NO_OVERHEADS
    hop_s: float = HOP_S  # one message from one process to another
    heartbeat_s: float = 0.5
    node_timeout_s: float = 3.0
    max_streams: int = 4096
    max_waiting: int = 4096
    failures: tuple[Failure, ...] = field(default=())
    rules: Rules = ALWAYS
    tuning: Tuning | Known | None = None  # with prefill and decode nodes only

    @property
    def step_model(self) -> LatencyModel:
        """What a node's steps take while no other computes on its machine."""
        return self.overheads.applied(self.model)

    @property
    def costs(self) -> Costs:
        """What the tuner goes by, if it is told the truth."""
        return Costs.of(self.step_model, self.overheads)

    def pace(self, trace: Trace) -> Pace:
        """What the router's choice of a way goes by: it has seen requests like these before."""
        over, model = self.overheads, self.step_model
        constant, slope = self.model.transfer
        tail = 1 / geometry_for(self.layout).num_layer_groups  # the rest leaves during the prefill
        handoff = (over.handoff_s + 2 * self.hop_s + constant, slope * tail)
        mean_output = sum(request.output_len for request in trace.requests) / len(trace.requests)
        stream_s = max(1e-3, mean_output * model.step_s(StepWork(decode_batch=1)))
        return Pace(model, handoff, stream_s, self.engine.max_num_batched_tokens)

    def machine(self, clock: VirtualClock) -> SharedMachine | None:
        """Where all nodes compute, if they were measured to slow each other down."""
        return SharedMachine(clock) if self.overheads.shares_machine else None
