"""What a role must do for the shell it stands in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol, TypeAlias

from engine.plan import LayerProgress, StepResult
from kvtransfer.transport import TransferStats
from node.router_link import RouterLink
from telemetry.metrics import Metric
from wire.messages import Message
from wire.types import AttemptId, NodeId, TransportAddress
from wire.types import Role as RoleName

OpenTransfers: TypeAlias = "Mapping[Metric, dict[str, int]]"


class Role(Protocol):
    """Prefill, decode or mixed. Every method is called in the event loop."""

    @property
    def name(self) -> RoleName: ...

    @property
    def stats(self) -> TransferStats: ...

    @property
    def open_transfers(self) -> OpenTransfers:
        """How many transfers are in which state: handoffs, leases, as the role has them."""
        ...

    @property
    def transports(self) -> tuple[TransportAddress, ...]:
        """Where this node receives KV blocks."""
        ...

    @property
    def num_attempts(self) -> int:
        """Attempts that hold anything here."""
        ...

    def knows(self, id: AttemptId) -> bool:
        """Whether the attempt is here, or its end was not acknowledged yet."""
        ...

    def handle(self, link: RouterLink, message: Message) -> None:
        """One message of a registered router."""
        ...

    def handle_peer(self, sender: NodeId, message: Message) -> None:
        """One message that another node sent to this node's peer address."""
        ...

    def on_step(self, result: StepResult) -> None:
        """A step is done."""
        ...

    def on_layers(self, progress: LayerProgress) -> None:
        """A step is under way: see Engine.step."""
        ...

    def fail(self, request_ids: Collection[str], cause: str, message: str) -> None:
        """End the attempts that have these engine requests; their routers may try again."""
        ...

    def fail_all(self, cause: str, message: str) -> None:
        """End every attempt here and tell its router, which may try again elsewhere."""
        ...

    def router_lost(self, link: RouterLink) -> None:
        """Drop everything that this router asked for."""
        ...

    def drain(self) -> None:
        """Take nothing new from now on."""
        ...

    def tick(self) -> None:
        """Let time pass."""
        ...

    def close(self) -> None: ...
