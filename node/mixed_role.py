"""A node that does everything: the prefill role and the decode role on one engine.

    Prefill(grant) ─▶ prefill half ─▶ handed over to a decode node
    Reserve … Commit, Generate ─▶ decode half ─▶ Tokens

An attempt is in one half or in none. The halves know nothing of each other: they share the engine,
and each of a step's requests is known to one of them.
"""

from __future__ import annotations

from collections.abc import Collection

from engine.plan import LayerProgress, StepResult
from kvtransfer.transport import TransferStats
from node.role import OpenTransfers, Role
from node.router_link import RouterLink
from wire.messages import Message
from wire.request_messages import Generate, Prefill, Rebind, Resend, Reserve
from wire.types import AttemptId, NodeId, TransportAddress
from wire.types import Role as RoleName


class MixedRole:
    """See node.role.Role."""

    name = RoleName.MIXED

    def __init__(self, prefill: Role, decode: Role) -> None:
        self._prefill = prefill
        self._decode = decode
        self._halves = (prefill, decode)

    @property
    def stats(self) -> TransferStats:
        return self._decode.stats  # the shell's, which both count in

    @property
    def open_transfers(self) -> OpenTransfers:
        return {**self._prefill.open_transfers, **self._decode.open_transfers}

    @property
    def transports(self) -> tuple[TransportAddress, ...]:
        return self._decode.transports

    @property
    def num_attempts(self) -> int:
        return sum(half.num_attempts for half in self._halves)

    def knows(self, id: AttemptId) -> bool:
        return any(half.knows(id) for half in self._halves)

    def handle(self, link: RouterLink, message: Message) -> None:
        for half in self._concerned(message):
            half.handle(link, message)

    def _concerned(self, message: Message) -> tuple[Role, ...]:
        """Both are told of an attempt's end; of what neither knows the decode half says so."""
        match message:
            case Prefill():
                return (self._prefill,)
            case Reserve() | Rebind() | Generate():
                return (self._decode,)
            case Resend(id=id):
                return (self._prefill if self._prefill.knows(id) else self._decode,)
        return self._halves

    def handle_peer(self, sender: NodeId, message: Message) -> None:
        self._decode.handle_peer(sender, message)

    def on_step(self, result: StepResult) -> None:
        for half in self._halves:
            half.on_step(result)

    def on_layers(self, progress: LayerProgress) -> None:
        self._prefill.on_layers(progress)

    def fail(self, request_ids: Collection[str], cause: str, message: str) -> None:
        for half in self._halves:
            half.fail(request_ids, cause, message)

    def fail_all(self, cause: str, message: str) -> None:
        for half in self._halves:
            half.fail_all(cause, message)

    def router_lost(self, link: RouterLink) -> None:
        for half in self._halves:
            half.router_lost(link)

    def drain(self) -> None:
        for half in self._halves:
            half.drain()

    def tick(self) -> None:
        for half in self._halves:
            half.tick()

    def close(self) -> None:
        for half in self._halves:
            half.close()
