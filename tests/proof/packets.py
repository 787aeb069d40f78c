"""What is on the way between the model's nodes, and the few things that all of them know.

A block holds two tokens in two layers; it is one unit, or one per layer. What it should hold is a
symbol, four bytes per cell: (request, attempt, block and layer, life of the prefill node); so what
is of another request, an earlier attempt, another place or a dead process never looks right.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b

from wire.codec import Envelope, encode
from wire.layout import KVLayout
from wire.messages import Message
from wire.types import AttemptId, NodeId, TransportAddress

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_dim=1, block_size=2, dtype="float32")
ROUTER = NodeId("router", 1)
ADDRESS = TransportAddress("model", "model://decode")
TTL = 100.0
DEADLINE_S = 170.0


class BrokenInvariantError(AssertionError):
    """What must never be, is."""


@dataclass(frozen=True, slots=True, eq=False)
class Packet:
    """A message, or a unit with its bytes; as good as another one with the same bytes.

    Once sent it may arrive at any later time, often, or never.
    """

    sender: NodeId
    receiver: NodeId
    message: Message
    data: bytes | None = None
    forged: bool = False  # names a lease without the right to: nothing may come of it
    envelope: bytes = field(init=False)

    def __post_init__(self) -> None:
        envelope = encode(Envelope(self.sender, self.receiver, self.message))
        object.__setattr__(self, "envelope", envelope)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Packet) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self.envelope)  # which bytes remember

    @property
    def _key(self) -> tuple[bytes, bytes | None, bool]:
        return self.envelope, self.data, self.forged

    def __str__(self) -> str:
        mark = "forged " if self.forged else ""
        data = f" [{self.data.hex()}]" if self.data is not None else ""
        return f"{mark}{_brief(self.message)}{data} from {self.sender}, for {self.receiver}"


def _brief(message: Message) -> str:
    """What a reader of a trace needs to know of a message."""
    names = ("id", "prefill", "lease", "unit", "handle", "cause", "meant_for")
    shown = [f"{name}={getattr(message, name)}" for name in names if hasattr(message, name)]
    return f"{type(message).__name__}({', '.join(shown)})"


def tokens_of(request: str, num_tokens: int) -> tuple[int, ...]:
    """Prompts of two requests differ in every token."""
    return tuple(ord(request) * 100 + position for position in range(num_tokens))


def content(id: AttemptId, block: int, num_tokens: int, prefill: NodeId) -> bytes:
    """The first slots of a block that this life of a prefill node computes for this attempt."""
    places = (block * LAYOUT.num_layers + layer for layer in range(LAYOUT.num_layers))
    cells = (bytes([ord(id.request), id.attempt, at, prefill.incarnation]) for at in places)
    return b"".join(cell * (2 * num_tokens) for cell in cells)


def secret(*names: object) -> bytes:
    """Random enough: other names, other bytes. Exploring needs the same choice each time."""
    return blake2b(repr(names).encode(), digest_size=16).digest()


def must(holds: object, what: str) -> None:
    """State an invariant."""
    if not holds:
        raise BrokenInvariantError(what)
